# SPDX-License-Identifier: Apache-2.0
"""4-bit weights in the order of the CUDA kernels, and their operations, bound to a weight."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch.nn import functional as F

from ops import RouterLogits
from ops.cuda import tiles
from ops.cuda.batched_experts import PLAN_FIELDS, plan_kernel, weighted_sum_kernel
from ops.cuda.experts import PLAN_WARPS, SUM_BLOCK
from ops.cuda.int4 import (
    dequantize_int4_kernel,
    down_int4_kernel,
    down_shared_int4_kernel,
    gate_up_int4_kernel,
    gate_up_shared_int4_kernel,
    linear_int4_kernel,
)
from ops.cuda.launch import BoundKernel, fits, power_of_two_factor
from ops.cuda.norm import add_norm_constants, add_norm_kernel
from ops.cuda.triton_internals import COMPILES_NARROW_DOT, argument_names
from ops.int4 import pack_int4, unpack_int4
from ops.weight import SYMMETRIC_ZERO, Int4Weight, Weight

TILE_ROWS, TILE_COLUMNS = 16, 128
GROUPS_STEP = 32  # columns; divides the columns per scale
MAX_K = 8192
DEQUANTIZED_TILES = 8  # of a row, per program
LEAST_WARPS, MAX_WARPS = 4, 16
THREAD_BYTES = 256  # of weights in a thread's registers
SHARED_DOWN_TILES = 2  # of a column, per program


@dataclass(frozen=True)
class CudaInt4Weight(Weight):
    """W4A16 in the order of `ops/cuda/int4.py`, in tiles; the last ones of a row may be padded."""

    format_name = "w4a16"
    words: torch.Tensor  # int16 [N / 16, TILES, 512] or [E, N / 16, TILES, 512]
    scales: torch.Tensor  # [N / 16, TILES, PARTS * 32], each beside 16 + its zero point
    k: int

    @property
    def shape(self) -> tuple[int, ...]:
        *others, row_tiles, _, _ = self.words.shape
        return (*others, row_tiles * TILE_ROWS, self.k)

    @property
    def constants(self) -> dict[str, Any]:
        return {"TILES": self.words.shape[-2], "S": self.batch, "PARTS": self.scales.shape[-1] // (2 * TILE_ROWS)}

    @property
    def batch(self) -> int:
        """Tiles of a row, rounded up to a power of two."""
        return triton.next_power_of_2(self.words.shape[-2])


def why_not(weight: Int4Weight) -> str | None:
    """Why the kernels do not support a weight; None if they do."""
    n, k = weight.shape[-2:]
    if not COMPILES_NARROW_DOT:
        return f"triton {triton.__version__}"
    if weight.group_size % GROUPS_STEP:
        return f"groups of {weight.group_size} columns, no multiple of {GROUPS_STEP}"
    if n % TILE_ROWS:
        return f"{n} rows, no multiple of {TILE_ROWS}"
    return f"{k} columns, more than {MAX_K}" if k > MAX_K else None


def reordered(weight: Int4Weight) -> CudaInt4Weight:
    """Repacks a weight for the kernels, one expert at a time."""
    k = weight.shape[-1]
    if len(weight.shape) == 2:
        return CudaInt4Weight(*in_tiles(weight), k)
    experts = [in_tiles(weight[expert]) for expert in range(weight.shape[0])]
    words, scales = (torch.stack(tensors) for tensors in zip(*experts, strict=True))
    return CudaInt4Weight(words, scales, k)


def in_tiles(weight: Weight) -> tuple[torch.Tensor, torch.Tensor]:
    """Words and scales of `CudaInt4Weight` for one matrix."""
    assert isinstance(weight, Int4Weight)
    n, k = weight.shape
    values = F.pad(unpack_int4(weight.qweight), (0, -k % TILE_COLUMNS)).view(n // TILE_ROWS, 2, 8, -1, 4, 4, 8)
    words = pack_int4(values.permute(0, 3, 1, 2, 5, 6, 4).flatten(2)).view(torch.int16)
    part = math.gcd(weight.group_size, TILE_COLUMNS)  # columns
    starts = torch.arange(0, k + -k % TILE_COLUMNS, part, device=weight.scales.device)
    group = (starts // weight.group_size).clamp_(max=weight.scales.shape[1] - 1)
    zeros = torch.full_like(weight.scales, SYMMETRIC_ZERO) if weight.zeros is None else weight.zeros.to(weight.scales)
    by_part = torch.stack((weight.scales, zeros + 16), dim=-1)[:, group]
    by_tile = by_part.view(n // TILE_ROWS, 2, 8, -1, TILE_COLUMNS // part, 2).permute(0, 3, 4, 2, 1, 5)
    return words, by_tile.flatten(2).contiguous()


def dequantized(weight: CudaInt4Weight, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [N, K], or matrices [E, N, K], in memory."""
    output = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    constants = weight.constants | {"K": weight.k}
    constants["S"] = min(DEQUANTIZED_TILES, weight.batch)
    grid = (output.numel() // weight.k // TILE_ROWS, triton.cdiv(constants["TILES"], constants["S"]))
    bound(dequantize_int4_kernel, grid, 4, False, (weight.words, weight.scales, output), constants)()
    return output


def int4_takes(x: torch.Tensor, residual: torch.Tensor | None = None) -> bool:
    """Returns whether the decode kernels support activations [T, K] and a residual."""
    right_type = x.dtype in (torch.bfloat16, torch.float16) and (residual is None or residual.dtype is torch.float32)
    return right_type and fits(x, residual)


class Int4Linear:
    """Linear layer of a decode step, bound to its weight and output buffers, with the norm before it for one token."""

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
        high, warps = int4_tile("linear_int4", n, k)
        self.output = x.new_empty(num_tokens, n)
        self.residual = torch.empty_like(x, dtype=torch.float32) if norm else self.output
        norm_weight, eps = norm or (weight.scales, 0.0)
        bias_or_any = self.output if bias is None else bias
        fixed = (norm_weight, weight.words, weight.scales, bias_or_any, self.output, self.residual, num_tokens)
        constants = weight.constants | {"K": k, "M": high, "EPS": eps}
        constants |= {"NORM": norm is not None, "HAS_RESIDUAL": has_residual}
        constants |= {"HAS_BIAS": bias is not None, "FIRST": norm is not None and not has_residual, "PDL": pdl}
        self.kernel = bound(linear_int4_kernel, (n // (TILE_ROWS * high),), warps, pdl, fixed, constants)


class Int4LinearCall(Int4Linear):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.kernel(x, x)
        return self.output


class Int4NormLinearCall(Int4Linear):
    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        self.kernel(x, x if residual is None else residual)
        return self.output, self.residual


class Int4NormThenLinearCall:
    """Norm kernel, then the linear layer: fused, each program would recompute the norm of all tokens."""

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
        top_k, num_experts = routing.top_k, routing.logits.shape[1]
        count, d, f = down.shape
        sizes = {"D": d, "F": f, "E": num_experts, "BLOCK_E": triton.next_power_of_2(num_experts), "TOP_K": top_k}
        sizes |= {"FIRST": routing.first, "COUNT": count, "PDL": pdl}
        self.activated = normed.new_empty(1, top_k, f)
        self.output = torch.empty_like(normed)
        high, warps = int4_tile("gate_up_int4", f, d, matrices=2)
        constants = sizes | gate_up.constants | {"M": high}
        self.gate_up = bound(
            gate_up_int4_kernel,
            (f // (TILE_ROWS * high), top_k),
            warps,
            pdl,
            (gate_up.words, gate_up.scales, self.activated),
            constants,
        )
        block_k = triton.next_power_of_2(top_k)
        high, warps = int4_tile("down_int4", d, f, matrices=block_k)
        constants = sizes | down.constants | {"M": high, "BLOCK_K": block_k}
        constants |= {"RENORMALIZE": routing.renormalize}
        self.down = bound(
            down_int4_kernel,
            (d // (TILE_ROWS * high),),
            warps,
            pdl,
            (self.activated, down.words, down.scales, self.output),
            constants,
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
        high, warps = int4_tile("shared_gate_up_int4", f, d, matrices=2)
        constants = sizes | gate_up.constants | {"M": high}
        self.gate_up = bound(
            gate_up_shared_int4_kernel,
            (f // (TILE_ROWS * high), num_slots),
            warps,
            pdl,
            (slots, gate_up.words, gate_up.scales, self.activated),
            constants,
        )
        high, warps = int4_tile("shared_down_int4", d, f)
        constants = sizes | down.constants | {"M": high}
        self.down = bound(
            down_shared_int4_kernel,
            (d // (TILE_ROWS * high), num_slots),
            warps,
            pdl,
            (slots, self.activated, down.words, down.scales, self.partial),
            constants,
        )
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


def bound(
    kernel: Any, grid: tuple[int, ...], warps: int, pdl: bool, fixed: tuple[Any, ...], constants: dict[str, Any]
) -> BoundKernel:
    """Binds a kernel to those of the constants that it has, in the order of its signature."""
    own = {name: constants[name] for name in argument_names(kernel) if name in constants}
    return BoundKernel(kernel, grid, warps, pdl, fixed, **own)


def int4_tile(kernel: str, n: int, k: int, matrices: int = 1) -> tuple[int, int]:
    """Height in tiles, and warps, of a program that holds rows of `matrices` weights [n, k]."""
    if sizes := tiles.sizes_of(kernel, n, k):
        return sizes[0], sizes[1]
    high = power_of_two_factor(n // TILE_ROWS, SHARED_DOWN_TILES if kernel == "shared_down_int4" else 1)
    in_row = triton.next_power_of_2(triton.cdiv(k, TILE_COLUMNS))
    enough = matrices * high * in_row * TILE_ROWS * TILE_COLUMNS // 2 // (THREAD_BYTES * 32)
    return high, min(matrices * in_row, max(LEAST_WARPS, enough), MAX_WARPS)
