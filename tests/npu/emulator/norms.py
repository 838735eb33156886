# SPDX-License-Identifier: Apache-2.0
"""RMSNorm, rotary embedding and SwiGLU (op-plugin docs: npu_rms_norm, npu_add_rms_norm, npu_rotary_mul, ...).

T tokens, H hidden, N heads, D head width. All of it is computed in fp32 and rounded once, unless a docstring says more.
"""

import torch

from tests.npu.emulator.registry import (
    FLOATS,
    kernel,
    require,
    require_contiguous,
    require_dtype,
    require_not_empty,
    require_same_dtype,
    require_shape,
)

ROTARY_WIDTHS = (64, 128)


def rms_norm(x: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    dims = tuple(range(-gamma.dim(), 0))
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(dims, keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(x.dtype), rstd


def _require_gamma(x: torch.Tensor, gamma: torch.Tensor) -> None:
    tail = tuple(x.shape[x.dim() - gamma.dim() :])
    fits = 0 < gamma.dim() <= x.dim() and tuple(gamma.shape) == tail
    require(fits, f"gamma {list(gamma.shape)} is not the last dimensions of x {list(x.shape)}")


@kernel("npu_rms_norm")
def npu_rms_norm(input: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, rstd fp32): y = x * rsqrt(mean(x^2) + epsilon) * gamma over gamma's dimensions, rounded after gamma."""
    require_dtype("input", input, FLOATS)
    require(2 <= input.dim() <= 8, f"input {list(input.shape)}: 2 to 8 dimensions")
    fits = gamma.dtype == input.dtype or (gamma.dtype == torch.float32 and input.dtype != torch.float32)
    require(fits, f"gamma is {gamma.dtype}; for {input.dtype} allowed: {input.dtype}, torch.float32")
    _require_gamma(input, gamma)
    return rms_norm(input, gamma, epsilon)


@kernel("npu_add_rms_norm")
def npu_add_rms_norm(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, rstd fp32, x): x = x1 + x2 rounded to their dtype, y = rms_norm(x) * gamma."""
    require_dtype("x1", x1, FLOATS)
    require_same_dtype(x1=x1, x2=x2, gamma=gamma)
    require_shape("x2", x2, *x1.shape)
    require_not_empty(x1=x1, gamma=gamma)
    _require_gamma(x1, gamma)
    x = x1 + x2
    y, rstd = rms_norm(x, gamma, epsilon)
    return y, rstd, x


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _rotate_pairs(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)


@kernel("npu_apply_rotary_pos_emb")
def npu_apply_rotary_pos_emb(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: str, rotary_mode: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates query and key in place and returns them; cos and sin have one head: [T, 1, D] or [B, S, 1, D]."""
    require(layout in ("BSND", "TND"), f"layout '{layout}': BSND and TND on A2 and A3")
    require(rotary_mode == "half", f"rotary_mode '{rotary_mode}': half on A2 and A3")
    dims = len(layout)
    for name, tensor in (("query", query), ("key", key), ("cos", cos), ("sin", sin)):
        require_dtype(name, tensor, FLOATS)
        require(tensor.dim() == dims, f"{name} {list(tensor.shape)}: {layout} has {dims} dimensions")
    require_same_dtype(query=query, key=key, cos=cos, sin=sin)
    require_not_empty(query=query, key=key, cos=cos, sin=sin)
    width = query.shape[-1]
    require(width in ROTARY_WIDTHS, f"head width {width}: allowed are {ROTARY_WIDTHS}")
    require_shape("key", key, *query.shape[:-2], key.shape[-2], width)
    for name, table in (("cos", cos), ("sin", sin)):
        require_shape(name, table, *query.shape[:-2], 1, width)
    for tensor in (query, key):
        wide = tensor.float()
        tensor.copy_(wide * cos.float() + rotate_half(wide) * sin.float())
    return query, key


@kernel("npu_rotary_mul")
def npu_rotary_mul(input: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, rotary_mode: str) -> torch.Tensor:
    """x * r1 + rotate(x) * r2, a new tensor; r1 and r2 may have size 1 where x has heads or a batch."""
    require_dtype("input", input, FLOATS)
    require_same_dtype(input=input, r1=r1, r2=r2)
    require(rotary_mode in ("half", "interleave"), f"rotary_mode '{rotary_mode}': half or interleave")
    require(input.dim() in (3, 4), f"input {list(input.shape)}: TND, or four dimensions")
    require_not_empty(input=input)
    width = input.shape[-1]
    require(width % 2 == 0 and width < 896, f"head width {width}: even and less than 896")
    require_shape("r2", r2, *r1.shape)
    fits = r1.dim() == input.dim() and r1.shape[-1] == width
    fits = fits and all(have in (1, want) for have, want in zip(r1.shape, input.shape, strict=True))
    require(fits, f"r1 {list(r1.shape)} does not fit input {list(input.shape)}")
    require(any(have == want for have, want in zip(r1.shape[:-1], input.shape[:-1], strict=True)), "r1 is one row")
    wide = input.float()
    rotated = rotate_half(wide) if rotary_mode == "half" else _rotate_pairs(wide)
    return (wide * r1.float() + rotated * r2.float()).to(input.dtype)


@kernel("npu_swiglu")
def npu_swiglu(input: torch.Tensor, dim: int) -> torch.Tensor:
    """silu(a) * b, where a (the gate) is the first half of `dim` and b the second."""
    require_dtype("input", input, FLOATS)
    require_contiguous(input=input)
    require(-input.dim() <= dim < input.dim(), f"dim {dim} of {list(input.shape)}")
    require(input.shape[dim] % 2 == 0, f"size {input.shape[dim]} of dimension {dim} is odd")
    gate, up = input.float().chunk(2, dim)
    return (torch.nn.functional.silu(gate) * up).to(input.dtype)
