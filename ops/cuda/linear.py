# SPDX-License-Identifier: Apache-2.0
"""GEMV kernel for decode steps of one token, or of a few tokens with a small matrix.

Each program holds whole rows of the matrix in registers, loaded before the previous kernel has finished (PDL). Every
program recomputes the residual add and RMSNorm of its token, which is far smaller than its rows of the matrix.
"""

import torch
import triton
import triton.language as tl

from ops import RouterLogits
from ops.cuda.launch import BoundKernel, fits, is_power_of_two, pdl_trigger, pdl_wait
from ops.cuda.tiles import MAX_TOKENS, gemv_tile

MAX_K = 8192  # one program holds a row in registers
STREAMED_BYTES = 32 << 20  # matrices from this size on are not kept in L2 between steps
SMALL_BYTES = 1 << 20  # matrices up to this size are re-read for every token; larger ones: matmul.py
ROUTER_BYTES = 8 << 20  # the same for a router, whose float32 logits the experts' kernels need


@triton.jit
def gemv_kernel(
    hidden,  # [T, K]
    residual,  # [T, K] float32; unused without residual
    norm_weight,  # [K]
    weight,  # [N, K]
    bias,  # [N]
    output,  # [T, N]
    residual_output,  # [T, K] float32
    normed_output,  # [T, K]
    K: tl.constexpr,
    ROWS: tl.constexpr,  # rows per tile
    TILES: tl.constexpr,  # tiles per program
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_NORMED: tl.constexpr,
    STREAMED: tl.constexpr,  # whether the matrix is too large to stay in L2 until the next step
    FIRST: tl.constexpr,  # whether it is the first kernel of a step
    PDL: tl.constexpr,
):
    """GEMV with fused residual add and RMSNorm if NORM: output = norm(hidden + residual) x weight^T + bias.

    Grid (N / (ROWS * TILES), T).
    """
    program = tl.program_id(0)
    k = tl.arange(0, K)
    n = program * (ROWS * TILES) + tl.arange(0, ROWS)
    pdl_trigger(PDL and not FIRST)
    tiles = ()
    for i in tl.static_range(TILES):
        addresses = weight + (n + i * ROWS)[:, None] * K + k[None, :]
        if STREAMED:
            tiles = tiles + (tl.load(addresses, eviction_policy="evict_first"),)
        else:
            tiles = tiles + (tl.load(addresses),)
    if NORM:
        gain = tl.load(norm_weight + k).to(tl.float32)
    pdl_wait(PDL)
    pdl_trigger(PDL and FIRST)
    t = tl.program_id(1)
    x = tl.load(hidden + t * K + k).to(tl.float32)
    scale = 1.0
    if NORM:
        if HAS_RESIDUAL:
            x += tl.load(residual + t * K + k)
        if program == t % tl.num_programs(0):
            tl.store(residual_output + t * K + k, x)
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / K + EPS)
        x = x * gain
        if STORE_NORMED and program == t % tl.num_programs(0):
            tl.store(normed_output + t * K + k, (x * scale).to(normed_output.dtype.element_ty))
    for i in tl.static_range(TILES):
        y = tl.sum(tiles[i].to(tl.float32) * x[None, :], axis=1) * scale
        if HAS_BIAS:
            y += tl.load(bias + n + i * ROWS).to(tl.float32)
        tl.store(output + t * (tl.num_programs(0) * ROWS * TILES) + n + i * ROWS, y.to(output.dtype.element_ty))


def gemv_supports(x: torch.Tensor, weight: torch.Tensor, is_router: bool = False) -> bool:
    """Returns whether `gemv_kernel` supports x [T, K] and weight [N, K]."""
    k = weight.shape[1]
    is_small = weight.nbytes <= (ROUTER_BYTES if is_router else SMALL_BYTES)
    few_enough = x.shape[0] <= (MAX_TOKENS if is_small else 1)
    sizes_fit = is_power_of_two(k) and 16 <= k <= MAX_K and weight.numel() < 2**31  # 32-bit offsets
    return few_enough and sizes_fit and x.dtype == weight.dtype and fits(x, weight)


class GemvCall:
    """GEMV of a decode step, bound to its weight and output buffers; variants as in `gemv_kernel`."""

    def __init__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        pdl: bool,
        norm: tuple[torch.Tensor, float] | None = None,
        has_residual: bool = False,
        store_normed: bool = False,
        output_dtype: torch.dtype | None = None,
    ):
        (num_tokens, k), n = x.shape, weight.shape[0]
        tile = gemv_tile(n, k)
        self.output = x.new_empty(num_tokens, n, dtype=output_dtype or x.dtype)
        self.residual = torch.empty_like(x, dtype=torch.float32) if norm else self.output
        self.normed = torch.empty_like(x) if store_normed else self.output
        norm_weight, eps = norm or (weight, 0.0)
        fixed = (norm_weight, weight, weight if bias is None else bias, self.output, self.residual, self.normed)
        self.kernel = BoundKernel(
            gemv_kernel,
            (n // (tile.rows * tile.tiles), num_tokens),
            tile.warps,
            pdl,
            fixed,
            K=k,
            ROWS=tile.rows,
            TILES=tile.tiles,
            EPS=eps,
            NORM=norm is not None,
            HAS_RESIDUAL=has_residual,
            HAS_BIAS=bias is not None,
            STORE_NORMED=store_normed,
            STREAMED=weight.nbytes >= STREAMED_BYTES,
            FIRST=norm is not None and not has_residual,
            PDL=pdl,
        )


class LinearCall(GemvCall):
    """Linear layer (`Ops.linear`) as a GEMV."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.kernel(x, x)
        return self.output


class NormLinearCall(GemvCall):
    """Residual add, RMSNorm and linear layer (`Ops.norm_linear`) as one GEMV."""

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        self.kernel(x, x if residual is None else residual)
        return self.output, self.residual


class RouteCall(GemvCall):
    """Residual add, RMSNorm and router (`Ops.route`) as one GEMV; top-k is fused into the experts' kernels."""

    def __init__(
        self,
        x: torch.Tensor,
        router_weight: torch.Tensor,
        pdl: bool,
        norm: tuple[torch.Tensor, float],
        has_residual: bool,
        top_k: int,
        renormalize: bool,
    ):
        super().__init__(x, router_weight, None, pdl, norm, has_residual, store_normed=True, output_dtype=torch.float32)
        self.results = self.normed, self.residual, RouterLogits(self.output, top_k, renormalize)

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, RouterLogits]:
        self.kernel(x, x if residual is None else residual)
        return self.results
