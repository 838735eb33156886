# SPDX-License-Identifier: Apache-2.0
"""Rounds float weights to the nearest values of a number format."""

import math
from collections.abc import Callable
from functools import partial

import torch

from models.quantization.scheme import Scheme
from ops.int4 import pack_int4
from ops.weight import SYMMETRIC_ZERO, Fp8Weight, Int4Weight, Int8Weight, Weight, beside_blocks, in_blocks

INT8_MAX, FP8_MAX = 127, 448.0


def round_int8(weight: torch.Tensor) -> Int8Weight:
    """Rounds [..., N, K] to int8, symmetric, with a scale per row in the weight's dtype."""
    scales = nonzero(weight.abs().amax(-1, keepdim=True).float() / INT8_MAX).to(weight.dtype)
    values = (weight.float() / scales.float()).round_().clamp_(-INT8_MAX, INT8_MAX)
    return Int8Weight(values.to(torch.int8), scales)


def round_int4(weight: torch.Tensor, group_size: int, symmetric: bool) -> Int4Weight:
    """Rounds [..., N, K] to 4 bits in groups of K, which they must divide, with scales in the weight's dtype."""
    groups = weight.float().unflatten(-1, (-1, group_size))
    if symmetric:
        scales = nonzero(groups.abs().amax(-1) / 7.5).to(weight.dtype)
        zeros, offset = None, torch.full_like(scales, SYMMETRIC_ZERO, dtype=torch.float32)
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = nonzero((high - low) / 15).to(weight.dtype)
        offset = (-low / scales.float()).round_().clamp_(0, 15)
        zeros = offset.to(torch.uint8)
    values = (groups / scales.float()[..., None]).add_(offset[..., None]).round_().clamp_(0, 15)
    return Int4Weight(pack_int4(values.to(torch.uint8).flatten(-2)), scales, zeros)


def round_fp8(weight: torch.Tensor, block: tuple[int, int]) -> Fp8Weight:
    """Rounds [..., N, K] to float8 (e4m3) with a float32 scale per block, which must divide N and K."""
    *others, n, k = weight.shape
    blocks = in_blocks(weight.float(), torch.empty(n // block[0], k // block[1], device="meta"))
    scales = nonzero(blocks.abs().amax((-3, -1)) / FP8_MAX)
    values = (blocks / beside_blocks(scales)).view(*others, n, k)
    return Fp8Weight(values.to(torch.float8_e4m3fn), scales)


def nonzero(scales: torch.Tensor) -> torch.Tensor:
    """Replaces scales of blocks that are all zero."""
    return scales.masked_fill(scales == 0, 1.0)


def rounding_of(module: str, scheme: Scheme) -> Callable[[torch.Tensor], Weight] | None:
    """Returns the function that rounds a weight to the format which a scheme declares for a module; None: stays float.

    Groups and blocks become smaller where they do not divide the weight.
    """
    if scheme.method not in ("awq", "gptq", "fp8", "compressed-tensors") or scheme.keeps_float(module):
        return None
    if scheme.method == "fp8":
        return lambda weight: by_expert(partial(round_fp8, block=fitting(scheme.block, weight.shape[-2:])), weight)
    group = scheme.group(module)
    if group is not None and group.bits == 8:
        return partial(by_expert, round_int8)
    size = scheme.group_size if group is None else group.group_size
    symmetric = not (scheme.has_zeros if group is None else group.has_zeros)

    def round_groups(weight: torch.Tensor) -> Weight:
        columns = weight.shape[-1]
        fits = columns if size in (None, -1) else math.gcd(columns, size)
        return by_expert(partial(round_int4, group_size=fits, symmetric=symmetric), weight)

    return round_groups


def fitting(block: tuple[int, int], shape: torch.Size) -> tuple[int, int]:
    return math.gcd(block[0], shape[0]), math.gcd(block[1], shape[1])


def by_expert(round_weight: Callable[[torch.Tensor], Weight], weight: torch.Tensor) -> Weight:
    """Rounds stacked experts one at a time, to limit memory."""
    if weight.dim() == 2:
        return round_weight(weight)
    experts = [round_weight(expert) for expert in weight]
    return type(experts[0])(**{name: torch.stack([e.tensors[name] for e in experts]) for name in experts[0].tensors})
