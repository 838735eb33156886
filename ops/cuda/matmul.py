# SPDX-License-Identifier: Apache-2.0
"""Skinny GEMM for decode steps of several tokens, on tensor cores: the matrix is read once for all tokens.

Each program holds whole rows of the matrix, loaded before the previous kernel has finished (PDL). Its warps split K, so
that each has a short chain of MMAs, and partial sums are reduced at the end. Matrices larger than the shared memory of
a Hopper GPU are left to torch.
"""

import torch
import triton
import triton.language as tl

from ops.cuda.launch import BoundKernel, fits, pdl_trigger, pdl_wait, power_of_two_factor
from ops.cuda.norm import add_norm_constants, add_norm_kernel
from ops.cuda.tiles import MAX_TOKENS, matmul_tile
from ops.cuda.triton_internals import COMPILES_NARROW_DOT

ROWS_STEP = 8  # divides the number of rows of the matrix
LEAST_COLUMNS = 16  # minimum columns per tile of a part
TOKENS_ELEMENTS = 4096  # activations in shared memory at a time; more would lower occupancy
MAX_ROUNDS = 16  # tiles per warp; the loop is unrolled
MAX_K = 8192  # limit: a program holds its rows in shared memory
MAX_BYTES = 24 << 20  # matrix size limit: 132 SMs with three programs of 64 KB


@triton.jit(do_not_specialize=["num_tokens"])
def matmul_kernel(
    hidden,  # [T, K]
    weight,  # [N, K]
    bias,  # [N]
    output,  # [T, N]
    num_tokens,  # T
    BLOCK_T: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,  # rows per program
    PARTS: tl.constexpr,  # split-K parts, at most one per warp
    COLUMNS: tl.constexpr,  # columns per tile of a part; PARTS * COLUMNS divides K
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Skinny split-K GEMM: output = hidden x weight^T + bias. Grid (N / ROWS,)."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, PARTS)[:, None, None] * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    t = tl.arange(0, BLOCK_T)
    is_token = t < num_tokens
    pdl_trigger(PDL)
    tiles = ()
    for i in tl.static_range(K // (PARTS * COLUMNS)):
        tiles = tiles + (tl.load(weight + n[None, :, None] * K + i * (PARTS * COLUMNS) + k),)
    pdl_wait(PDL)
    parts = tl.zeros([PARTS, ROWS, BLOCK_T], tl.float32)
    for i in tl.static_range(K // (PARTS * COLUMNS)):
        addresses = hidden + t[None, :, None] * K + i * (PARTS * COLUMNS) + k
        x = tl.load(addresses, mask=is_token[None, :, None], other=0.0)
        parts = tl.dot(tiles[i], tl.permute(x, (0, 2, 1)), parts)
    y = tl.sum(parts, axis=0)
    if HAS_BIAS:
        y += tl.load(bias + n).to(tl.float32)[:, None]
    addresses = output + t[None, :] * (tl.num_programs(0) * ROWS) + n[:, None]
    tl.store(addresses, y.to(output.dtype.element_ty), mask=is_token[None, :])


def matmul_supports(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Returns whether `matmul_kernel` supports x [T, K] and weight [N, K]."""
    (num_tokens, k), n = x.shape, weight.shape[0]
    if not COMPILES_NARROW_DOT or not 1 < num_tokens <= MAX_TOKENS or weight.nbytes > MAX_BYTES:
        return False
    if n % ROWS_STEP or k % LEAST_COLUMNS or k > MAX_K:
        return False
    parts, columns = shares_of_columns(k, num_tokens, matmul_tile(n, k, num_tokens)[1])
    return k <= parts * columns * MAX_ROUNDS and x.dtype == weight.dtype and fits(x, weight)


def shares_of_columns(k: int, num_tokens: int, warps: int) -> tuple[int, int]:
    """Number of split-K parts (at most one per warp), and columns of each part per tile."""
    parts = power_of_two_factor(k // LEAST_COLUMNS, warps)
    return parts, power_of_two_factor(k // parts, TOKENS_ELEMENTS // (parts * triton.next_power_of_2(num_tokens)))


class MatmulCall:
    """Linear layer (`Ops.linear`) for several tokens, bound to its weight and output buffer."""

    def __init__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, pdl: bool):
        (num_tokens, k), n = x.shape, weight.shape[0]
        rows, warps = matmul_tile(n, k, num_tokens)
        parts, columns = shares_of_columns(k, num_tokens, warps)
        self.output = x.new_empty(num_tokens, n)
        self.kernel = BoundKernel(
            matmul_kernel,
            (n // rows,),
            warps,
            pdl,
            (weight, weight if bias is None else bias, self.output, num_tokens),
            BLOCK_T=triton.next_power_of_2(num_tokens),
            K=k,
            ROWS=rows,
            PARTS=parts,
            COLUMNS=columns,
            HAS_BIAS=bias is not None,
            PDL=pdl,
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.kernel(x)
        return self.output


class NormMatmulCall:
    """Norm kernel, then skinny GEMM (`Ops.norm_linear`); fused, each program would recompute the norm of all tokens."""

    def __init__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        pdl: bool,
        norm: tuple[torch.Tensor, float],
        has_residual: bool,
    ):
        num_tokens, d = x.shape
        norm_weight, eps = norm
        self.normed, self.residual = torch.empty_like(x), torch.empty_like(x, dtype=torch.float32)
        fixed = (norm_weight, self.normed, self.residual)
        constants = add_norm_constants(d, eps, has_residual, pdl)
        self.add_norm = BoundKernel(add_norm_kernel, (num_tokens,), 4, pdl, fixed, **constants)
        self.matmul = MatmulCall(self.normed, weight, bias, pdl)
        self.output = self.matmul.output

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        self.add_norm(x, x if residual is None else residual)
        return self.matmul(self.normed), self.residual
