# SPDX-License-Identifier: Apache-2.0
"""Matmuls with quantised weights in plain torch: the oracle for every format."""

import torch

from ops.weight import Fp8Weight, Int4Weight, Int8StaticWeight, Int8Weight, Weight, dequantize

INT8_MAX = 127


def quantized_matmul(rows: torch.Tensor, weight: Weight) -> torch.Tensor:
    """Matmul with a quantised weight: [T, K] x [N, K] -> [T, N], or [B, T, K] x [B, N, K] -> [B, T, N].

    Weight-only formats are dequantised to the dtype of the rows. Integer formats follow their documented arithmetic:
    the sums of products of int8 are exact, here in float64, where rows that are not finite stay so.
    """
    match weight:
        case Int4Weight() | Fp8Weight():
            return torch.matmul(rows, dequantize(weight, rows.dtype).transpose(-1, -2))
        case Int8Weight():
            values, row_scales = dynamic_int8(rows, weight)
            sums = torch.matmul(values.double(), weight.data.double().transpose(-1, -2)).float()
            return (sums * weight.scales.float().transpose(-1, -2) * row_scales).to(rows.dtype)
        case Int8StaticWeight():
            values = static_int8(rows, weight).double()
            sums = torch.matmul(values, weight.data.double().t()) + weight.quant_bias.double().t()
            return (sums.float() * weight.scales.t()).to(rows.dtype)
    raise unknown_weight(weight)


def dynamic_int8(rows: torch.Tensor, weight: Int8Weight) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds each row [..., K] to whole numbers from -127 to 127: float32 values, and scales [..., 1].

    Where the columns of the weight are sharded, the scale is that of the whole row, so that every layout computes the
    same.
    """
    rows = rows.float()
    largest = rows.abs().amax(-1, keepdim=True)
    if weight.column_group is not None:
        largest = weight.column_group.all_gather(largest[None]).amax(0)
    scales = largest / INT8_MAX
    return (rows / scales.masked_fill(scales == 0, 1.0)).round(), scales


def static_int8(rows: torch.Tensor, weight: Int8StaticWeight) -> torch.Tensor:
    """Rounds rows [T, K] with the scale and offset of the weight: float32 whole numbers from -128 to 127.

    Infinite elements become NaN: saturated, they would pass for numbers.
    """
    rows = rows.float() if weight.input_bias is None else rows.float() + weight.input_bias.float()
    values = ((rows / weight.input_scale).round() + weight.input_offset).clamp(-INT8_MAX - 1, INT8_MAX)
    return values.masked_fill(rows.isinf(), torch.nan)


def unknown_weight(weight: object) -> TypeError:
    return TypeError(f"weights of type {type(weight).__name__} are not supported by this operation")
