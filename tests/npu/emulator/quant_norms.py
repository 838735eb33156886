# SPDX-License-Identifier: Apache-2.0
"""Residual add, RMSNorm and quantisation in one (op-plugin docs: npu_add_rms_norm_quant, ..._dynamic_quant).

The sum is normalised in fp32 before it is rounded, unlike npu_add_rms_norm, whose golden rounds first.
"""

import torch

from tests.npu.emulator.quant import dtype_of, quantise_rows
from tests.npu.emulator.registry import (
    HALVES,
    kernel,
    poison,
    require,
    require_dtype,
    require_not_empty,
    require_same_dtype,
    require_shape,
)

# dtype of x -> dtype of scales, dtype of zero points
STATIC_DTYPES = {torch.float16: (torch.float32, torch.int32), torch.bfloat16: (torch.bfloat16, torch.bfloat16)}


def _normalised(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor | None, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x1 + x2 rounded to their dtype, its RMSNorm over gamma's dimensions plus beta in fp32)."""
    require_dtype("x1", x1, HALVES)
    require_shape("x2", x2, *x1.shape)
    require_same_dtype(x1=x1, x2=x2, gamma=gamma)
    require_not_empty(x1=x1, gamma=gamma)
    tail = tuple(x1.shape[x1.dim() - gamma.dim() :])
    require(tuple(gamma.shape) == tail, f"gamma {list(gamma.shape)} is not the last dimensions of x1 {list(x1.shape)}")
    wide = x1.float() + x2.float()
    dims = tuple(range(-gamma.dim(), 0))
    y = wide * torch.rsqrt(wide.square().mean(dims, keepdim=True) + epsilon) * gamma.float()
    if beta is not None:
        require_same_dtype(gamma=gamma, beta=beta)
        require_shape("beta", beta, *gamma.shape)
        y = y + beta.float()
    return wide.to(x1.dtype), y


@kernel("npu_add_rms_norm_quant")
def npu_add_rms_norm_quant(
    x1: torch.Tensor,
    x2: torch.Tensor,
    gamma: torch.Tensor,
    scales1: torch.Tensor,
    zero_points1: torch.Tensor | None,
    beta: torch.Tensor | None,
    scales2: torch.Tensor | None,
    zero_points2: torch.Tensor | None,
    axis: int,
    epsilon: float,
    div_mode: bool,
    dst_type: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y1 int8, y2 int8, x = x1 + x2): y_i = round(y / scales_i + zero_points_i), y = rms_norm(x) * gamma + beta.

    div_mode=False multiplies by the scales. Scales and zero points have gamma's shape; y2 is undefined without scales2.
    """
    require(1 <= x1.dim() <= 8, f"x1 {list(x1.shape)}: 1 to 8 dimensions")
    require(axis == -1, f"axis {axis}: only -1")
    require(dtype_of(dst_type, torch.int8) == torch.int8, f"dst_type {dst_type}: only int8 on A2 and A3")
    x, y = _normalised(x1, x2, gamma, beta, epsilon)
    of_scales, of_points = STATIC_DTYPES[x1.dtype]
    outputs = []
    for index, scales, points in ((1, scales1, zero_points1), (2, scales2, zero_points2)):
        if scales is None:
            require(points is None, f"zero_points{index} without scales{index}")
            outputs.append(poison(x1.shape, torch.int8))
            continue
        require_dtype(f"scales{index} of {x1.dtype} x1", scales, (of_scales,))
        require_shape(f"scales{index}", scales, *gamma.shape)
        require(not div_mode or bool((scales != 0).all()), f"scales{index} has a zero, by which div_mode divides")
        wide = y / scales.float() if div_mode else y * scales.float()
        if points is not None:
            require_dtype(f"zero_points{index} of {x1.dtype} x1", points, (of_points,))
            require_shape(f"zero_points{index}", points, *gamma.shape)
            wide = wide + points.float()
        outputs.append(wide.round().clamp(-128, 127).to(torch.int8))
    return outputs[0], outputs[1], x


@kernel("npu_add_rms_norm_dynamic_quant")
def npu_add_rms_norm_dynamic_quant(
    x1: torch.Tensor,
    x2: torch.Tensor,
    gamma: torch.Tensor,
    smooth_scale1: torch.Tensor | None,
    smooth_scale2: torch.Tensor | None,
    beta: torch.Tensor | None,
    epsilon: float,
    output_mask: list[bool] | None,
    y_dtype: int | torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y1 int8, y2 int8, x = x1 + x2, scale1 fp32, scale2 fp32) of rms_norm(x) * gamma + beta, times smooth_scale_i.

    Without output_mask y1 is made, and y2 if both smooth scales are given. An output not made has one undefined value.
    """
    require(2 <= x1.dim() <= 8, f"x1 {list(x1.shape)}: 2 to 8 dimensions")
    require(gamma.dim() == 1, f"gamma {list(gamma.shape)}: one dimension")
    require(dtype_of(y_dtype, torch.int8) == torch.int8, f"y_dtype {y_dtype}: the emulator has int8")
    smooth = (smooth_scale1, smooth_scale2)
    # versions before 2.13 have the default [], which is not the bool[2] of their schema
    require(output_mask is None or len(output_mask) == 2, f"output_mask {output_mask}: give two booleans")
    if output_mask is None:
        both = smooth_scale1 is not None and smooth_scale2 is not None
        require(both or smooth_scale2 is None, "smooth_scale2 without smooth_scale1 or output_mask")
        made = [True, both]
    else:
        made = output_mask
        require(any(made), "output_mask leaves out both outputs")
        for index, (scales, wanted) in enumerate(zip(smooth, made, strict=True), start=1):
            require(scales is None or wanted, f"smooth_scale{index} given, output_mask leaves its output out")
    x, y = _normalised(x1, x2, gamma, beta, epsilon)
    values, row_scales = [], []
    for index, (scales, wanted) in enumerate(zip(smooth, made, strict=True), start=1):
        wide = y
        if scales is not None:
            require_same_dtype(x1=x1, **{f"smooth_scale{index}": scales})
            require_shape(f"smooth_scale{index}", scales, x1.shape[-1])
            wide = y * scales.float()
        if wanted:
            value, scale = quantise_rows(wide)
        else:
            value, scale = poison((), torch.int8), poison((), torch.float32)
        values.append(value)
        row_scales.append(scale)
    return values[0], values[1], x, row_scales[0], row_scales[1]
