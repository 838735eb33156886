# SPDX-License-Identifier: Apache-2.0
"""Rounds float weights to the nearest values of a number format."""

import math
from collections.abc import Callable
from functools import partial

import torch

from models.quantization.scheme import METHODS, Scheme
from ops.int4 import PER_WORD, pack_int4
from ops.quantized_matmul import INT8_MAX
from ops.weight import SYMMETRIC_ZERO, Fp8Weight, Int4Weight, Int8Weight, Weight, beside_blocks, dequantize, in_blocks

FP8_MAX = 448.0
CLIPPINGS = tuple(1 - 0.05 * step for step in range(10))  # fractions of a group's extreme values


def round_int8(weight: torch.Tensor, dtype: torch.dtype | None = None) -> Int8Weight:
    """Rounds [..., N, K] to int8, symmetric, with a scale per row in `dtype`, by default the weight's."""
    scales = nonzero((weight.abs().amax(-1, keepdim=True).float() / INT8_MAX).to(dtype or weight.dtype))
    values = (weight.float() / scales.float()).round_().clamp_(-INT8_MAX, INT8_MAX)
    return Int8Weight(values.to(torch.int8), scales)


def round_int4(
    weight: torch.Tensor, group_size: int, symmetric: bool, dtype: torch.dtype | None = None, clipping: float = 1.0
) -> Int4Weight:
    """Rounds [..., N, K] to 4 bits in groups of K, which they must divide.

    dtype: of the scales, by default the weight's. clipping: fraction of a group's extreme values that is represented.
    """
    groups = weight.float().unflatten(-1, (-1, group_size))
    if symmetric:
        scales = nonzero((groups.abs().amax(-1) * clipping / 7.5).to(dtype or weight.dtype))
        zeros, offset = None, torch.full_like(scales, SYMMETRIC_ZERO, dtype=torch.float32)
    else:
        low, high = groups.amin(-1).clamp(max=0) * clipping, groups.amax(-1).clamp(min=0) * clipping
        scales = nonzero(((high - low) / 15).to(dtype or weight.dtype))
        offset = (-low / scales.float()).round_().clamp_(0, 15)
        zeros = offset.to(torch.uint8)
    values = (groups / scales.float()[..., None]).add_(offset[..., None]).round_().clamp_(0, 15)
    return Int4Weight(pack_int4(values.to(torch.uint8).flatten(-2)), scales, zeros)


def round_int4_clipped(
    weight: torch.Tensor,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype | None = None,
    importance: torch.Tensor | None = None,
) -> Int4Weight:
    """Rounds [N, K] as `round_int4` does, with the clipping of each group that has the least squared error.

    importance: weights [K] of the columns in that error, such as the mean squares of the layer's inputs. The group size
    must be a multiple of 8.
    """
    best: dict[str, torch.Tensor] = {}
    least = torch.full((), torch.inf, device=weight.device)
    for clipping in CLIPPINGS:
        found = round_int4(weight, group_size, symmetric, dtype, clipping)
        error = (dequantize(found, torch.float32) - weight).square_()
        error = (error if importance is None else error * importance).unflatten(-1, (-1, group_size)).sum(-1)
        better, least = error < least, torch.minimum(error, least)
        for name, values in found.tensors.items():
            by_group = values.unflatten(-1, (error.shape[-1], -1))  # [N, K / group_size, words or 1]
            best[name] = torch.where(better[..., None], by_group, best.get(name, by_group))
    return Int4Weight(**{name: values.flatten(-2) for name, values in best.items()})


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


def random_method(scheme: Scheme) -> str | None:
    """The method of a scheme that random weights follow; msModelSlim's, which lists tensors, has none."""
    return scheme.method if scheme.method in METHODS else None


def rounding_of(module: str, scheme: Scheme) -> Callable[[torch.Tensor], Weight] | None:
    """Returns the function that rounds a weight to the format which a scheme declares for a module; None: stays float.

    Groups and blocks become smaller where they do not divide the weight.
    """
    if random_method(scheme) is None or scheme.keeps_float(module):
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
        if columns % PER_WORD:
            raise ValueError(f"{module}: {columns} columns are no multiple of {PER_WORD}, which 4-bit weights need")
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
