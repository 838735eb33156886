# SPDX-License-Identifier: Apache-2.0
"""4-bit weights in the order of the CUDA kernels, and their operations, bound to a weight."""

from dataclasses import dataclass
from typing import Any

import torch
import triton

from ops import RouterLogits
from ops.cuda.batched_experts import PLAN_FIELDS, plan_kernel, weighted_sum_kernel
from ops.cuda.experts import PLAN_WARPS, SUM_BLOCK
from ops.cuda.int4 import (
    dequantize_int4_kernel,
    down_int4_kernel,
    down_shared_int4_kernel,
    gate_up_int4_kernel,
    gate_up_shared_int4_kernel,
    gemv_int4_kernel,
)
from ops.cuda.launch import BoundKernel, fits, is_power_of_two, power_of_two_factor
from ops.cuda.norm import add_norm_constants, add_norm_kernel
from ops.cuda.triton_internals import argument_names
from ops.int4 import PER_WORD, pack_int4, unpack_int4
from ops.weight import Int4Weight, Weight

LEAST_GROUP = 32
MAX_K = 8192
DEQUANTIZED_WORDS = 256  # of a row, per program


@dataclass(frozen=True)
class CudaInt4Weight(Weight):
    """W4A16 with the words in the order of `ops/cuda/int4.py`."""

    format_name = "w4a16"
    words: torch.Tensor  # int32 [N, K / 8] or [E, N, K / 8]
    scales: torch.Tensor  # [N, K / group_size]
    zeros: torch.Tensor | None = None  # uint8

    @property
    def shape(self) -> tuple[int, ...]:
        *others, words = self.words.shape
        return (*others, words * PER_WORD)

    @property
    def group_size(self) -> int:
        return self.shape[-1] // self.scales.shape[-1]

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Arguments of a kernel; scales stand for absent zero points."""
        return self.words, self.scales, self.scales if self.zeros is None else self.zeros


def reordered(weight: Int4Weight) -> CudaInt4Weight | None:
    """Repacks a weight for the kernels, one expert at a time; None if they do not support its sizes."""
    n, k = weight.shape[-2:]
    group = weight.group_size
    if group < LEAST_GROUP or group % PER_WORD or k > MAX_K or n % PER_WORD:
        return None

    def reorder(words: torch.Tensor) -> torch.Tensor:
        values = unpack_int4(words).unflatten(-1, (-1, PER_WORD, group // PER_WORD))
        return pack_int4(values.transpose(-1, -2).flatten(-3))

    words = weight.qweight
    ordered = torch.stack([reorder(expert) for expert in words]) if words.dim() == 3 else reorder(words)
    return CudaInt4Weight(ordered, weight.scales.contiguous(), weight.zeros)


def dequantized(weight: CudaInt4Weight, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [N, K], or matrices [E, N, K], in memory."""
    k = weight.shape[-1]
    output = torch.empty(weight.shape, dtype=dtype, device=weight.words.device)
    rows = weight.words.numel() * PER_WORD // k
    block = min(DEQUANTIZED_WORDS, triton.next_power_of_2(k // PER_WORD))
    grid = (rows, triton.cdiv(k // PER_WORD, block))
    constants = {"K": k, "GROUP": weight.group_size, "BLOCK": block, "HAS_ZEROS": weight.zeros is not None}
    dequantize_int4_kernel[grid](*weight.parts, output, **constants, num_warps=4)
    return output


def int4_takes(x: torch.Tensor, residual: torch.Tensor | None = None) -> bool:
    """Whether the decode kernels take activations [T, K], which meet whole rows of a weight, and a residual."""
    right_type = x.dtype in (torch.bfloat16, torch.float16) and (residual is None or residual.dtype is torch.float32)
    return right_type and fits(x, residual) and is_power_of_two(x.shape[1])


class Int4GemvCall:
    """Linear layer as a GEMV for each token, with the norm before it where there is one token."""

    def __init__(
        self,
        x: torch.Tensor,
        weight: CudaInt4Weight,
        bias: torch.Tensor | None,
        pdl: bool,
        norm: tuple[torch.Tensor, float] | None = None,
        has_residual: bool = False,
    ):
        (num_tokens, k), n = x.shape, weight.shape[0]
        rows, warps = gemv_tile(n, k)
        self.output = x.new_empty(num_tokens, n)
        self.residual = torch.empty_like(x, dtype=torch.float32) if norm else self.output
        norm_weight, eps = norm or (weight.scales, 0.0)
        fixed = (norm_weight, *weight.parts, self.output if bias is None else bias, self.output, self.residual)
        self.kernel = BoundKernel(
            gemv_int4_kernel,
            (n // rows, num_tokens),
            warps,
            pdl,
            fixed,
            K=k,
            GROUP=weight.group_size,
            ROWS=rows,
            EPS=eps,
            NORM=norm is not None,
            HAS_RESIDUAL=has_residual,
            HAS_ZEROS=weight.zeros is not None,
            HAS_BIAS=bias is not None,
            FIRST=norm is not None and not has_residual,
            PDL=pdl,
        )


class Int4LinearCall(Int4GemvCall):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.kernel(x, x)
        return self.output


class Int4NormLinearCall(Int4GemvCall):
    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        self.kernel(x, x if residual is None else residual)
        return self.output, self.residual


class Int4NormThenLinearCall:
    """Norm kernel, then a GEMV for each token: fused, every program would recompute the norm of all tokens."""

    def __init__(
        self,
        x: torch.Tensor,
        weight: CudaInt4Weight,
        bias: torch.Tensor | None,
        pdl: bool,
        norm: tuple[torch.Tensor, float],
        has_residual: bool,
    ):
        num_tokens, d = x.shape
        norm_weight, eps = norm
        self.normed, self.residual = torch.empty_like(x), torch.empty_like(x, dtype=torch.float32)
        constants = add_norm_constants(d, eps, has_residual, pdl)
        fixed = (norm_weight, self.normed, self.residual)
        self.add_norm = BoundKernel(add_norm_kernel, (num_tokens,), 4, pdl, fixed, **constants)
        self.linear = Int4LinearCall(self.normed, weight, bias, pdl)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        self.add_norm(x, x if residual is None else residual)
        return self.linear(self.normed), self.residual


class Int4ExpertsCall:
    """Experts for one token: gate_up_proj with SwiGLU, then down_proj with the weighted sum over experts."""

    def __init__(
        self, normed: torch.Tensor, routing: RouterLogits, gate_up: CudaInt4Weight, down: CudaInt4Weight, pdl: bool
    ):
        num_tokens, top_k, num_experts = normed.shape[0], routing.top_k, routing.logits.shape[1]
        count, d, f = down.shape
        sizes = {"D": d, "F": f, "E": num_experts, "BLOCK_E": triton.next_power_of_2(num_experts), "TOP_K": top_k}
        sizes |= {"FIRST": routing.first, "COUNT": count, "PDL": pdl}
        self.activated = normed.new_empty(num_tokens, top_k, f)
        self.output = torch.empty_like(normed)
        rows, warps = gate_up_tile(f, d, num_tokens)
        options = {"ROWS": rows, "GROUP": gate_up.group_size, "HAS_ZEROS": gate_up.zeros is not None}
        grid, fixed = (f // rows, num_tokens * top_k), (*gate_up.parts, self.activated)
        self.gate_up = BoundKernel(
            gate_up_int4_kernel, grid, warps, pdl, fixed, **ordered(gate_up_int4_kernel, sizes | options)
        )
        rows, warps = down_tile(d, num_tokens)
        options = {"ROWS": rows, "GROUP": down.group_size, "HAS_ZEROS": down.zeros is not None}
        options |= {"BLOCK": triton.next_power_of_2(f // PER_WORD), "RENORMALIZE": routing.renormalize}
        self.down = BoundKernel(
            down_int4_kernel,
            (d // rows, num_tokens),
            warps,
            pdl,
            (self.activated, *down.parts, self.output),
            **ordered(down_int4_kernel, sizes | options),
        )

    def __call__(self, normed: torch.Tensor, routing: RouterLogits) -> torch.Tensor:
        self.gate_up(normed, routing.logits)
        self.down(routing.logits)
        return self.output


class Int4BatchedExpertsCall:
    """Experts for two to MAX_TOKENS tokens: an expert's weights are read once for all tokens routed to it."""

    def __init__(
        self, normed: torch.Tensor, routing: RouterLogits, gate_up: CudaInt4Weight, down: CudaInt4Weight, pdl: bool
    ):
        num_tokens, top_k, num_experts = normed.shape[0], routing.top_k, routing.logits.shape[1]
        count, d, f = down.shape
        sizes = {"D": d, "F": f, "TOP_K": top_k, "PDL": pdl}
        num_slots = min(num_tokens * top_k, count)
        slots = normed.new_empty(num_slots + 1, PLAN_FIELDS.value, dtype=torch.int32)
        weights = normed.new_empty(num_tokens, top_k, dtype=torch.float32)
        self.activated = normed.new_empty(num_tokens, top_k, f)
        self.partial = normed.new_empty(num_tokens, top_k, d, dtype=torch.float32)
        self.output = torch.empty_like(normed)
        self.plan = BoundKernel(
            plan_kernel,
            (1,),
            min(PLAN_WARPS, triton.next_power_of_2(num_tokens)),
            pdl,
            (slots, weights, num_tokens, num_slots),
            BLOCK_T=triton.next_power_of_2(num_tokens),
            E=num_experts,
            BLOCK_E=triton.next_power_of_2(num_experts),
            TOP_K=top_k,
            FIRST=routing.first,
            COUNT=count,
            RENORMALIZE=routing.renormalize,
            PDL=pdl,
        )
        rows, warps = gate_up_tile(f, d, num_tokens)
        options = {"ROWS": rows, "GROUP": gate_up.group_size, "HAS_ZEROS": gate_up.zeros is not None}
        constants = ordered(gate_up_shared_int4_kernel, sizes | options)
        fixed: tuple[torch.Tensor, ...] = (slots, *gate_up.parts, self.activated)
        self.gate_up = BoundKernel(gate_up_shared_int4_kernel, (f // rows, num_slots), warps, pdl, fixed, **constants)
        rows, warps = down_tile(d, num_tokens)
        options = {"ROWS": rows, "GROUP": down.group_size, "HAS_ZEROS": down.zeros is not None}
        options |= {"BLOCK": triton.next_power_of_2(f // PER_WORD)}
        constants = ordered(down_shared_int4_kernel, sizes | options)
        fixed = (slots, self.activated, *down.parts, self.partial)
        self.down = BoundKernel(down_shared_int4_kernel, (d // rows, num_slots), warps, pdl, fixed, **constants)
        block = min(SUM_BLOCK, d)
        fixed = (weights, self.partial, self.output)
        constants = {"D": d, "TOP_K": top_k, "BLOCK": block, "ELSEWHERE": count < num_experts}
        self.sum = BoundKernel(weighted_sum_kernel, (d // block, num_tokens), 2, pdl, fixed, **constants, PDL=pdl)

    def __call__(self, normed: torch.Tensor, routing: RouterLogits) -> torch.Tensor:
        self.plan(routing.logits)
        self.gate_up(normed)
        self.down()
        self.sum()
        return self.output


def ordered(kernel: Any, constants: dict[str, Any]) -> dict[str, Any]:
    """Constants in the order of the kernel's signature."""
    return {name: constants[name] for name in argument_names(kernel) if name in constants}


def gemv_tile(n: int, k: int) -> tuple[int, int]:
    """Rows per program and warps; this and the tiles below were measured on an H200 at the 30B shape."""
    return power_of_two_factor(n, max(1, 16384 // k)), 2


def gate_up_tile(f: int, d: int, num_tokens: int) -> tuple[int, int]:
    """Rows per program (of gate and of up each) and warps."""
    return power_of_two_factor(f, max(1, (8192 if num_tokens == 1 else 4096) // d)), 2


def down_tile(d: int, num_tokens: int) -> tuple[int, int]:
    """Rows per program, of top_k experts for one token, and warps."""
    return power_of_two_factor(d, 2 if num_tokens == 1 else 4), 1
