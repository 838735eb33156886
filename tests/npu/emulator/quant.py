# SPDX-License-Identifier: Apache-2.0
"""Quantisation of tensors to int8 and packed int4 (op-plugin docs: npu_dynamic_quant, npu_quantize, ...int4pack)."""

import torch

from tests.npu.emulator.registry import (
    FLOATS,
    HALVES,
    kernel,
    require,
    require_contiguous,
    require_dtype,
    require_shape,
)

# the values that torch passes where a schema takes a dtype as an int
DTYPES = {
    1: torch.int8,
    3: torch.int32,
    5: torch.float16,
    6: torch.float32,
    12: torch.qint8,
    13: torch.quint8,
    14: torch.qint32,
    15: torch.bfloat16,
    16: torch.quint4x2,
}
QUANTISED = {  # dtype that npu_quantize is asked for -> dtype and limits of its output
    torch.qint8: (torch.int8, -128, 127),
    torch.quint8: (torch.uint8, 0, 255),
    torch.qint32: (torch.int32, -(2**31), 2**31 - 1),
    torch.int32: (torch.int32, -(2**31), 2**31 - 1),
    torch.quint4x2: (torch.int8, -8, 7),
}
INT_POINTS = (torch.int8, torch.uint8, torch.int32)


def dtype_of(code: int | torch.dtype | None, default: torch.dtype) -> torch.dtype:
    """The dtype that an `int?` or `ScalarType?` argument names; ValueError for one no emulated operation gives."""
    if code is None or isinstance(code, torch.dtype):
        return code or default
    require(code in DTYPES, f"dtype {code}: allowed are {DTYPES}")
    return DTYPES[code]


def int8_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The exact int32 product of int8 matrices, as float64."""
    return x.double() @ weight.double()


def quantise_rows(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(round(x / scale) int8, scale fp32 = max |x| of the row / 127); a row of zeros gives zeros and scale 0."""
    scale = wide.abs().amax(-1) / 127
    return (wide / scale[..., None]).nan_to_num(0).round().to(torch.int8), scale


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """Integers [..., N] in [-8, 7] to int32 [..., N / 8]: the first column in the lowest four bits."""
    words = ((values.long().unflatten(-1, (-1, 8)) & 15) << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """int32 [..., N / 8] to int8 [..., N] in [-8, 7], the inverse of `pack_int4`."""
    nibbles = (packed.unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15
    return ((nibbles ^ 8) - 8).flatten(-2).to(torch.int8)


@kernel("npu_dynamic_quant")
def npu_dynamic_quant(
    input: torch.Tensor, smooth_scales: torch.Tensor | None, dst_type: int | None, quant_mode: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(round(x * smooth / scale) int8, scale fp32 = max |x * smooth| of the row / 127) of fp16 or bf16 [..., H]."""
    require_dtype("input", input, HALVES)
    require(input.dim() >= 2, f"input {list(input.shape)}: at least two dimensions")
    require(quant_mode == "pertoken", f"quant_mode '{quant_mode}': the emulator has pertoken")
    require(dtype_of(dst_type, torch.int8) == torch.int8, f"dst_type {dst_type}: the emulator has int8")
    wide = input.float()
    if smooth_scales is not None:
        require(smooth_scales.dtype == input.dtype, f"smooth_scales is {smooth_scales.dtype}, input {input.dtype}")
        require_shape("smooth_scales", smooth_scales, input.shape[-1])
        wide = wide * smooth_scales.float()
    return quantise_rows(wide)


def _divided(
    x: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None, dtype: torch.dtype, axis: int
) -> torch.Tensor:
    """x / scales + zero_points: 1-D scales of one element, or one for each index of `axis`."""
    require(dtype in (torch.qint8, torch.quint8, torch.qint32, torch.int32), f"dtype {dtype} with div_mode=True")
    require_dtype("scales", scales, (torch.float32, torch.bfloat16))
    if scales.dtype == torch.bfloat16:
        require_dtype("input (its scales are bfloat16)", x, (torch.bfloat16,))
    require(scales.dim() == 1, f"scales {list(scales.shape)}: one dimension")
    shape = [1] * x.dim()
    if len(scales) != 1:
        require(-x.dim() <= axis < x.dim(), f"axis {axis} of {list(x.shape)}")
        require_shape("scales", scales, x.shape[axis])
        shape[axis] = len(scales)
    wide = x.float() / scales.float().view(shape)
    if zero_points is None:
        return wide
    require_dtype("zero_points", zero_points, INT_POINTS if scales.dtype == torch.float32 else (torch.bfloat16,))
    require_shape("zero_points", zero_points, len(scales))
    return wide + zero_points.float().view(shape)


def _multiplied(
    x: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None, dtype: torch.dtype, axis: int
) -> torch.Tensor:
    """x * scales + zero_points along the last axis, or the last but one for axis -2; all three of one dtype."""
    require(dtype in (torch.qint8, torch.quint4x2), f"dtype {dtype} with div_mode=False: qint8 or quint4x2")
    require(-2 <= axis < x.dim(), f"axis {axis} of {list(x.shape)}: -2 or more")
    require(axis != -2 or x.dim() > 1, f"axis -2 of {list(x.shape)}")
    require_dtype("scales", scales, (x.dtype,))
    shape = [1] * x.dim()
    place = -2 if axis == -2 else -1
    size = scales.numel()
    require(size in (1, x.shape[place]), f"scales {list(scales.shape)} for {list(x.shape)}, axis {axis}")
    shape[place] = size
    require(scales.dim() == 1 or list(scales.shape) == shape, f"scales {list(scales.shape)}: [{size}] or {shape}")
    wide = x.float() * scales.float().view(shape)
    if zero_points is None:
        return wide
    require_dtype("zero_points", zero_points, (x.dtype,))
    require_shape("zero_points", zero_points, *scales.shape)
    return wide + zero_points.float().view(shape)


@kernel("npu_quantize")
def npu_quantize(
    input: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None, dtype: int, axis: int, div_mode: bool
) -> torch.Tensor:
    """round(x / scales + zero_points), or round(x * scales + zero_points) for div_mode=False, within dtype's limits.

    quint4x2 (div_mode=False) packs eight int4 of the last axis in an int32. An empty input is allowed.
    """
    require_dtype("input", input, FLOATS)
    require(1 <= input.dim() <= 8, f"input {list(input.shape)}: 1 to 8 dimensions")
    wanted = dtype_of(dtype, torch.qint8)
    wide = (_divided if div_mode else _multiplied)(input, scales, zero_points, wanted, axis)
    made, lowest, highest = QUANTISED[wanted]
    values = wide.double().round().clamp(lowest, highest).to(made)
    if wanted != torch.quint4x2:
        return values
    require(values.shape[-1] % 8 == 0, f"input {list(input.shape)}: the last dimension is no multiple of 8")
    return pack_int4(values)


@kernel("npu_convert_weight_to_int4pack")
def npu_convert_weight_to_int4pack(weight: torch.Tensor) -> torch.Tensor:
    """int32 [K, N] of values in [-8, 7] to int32 [K, N / 8]; a third dimension would lose its experts."""
    require_dtype("weight", weight, (torch.int32,))
    require(weight.dim() == 2, f"weight {list(weight.shape)}: two dimensions")
    require_contiguous(weight=weight)
    require(weight.shape[1] % 8 == 0, f"weight {list(weight.shape)}: the last dimension is no multiple of 8")
    require(bool(((weight >= -8) & (weight <= 7)).all()), "weight leaves [-8, 7]")
    return pack_int4(weight)
