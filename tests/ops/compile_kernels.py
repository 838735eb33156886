# SPDX-License-Identifier: Apache-2.0
"""Cross-compiles the kernels without a GPU: `python -m tests.ops.compile_kernels 90 232448`.

The arguments are compute capability and bytes of shared memory per program.

Calls every operation at the 30B shape on untouched memory and compiles instead of launching. Prints a JSON object per
compiled kernel. Triton must not be set to interpret.
"""

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from ops import DenseWeight, GroupedRows
from ops.cuda import CudaOps, tiles
from ops.cuda.int4_calls import CudaInt4Weight, dequantized
from ops.cuda.launch import BoundKernel
from ops.cuda.peer_exchange import PeerExchange
from ops.cuda.tune import random_int4
from ops.step import BLOCK_SIZE, Span, blocks_for, step_inputs

D, H, G, C, E, K, F = 2048, 32, 4, 128, 128, 8, 768
EPS = 1e-6
DTYPE = torch.bfloat16
TYPE_NAMES = {DTYPE: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
TYPE_NAMES |= {torch.int16: "i16", torch.uint8: "u8"}


def main(capability: int, shared_memory: int) -> None:
    has_pdl = capability >= 90
    tiles.shared_memory_bytes = lambda device: shared_memory
    BoundKernel.__call__ = lambda self, *varying: compile_kernel(self, varying, capability)
    for num_tokens in (1, 8, 16):
        decode(num_tokens, has_pdl, Layer())
    for num_tokens in (1, 8):
        decode(num_tokens, has_pdl, Int4Layer())
    dequantized(Int4Layer().o, DTYPE)
    prefill(300, has_pdl)
    exchange = PeerExchange(0, [0, 0], torch.device("cpu"), None)
    exchange.pdl = has_pdl
    exchange.all_reduce(torch.empty(D, dtype=DTYPE))
    exchange.all_gather(torch.empty(4, dtype=torch.int64))


def compile_kernel(bound: BoundKernel, varying: tuple[Any, ...], capability: int) -> None:
    arguments = (*varying, *bound.fixed)
    names = bound.kernel.arg_names
    signature = {name: type_name(argument) for name, argument in zip(names, arguments, strict=False)}
    pointers = (i for i, argument in enumerate(arguments) if isinstance(argument, torch.Tensor))
    source = ASTSource(
        fn=bound.kernel,
        signature=signature | {name: "constexpr" for name in names[len(arguments) :]},
        constexprs={(i,): bound.constants[name] for i, name in enumerate(names) if i >= len(arguments)},
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=bound.options)
    ptx = compiled.asm["ptx"]
    found = {
        "kernel": bound.kernel.__name__,
        "shared_memory": compiled.metadata.shared,
        "pdl": bound.options["launch_pdl"],
        "first": bound.constants.get("FIRST", bound.constants.get("HAS_RESIDUAL") is False),  # of a step
        # positions in the PTX, -1 if absent
        "wait": ptx.find("griddepcontrol.wait"),
        "trigger": ptx.find("griddepcontrol.launch_dependents"),
        "first_store": min(place for place in map(ptx.find, ("st.global", "atom.global")) if place >= 0),
    }
    print(json.dumps(found))


def type_name(argument: torch.Tensor | TensorDescriptor | int) -> str:
    if isinstance(argument, torch.Tensor):
        return f"*{TYPE_NAMES[argument.dtype]}"
    if isinstance(argument, TensorDescriptor):
        return f"tensordesc<{TYPE_NAMES[argument.base.dtype]}{list(argument.block_shape)}>"
    return "i32"


def decode(num_tokens: int, has_pdl: bool, layer: "Layer") -> None:
    ops = CudaOps()
    ops.pdl = has_pdl
    hidden_states, residual = empty(num_tokens, D), torch.empty(num_tokens, D)
    ops.norm_linear(hidden_states, None, layer.norm, EPS, layer.qkv)
    qkv, _ = ops.norm_linear(hidden_states, residual, layer.norm, EPS, layer.qkv)
    attended = ops.attention(qkv, *layer.head_norms, EPS, *attention_inputs([(700, 1)] * num_tokens))
    ops.linear(attended, layer.o)
    normed, _, routing = ops.route(hidden_states, residual, layer.norm, EPS, layer.router, K, True)
    ops.experts(normed, routing, layer.gate_up, layer.down)
    ops.experts(normed, routing.of_rank(0, E // 2), layer.gate_up[: E // 2], layer.down[: E // 2])


def prefill(num_tokens: int, has_pdl: bool) -> None:
    ops, layer = CudaOps(), Layer()
    ops.pdl = has_pdl
    for cached in (0, 4000):  # the second: small and large tiles
        spans = [(cached, 2), (cached, num_tokens - 2)]
        ops.attention(layer.qkv_of(num_tokens), *layer.head_norms, EPS, *attention_inputs(spans))
    ops.silu_and_mul(empty(num_tokens, 2 * F))
    rows = GroupedRows(torch.empty(E, dtype=torch.int64))
    ops.experts(empty(num_tokens, D), rows, layer.gate_up, layer.down)


class Layer:
    """Weights of the 30B shape, never read."""

    def __init__(self) -> None:
        self.qkv, self.o = DenseWeight(empty((H + 2 * G) * C, D)), DenseWeight(empty(D, H * C))
        self.gate_up, self.down = DenseWeight(empty(E, 2 * F, D)), DenseWeight(empty(E, D, F))
        self.router, self.norm = empty(E, D), empty(D)
        self.head_norms = (empty(C), empty(C))

    def qkv_of(self, num_tokens: int) -> torch.Tensor:
        return empty(num_tokens, (H + 2 * G) * C)


class Int4Layer(Layer):
    """As `Layer`, with 4-bit projections."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = int4((H + 2 * G) * C, D), int4(D, H * C)
        self.gate_up, self.down = int4(E, 2 * F, D), int4(E, D, F)


def int4(*shape: int) -> CudaInt4Weight:
    return random_int4(*shape, device="cpu", dtype=DTYPE)


def attention_inputs(spans: list[tuple[int, int]]) -> tuple[Any, ...]:
    """Cos and sin, caches, and the step of sequences with (cached, new) tokens."""
    blocks = list(range(1, 1 + max(blocks_for(sum(span)) for span in spans)))
    built = [Span(num_computed, num_new, blocks, num_computed) for num_computed, num_new in spans]
    step = step_inputs(built, [[]] * len(spans), "cpu")[1]
    cos_sin = (torch.empty(step.num_tokens, C), torch.empty(step.num_tokens, C))
    return cos_sin, empty(40, BLOCK_SIZE, G, C), empty(40, BLOCK_SIZE, G, C), step


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=DTYPE)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
