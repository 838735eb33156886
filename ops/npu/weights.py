# SPDX-License-Identifier: Apache-2.0
"""Weights in the layouts of torch_npu's matmuls, and their conversion from those of checkpoints.

N output width, K input width, E experts, G groups along K. All are transposed, [K, N] or [E, K, N], as the operations
take them. A FRACTAL_NZ tensor must not be sliced or viewed.
"""

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from ops.int4 import PER_WORD, pack_int4, unpack_int4
from ops.npu.calls import npu
from ops.weight import SYMMETRIC_ZERO, Int4Weight, Int8StaticWeight, Int8Weight, Weight

FRACTAL_NZ = 29  # ACL format id of the tiled layout that the cube units read directly
TILE_ROWS = 16
TILE_BYTES = 32  # of a row of a tile
MAX_INNER_SIZE = 65535  # maximum of K and N
MAX_SWIGLU_WIDTH = 10240  # maximum of N where SwiGLU is fused with the matmul
SWIGLU_WIDTHS = 128  # whose multiples N is there: vendor and others use it with an expert width of 64 or its multiples
GROUP_SIZES = 32  # of whose multiples npu_weight_quant_batchmatmul takes groups


@dataclass(frozen=True)
class Int8Linear(Weight):
    """W8A8 weight of a linear layer; activations are quantised per token."""

    format_name = Int8Weight.format_name
    data: Tensor  # int8 [K, N], FRACTAL_NZ where no padding is needed
    scales: Tensor  # float32 [N]

    @property
    def shape(self) -> tuple[int, ...]:
        return transposed_shape(self.data)


@dataclass(frozen=True)
class Int8Experts(Weight):
    """W8A8 weights of experts; activations are quantised per token, over the columns of this rank."""

    format_name = Int8Weight.format_name
    data: Tensor  # int8 [E, K, N], FRACTAL_NZ where no padding is needed
    scales: Tensor  # [E, N]: bfloat16 for bfloat16 output, float32 for float16
    swiglu_scales: Tensor | None  # float32 [E, N], where SwiGLU can be fused with the matmul
    dtype: torch.dtype  # of the output

    @property
    def shape(self) -> tuple[int, ...]:
        return transposed_shape(self.data)


@dataclass(frozen=True)
class Int8StaticLinear(Weight):
    """W8A8 weight of a linear layer with one scale and offset for all activations.

    The fused norm takes both per column, and for bfloat16 in bfloat16, to which input_scale is rounded here, too.
    """

    format_name = Int8StaticWeight.format_name
    data: Tensor  # int8 [K, N], FRACTAL_NZ where no padding is needed
    scales: Tensor  # float32 [N]
    quant_bias: Tensor  # int32 [N]
    input_scale: Tensor  # float32 [1]
    input_offset: Tensor  # int32 [1]
    column_scales: Tensor  # [K]: bfloat16 for bfloat16 activations, float32 for float16
    column_offsets: Tensor  # [K]: bfloat16 or int32
    input_bias: Tensor | None  # [K], in the activations' dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return transposed_shape(self.data)


@dataclass(frozen=True)
class Int4Matrix(Weight):
    """W4A16 weight of a linear layer, or of stacked experts: w = (q + offset) * scale, with q from -8 to 7.

    In the ND format: FRACTAL_NZ has no zero points per group.
    """

    format_name = Int4Weight.format_name
    qweight: Tensor  # int32 [K, N / 8] or [E, K, N / 8], the first column in the lowest bits
    scales: Tensor  # [G, N] or [E, G, N], in the activations' dtype
    offsets: Tensor  # likewise

    @property
    def shape(self) -> tuple[int, ...]:
        *others, k, words = self.qweight.shape
        return (*others, words * PER_WORD, k)

    @property
    def group_size(self) -> int:
        return self.qweight.shape[-2] // self.scales.shape[-2]


Quantized = TypeVar("Quantized", bound=Weight)
Int8Layout = TypeVar("Int8Layout", Int8Linear, Int8Experts, Int8StaticLinear)


def transposed_shape(data: Tensor) -> tuple[int, ...]:
    *experts, k, n = data.shape
    return (*experts, n, k)


def refusal(weight: Weight) -> str | None:
    """Returns why the operations do not take a quantised weight, None if they do."""
    n, k = weight.shape[-2:]
    if max(n, k) > MAX_INNER_SIZE:
        return f"[{n}, {k}] exceeds {MAX_INNER_SIZE}"
    if isinstance(weight, Int4Weight):
        if n % PER_WORD:
            return f"{n} rows are no multiple of {PER_WORD}"
        size = weight.group_size
        if len(weight.shape) == 2 and size % GROUP_SIZES and size < k:
            return f"groups of {size} columns are no multiple of {GROUP_SIZES}"
    return None


def is_tiled_exactly(data: Tensor) -> bool:
    """Whether [..., K, N] in FRACTAL_NZ needs no padding, and is not too large for it."""
    k, n = data.shape[-2:]
    return max(k, n) <= MAX_INNER_SIZE and k % TILE_ROWS == 0 and n % (TILE_BYTES // data.element_size()) == 0


def cast_to_nz(data: Tensor) -> Tensor:
    """Copies a contiguous [..., K, N] to FRACTAL_NZ; RuntimeError where torch_npu silently leaves the format."""
    data = npu.npu_format_cast(data, FRACTAL_NZ)
    if data.device.type == "npu" and npu.get_npu_format(data) != FRACTAL_NZ:
        raise RuntimeError("npu_format_cast did not change a weight's format: is allow_internal_format disabled?")
    return data


def moved(weight: Quantized, device: torch.device | str) -> Quantized:
    """Copies all tensors of a weight to a device."""
    return replace(weight, **{name: tensor.to(device) for name, tensor in weight.tensors.items()})  # type: ignore[type-var]


def tiled(weight: Int8Layout) -> Int8Layout:
    """Casts the data of a weight to FRACTAL_NZ where that needs no padding."""
    return replace(weight, data=cast_to_nz(weight.data)) if is_tiled_exactly(weight.data) else weight


def int8_linear(weight: Int8Weight) -> Int8Linear:
    return Int8Linear(weight.data.t().contiguous(), weight.scales[:, 0].float())


def int8_experts(weight: Int8Weight, dtype: torch.dtype, fuses_swiglu: bool) -> Int8Experts:
    """Converts stacked experts for activations of `dtype`; fuses_swiglu: whether this installation can."""
    data, scales = weight.data.transpose(1, 2).contiguous(), weight.scales[..., 0].float()
    width = data.shape[-1]
    fits = is_tiled_exactly(data) and width % SWIGLU_WIDTHS == 0 and width <= MAX_SWIGLU_WIDTH
    output_scales = scales.bfloat16() if dtype is torch.bfloat16 else scales
    return Int8Experts(data, output_scales, scales if fuses_swiglu and fits else None, dtype)


def int8_static_linear(weight: Int8StaticWeight, dtype: torch.dtype) -> Int8StaticLinear:
    """Converts a weight for activations of `dtype`.

    `scales` make up for the rounding of input_scale, so that only the layer's bias, within quant_bias, is 0.2 % off:
    the fused norm then differs less from float32 (0.65 %) than a norm and npu_quantize with the exact scale (0.77 %).
    """
    columns, given = weight.shape[1], weight.input_scale
    rounded = dtype is torch.bfloat16
    input_scale = given.bfloat16().float() if rounded else given
    column_dtypes = (torch.bfloat16, torch.bfloat16) if rounded else (torch.float32, torch.int32)
    return Int8StaticLinear(
        weight.data.t().contiguous(),
        weight.scales[:, 0] * (input_scale / given),
        weight.quant_bias[:, 0].contiguous(),
        input_scale,
        weight.input_offset.int(),
        input_scale.repeat(columns).to(column_dtypes[0]),
        weight.input_offset.repeat(columns).to(column_dtypes[1]),
        None if weight.input_bias is None else weight.input_bias.to(dtype),
    )


def int4_matrix(weight: Int4Weight, dtype: torch.dtype) -> Int4Matrix:
    """Packs a weight along N, one expert at a time to limit memory, for activations of `dtype`."""
    *experts, n, k = weight.shape
    words = weight.qweight.new_empty(*experts, k, n // PER_WORD)
    matrices = weight.qweight.view(-1, n, k // PER_WORD), words.view(-1, k, n // PER_WORD)
    for packed, target in zip(*matrices, strict=True):
        values = unpack_int4(packed) ^ SYMMETRIC_ZERO  # the low four bits of q - 8
        target.copy_(pack_int4(values.t()))
    scales = weight.scales.transpose(-1, -2).contiguous().to(dtype)
    if weight.zeros is None:
        return Int4Matrix(words, scales, torch.zeros_like(scales))  # the grouped matmul needs offsets
    offsets = SYMMETRIC_ZERO - weight.zeros.transpose(-1, -2).contiguous().to(dtype)
    return Int4Matrix(words, scales, offsets)
