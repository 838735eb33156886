# SPDX-License-Identifier: Apache-2.0
"""8-bit weights and activations (W8A8): compressed-tensors' int-quantized, msModelSlim's W8A8_DYNAMIC and W8A8."""

from collections.abc import Callable

import torch

from models.quantization.format import SCALE_DTYPES, Check, Component, Format, Shared
from ops.weight import Int8StaticWeight, Int8Weight


def int8_data(module: str) -> Component:
    return Component(name=f"{module}.weight", field="data", dtypes=("I8",), unit=(1, 1), dtype=torch.int8)


def by_channel(name: str, stored: tuple[int, ...], columns: int) -> Component:
    """Scales by output channel, stored as [N, 1] or [N]; `columns`: K."""
    if len(stored) == 1:
        return Component(name=name, field="scales", dtypes=SCALE_DTYPES, axes=(0,), span=(1,), decode=as_column)
    return Component(name=name, field="scales", dtypes=SCALE_DTYPES, span=(1, columns))


def as_column(stored: torch.Tensor) -> torch.Tensor:
    return stored[:, None]


def w8a8(module: str, shape: tuple[int, ...], scale_shape: tuple[int, ...], has_offset: bool) -> Format:
    """int8 weight [N, K] with weight_scale [N, 1] or [N], and activations quantised per token.

    msModelSlim stores weight_offset beside it, which is zero for symmetric weights.
    """
    return Format(
        name="W8A8, activations per token",
        weight=Int8Weight,
        components=(int8_data(module), by_channel(f"{module}.weight_scale", scale_shape, shape[1])),
        checks=(zero_offset(module, shape[0]),) if has_offset else (),
    )


def zero_offset(module: str, n: int) -> Check:
    return Check(
        name=f"{module}.weight_offset",
        dtypes=SCALE_DTYPES,
        shapes=((n,), (n, 1)),
        accepts=is_zero,
        refusal="asymmetric int8 weights (offsets other than 0) are not supported",
    )


def w8a8_tensors(module: str, weight: Int8Weight) -> dict[str, torch.Tensor]:
    """Encodes a weight [N, K] as `w8a8` reads it: stored tensors by name."""
    return {f"{module}.weight": weight.data, f"{module}.weight_scale": weight.scales}


def is_zero(stored: torch.Tensor) -> bool:
    return not stored.any()


def w8a8_static(
    module: str, shape: tuple[int, ...], norm_bias: str | None, ignored: tuple[str, ...], has_offset: bool
) -> Format:
    """msModelSlim's W8A8: int8 weight [N, K], one scale and offset for all activations.

    deq_scale [N] is the product of both scales: float32, or int64 with the bits of a float32. quant_bias [N] int32
    corrects the offset and holds the layer's bias. norm_bias: name of the bias of the norm before the layer, if it has
    one; ignored: names of stored tensors that quant_bias and deq_scale make unnecessary.
    """
    n, k = shape
    split = (
        int8_data(module),
        by_row(f"{module}.deq_scale", "scales", ("F32", "I64"), torch.float32, as_scales),
        by_row(f"{module}.quant_bias", "quant_bias", ("I32",), torch.int32, as_column, added_once=True),
    )
    shared = [
        scalar(f"{module}.input_scale", "input_scale", is_scale, "must be finite and more than 0"),
        scalar(f"{module}.input_offset", "input_offset", is_int8, "must be a whole number from -128 to 127"),
    ]
    if norm_bias is not None:
        shared.append(
            Shared(name=norm_bias, field="input_bias", dtypes=SCALE_DTYPES, shapes=((k,),), dtype=torch.float32)
        )
    checks = [
        Check(name=name, dtypes=SCALE_DTYPES, shapes=((n,), (n, 1)), accepts=is_anything, refusal="")
        for name in ignored
    ]
    if has_offset:
        checks.append(zero_offset(module, n))
    return Format(
        name="W8A8, static activations",
        weight=Int8StaticWeight,
        components=split,
        shared=tuple(shared),
        checks=tuple(checks),
    )


def by_row(
    name: str,
    field: str,
    dtypes: tuple[str, ...],
    dtype: torch.dtype,
    decode: Callable[[torch.Tensor], torch.Tensor],
    added_once: bool = False,
) -> Component:
    """Values [N] by output channel."""
    return Component(
        name=name,
        field=field,
        dtypes=dtypes,
        axes=(0,),
        span=(1,),
        dtype=dtype,
        decode=decode,
        added_once=added_once,
    )


def scalar(name: str, field: str, accepts: Callable[[torch.Tensor], bool], refusal: str) -> Shared:
    return Shared(
        name=name,
        field=field,
        dtypes=(*SCALE_DTYPES, "I8", "I32"),
        shapes=((1,), ()),
        dtype=torch.float32,
        accepts=accepts,
        refusal=refusal,
    )


def is_scale(values: torch.Tensor) -> bool:
    return bool((values > 0).all() and values.isfinite().all())


def is_int8(values: torch.Tensor) -> bool:
    return bool((values == values.round()).all() and (values.abs() <= 128).all() and (values < 128).all())


def as_scales(stored: torch.Tensor) -> torch.Tensor:
    """Scales [N] of float32, or of int64 whose lower half holds a float32 -> [N, 1]."""
    is_bits = stored.dtype is torch.int64
    return (stored.to(torch.int32).view(torch.float32) if is_bits else stored)[:, None]


def is_anything(_: torch.Tensor) -> bool:
    return True
