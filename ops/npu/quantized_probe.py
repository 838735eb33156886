# SPDX-License-Identifier: Apache-2.0
"""Small random quantised weights, and the probe that compares a backend's operations on them with the reference."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ops import Routing
from ops.npu.weights import moved
from ops.reference import ReferenceOps
from ops.weight import Int4Weight, Int8StaticWeight, Int8Weight, Weight

if TYPE_CHECKING:
    from ops.npu.quantized import NpuQuantized

TOKENS, SIZE, WIDTH, EXPERTS, TOP_K = 5, 128, 64, 4, 2
GROUPS = 2  # of 4-bit weights, along K
EPS = 1e-6
TOLERANCE = 0.05  # relative; 16-bit activations and int8 values may be rounded to a neighbour


def random_weight(format_name: str, shape: tuple[int, ...], groups: int, generator: torch.Generator) -> Weight:
    """A weight [N, K] or [E, N, K] of normally distributed rows: outputs are about as large as inputs.

    groups: of 4-bit weights, along K. w8a8-static takes inputs of about 1, with a bias of the norm before it.
    """
    *experts, n, k = shape
    spread = 1 + torch.rand(*experts, n, 1, generator=generator)
    if format_name == Int4Weight.format_name:
        words = torch.randint(-(2**31), 2**31, (*experts, n, k // 8), generator=generator)
        zeros = torch.randint(5, 11, (*experts, n, groups), generator=generator)
        scales = spread * (1 + torch.rand(*experts, n, groups, generator=generator)) / (10 * k**0.5)
        return Int4Weight(words.int(), scales.bfloat16().float(), zeros.to(torch.uint8))
    data = torch.randint(-127, 128, (*experts, n, k), dtype=torch.int8, generator=generator)
    scales = spread / (100 * k**0.5)
    if format_name == Int8Weight.format_name:
        return Int8Weight(data, scales)
    scale, offset = torch.tensor([0.0301]), torch.tensor([-9.0])
    bias = torch.randn(k, generator=generator).bfloat16().float() / 4
    correction = -offset * data.sum(-1, keepdim=True) - (data.float() @ bias / scale)[:, None]
    return Int8StaticWeight(data, scales * scale, correction.round().int(), scale, offset, bias)


def probe(ops: "NpuQuantized", family: str, dtype: torch.dtype, device: str) -> None:
    """Runs the operation of a family, as "linear w8a8", on random weights.

    RuntimeError where the output is not that of the reference in float32. On meta tensors only the calls are checked.
    """
    operation, _, format_name = family.partition(" ")
    actual, expected = trial(ops, operation, format_name, dtype, device)
    if device != "meta":
        error = (actual.cpu().float() - expected).norm() / expected.norm()
        if not error < TOLERANCE:
            raise RuntimeError(f"{family} differs from the reference by {error:.2f}")


def trial(
    ops: "NpuQuantized", operation: str, format_name: str, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor]:
    """Output of an operation on `ops`, and on the reference in float32."""
    generator, reference = torch.Generator().manual_seed(0), ReferenceOps()

    def weights(*shape: int) -> tuple[Weight, Weight]:
        weight = random_weight(format_name, shape, GROUPS, generator)
        return ops.converted(moved(weight, device), dtype), weight

    def floats(*shape: int) -> tuple[Tensor, Tensor]:
        values = torch.randn(shape, generator=generator).to(dtype)
        return values.to(device), values.float()

    hidden = floats(TOKENS, SIZE)
    if operation in ("linear", "norm_linear"):
        residual, norm, weight = floats(TOKENS, SIZE), floats(SIZE), weights(SIZE, SIZE)
        if operation == "linear":
            return ops.linear(hidden[0], weight[0]), reference.linear(hidden[1], weight[1])
        actual = ops.norm_linear(hidden[0], residual[0], norm[0], EPS, weight[0])
        expected = reference.norm_linear(hidden[1], residual[1], norm[1], EPS, weight[1])
        return torch.cat(actual), torch.cat(expected)
    gate_up, down = weights(EXPERTS, 2 * WIDTH, SIZE), weights(EXPERTS, SIZE, WIDTH)
    shares = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOP_K)
    routing = Routing(shares.values, shares.indices)
    moved_routing = Routing(shares.values.to(device), shares.indices.to(device))
    return (
        ops.experts(hidden[0], moved_routing, gate_up[0], down[0]),
        reference.experts(hidden[1], routing, gate_up[1], down[1]),
    )
