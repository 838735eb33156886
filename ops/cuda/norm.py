# SPDX-License-Identifier: Apache-2.0
"""RMSNorm and SwiGLU kernels for any number of tokens."""

from typing import Any

import triton
import triton.language as tl

from ops.cuda.launch import pdl_trigger, pdl_wait


@triton.jit
def add_norm_kernel(
    hidden,  # [T, D]
    residual,  # [T, D] float32; unused without residual
    norm_weight,  # [D]
    normed_output,  # [T, D]
    residual_output,  # [T, D] float32
    D: tl.constexpr,
    BLOCK: tl.constexpr,  # D rounded up to a power of two
    EPS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    """Residual add and RMSNorm. One program per token."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    pdl_trigger(PDL and HAS_RESIDUAL)
    pdl_wait(PDL)
    pdl_trigger(PDL and not HAS_RESIDUAL)  # without a residual it is the first kernel of a step
    x = tl.load(hidden + token * D + d, mask=d < D, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual + token * D + d, mask=d < D, other=0.0)
    tl.store(residual_output + token * D + d, x, mask=d < D)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / D + EPS)
    gain = tl.load(norm_weight + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(normed_output + token * D + d, (x * scale * gain).to(normed_output.dtype.element_ty), mask=d < D)


def add_norm_constants(d: int, eps: float, has_residual: bool, pdl: bool) -> dict[str, Any]:
    """Returns the constexprs of `add_norm_kernel` for hidden size `d`."""
    return {"D": d, "BLOCK": triton.next_power_of_2(d), "EPS": eps, "HAS_RESIDUAL": has_residual, "PDL": pdl}


@triton.jit
def silu_and_mul_kernel(
    gate_up,  # [T, 2F]
    output,  # [T, F]
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """SwiGLU activation. One program per token and BLOCK columns."""
    token = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + token * (2 * F) + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * (2 * F) + F + f, mask=f < F, other=0.0).to(tl.float32)
    tl.store(output + token * F + f, (gate * tl.sigmoid(gate) * up).to(output.dtype.element_ty), mask=f < F)
