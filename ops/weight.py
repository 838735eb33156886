# SPDX-License-Identifier: Apache-2.0
"""Weight types, one per number format; operations dispatch on the type.

N output width, K input width, E experts; a dimension E comes first in the tensors of stacked experts. Quantised weights
hold one scale for a block of N / scales.shape[-2] rows and K / scales.shape[-1] columns.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch

from ops.comm import Group
from ops.int4 import PER_WORD, unpack_int4

DENSE = "dense"  # format_name of unquantised weights
SYMMETRIC_ZERO = 8  # of 4-bit weights without zero points


class Weight:
    """Matrix of a linear layer, or the stacked matrices of experts. `shape` is [N, K] or [E, N, K] in every format."""

    format_name: ClassVar[str]

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Tensors by field name, without absent ones."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def __getitem__(self, experts: Any) -> "Weight":
        """Selects experts: an index, a slice or a tensor of ids."""
        return replace(self, **{name: tensor[experts] for name, tensor in self.tensors.items()})  # type: ignore[type-var]

    def with_columns_over(self, group: Group) -> "Weight":
        """Tells the weight that its columns, and those of its input, are sharded over `group`."""
        return self


@dataclass(frozen=True)
class DenseWeight(Weight):
    """Unquantised weight [N, K], or stacked experts [E, N, K], in the model's dtype."""

    format_name = DENSE
    data: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)


@dataclass(frozen=True)
class TransposedWeight(Weight):
    """Weight [K, N], or stacked experts [E, K, N], possibly in a tiled device layout, which must not be sliced."""

    format_name = DENSE
    data: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        *experts, k, n = self.data.shape
        return (*experts, n, k)


@dataclass(frozen=True)
class Int8Weight(Weight):
    """W8A8: symmetric int8 weights with a scale per output channel; activations are quantised per token as they come.

    y[n] = (sum over k of x_int8[k] * data[n, k], exact) * scales[n] * x_scale, with x_scale = max |x| / 127.
    """

    format_name = "w8a8"
    data: torch.Tensor  # int8 [N, K]
    scales: torch.Tensor  # floating point [N, 1]
    column_group: Group | None = None  # whose ranks hold the other columns: max |x| is over all of them

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    def with_columns_over(self, group: Group) -> Weight:
        return replace(self, column_group=group) if group.size > 1 else self


@dataclass(frozen=True)
class Int8StaticWeight(Weight):
    """W8A8 with one scale and offset for all activations, of linear layers only.

    y[n] = (sum over k of x_int8[k] * data[n, k] + quant_bias[n], exact) * scales[n], with
    x_int8 = round((x + input_bias) / input_scale) + input_offset.
    """

    format_name = "w8a8-static"
    data: torch.Tensor  # int8 [N, K]
    scales: torch.Tensor  # float32 [N, 1]: weight scale * input_scale
    quant_bias: torch.Tensor  # int32 [N, 1]; corrects the offset and holds the bias of the layer
    input_scale: torch.Tensor  # float32 [1]
    input_offset: torch.Tensor  # float32 [1], a whole number
    input_bias: torch.Tensor | None = None  # [K], of the norm before the layer

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)


@dataclass(frozen=True)
class Int4Weight(Weight):
    """W4A16: groups of 4-bit integers along K, w = (q - zero) * scale."""

    format_name = "w4a16"
    qweight: torch.Tensor  # int32 [N, K / 8], packed as by ops.int4
    scales: torch.Tensor  # floating point [N, K / group_size]
    zeros: torch.Tensor | None = None  # uint8 [N, K / group_size]; None: SYMMETRIC_ZERO

    @property
    def shape(self) -> tuple[int, ...]:
        *others, words = self.qweight.shape
        return (*others, words * PER_WORD)

    @property
    def group_size(self) -> int:
        return self.shape[-1] // self.scales.shape[-1]


@dataclass(frozen=True)
class Fp8Weight(Weight):
    """float8 (e4m3) weights with a scale per block; activations stay in the model's dtype."""

    format_name = "fp8"
    data: torch.Tensor  # float8_e4m3fn [N, K]
    scales: torch.Tensor  # floating point [N / block rows, K / block columns]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)


def dequantize(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """Computes the matrix [N, K] or matrices [E, N, K] that a weight stands for, in float32, then rounded to `dtype`.

    TypeError for a format without such a matrix.
    """
    match weight:
        case DenseWeight():
            return weight.data.to(dtype)
        case Int8Weight() | Fp8Weight():
            blocks = in_blocks(weight.data.float(), weight.scales)
        case Int4Weight(zeros=None):
            blocks = in_blocks(unpack_int4(weight.qweight).float(), weight.scales).sub_(SYMMETRIC_ZERO)
        case Int4Weight(zeros=zeros):
            blocks = in_blocks(unpack_int4(weight.qweight).float(), weight.scales).sub_(beside_blocks(zeros))
        case _:
            raise TypeError(f"{type(weight).__name__} cannot be dequantised")
    return blocks.mul_(beside_blocks(weight.scales)).view(weight.shape).to(dtype)


def in_blocks(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Views values by the blocks of their scales: [..., N, K] -> [..., N / rows, rows, K / columns, columns]."""
    *others, rows, columns = values.shape
    n_blocks, k_blocks = scales.shape[-2:]
    return values.view(*others, n_blocks, rows // n_blocks, k_blocks, columns // k_blocks)


def beside_blocks(scales: torch.Tensor) -> torch.Tensor:
    """Views scales [..., N / rows, K / columns] for broadcasting over `in_blocks`."""
    return scales[..., :, None, :, None]
