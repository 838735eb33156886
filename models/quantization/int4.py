# SPDX-License-Identifier: Apache-2.0
"""4-bit weights with float activations (W4A16): AWQ, GPTQ, and compressed-tensors' pack-quantized.

All become an Int4Weight. Its words are packed along K, as compressed-tensors' are; the others are packed again when
they are loaded.
"""

from collections.abc import Callable
from functools import partial

import torch

from models.quantization.format import SCALE_DTYPES, Check, Component, Format
from ops.int4 import PER_WORD, pack_int4, unpack_int4
from ops.weight import Int4Weight


def unpack_columns(words: torch.Tensor, is_awq: bool = False) -> torch.Tensor:
    """Unpacks words that hold eight output columns: int32 [K, N / 8] -> uint8 [N, K].

    AWQ's hold the four even columns in the lower half and the odd ones in the upper half.
    """
    values = unpack_int4(words)
    if is_awq:
        values = values.unflatten(-1, (-1, 2, PER_WORD // 2)).transpose(-1, -2).flatten(-3)
    return values.t()


def unpack_rows(words: torch.Tensor) -> torch.Tensor:
    """Unpacks words that hold eight values along the first dimension: int32 [N / 8, G] -> uint8 [N, G]."""
    return unpack_int4(words.t()).t()


def repack_awq(words: torch.Tensor) -> torch.Tensor:
    """AWQ's qweight int32 [K, N / 8] -> int32 [N, K / 8]."""
    return pack_int4(unpack_columns(words, is_awq=True))


def awq_zeros(words: torch.Tensor) -> torch.Tensor:
    return unpack_columns(words, is_awq=True)


def plus_one(words: torch.Tensor) -> torch.Tensor:
    """GPTQ's zero points, which are stored less one: int32 [K / group_size, N / 8] -> uint8 [N, K / group_size]."""
    return (unpack_columns(words) + 1) & 15


def awq(module: str, group_size: int, has_zeros: bool) -> Format:
    """AutoAWQ's GEMM layout: qweight [K, N / 8], eight columns interleaved in a word; zero points the same way."""
    components = [
        Component(
            name=f"{module}.qweight",
            field="qweight",
            dtypes=("I32",),
            axes=(1, 0),
            span=(1, PER_WORD),
            packed=0,
            unit=(1, PER_WORD),
            dtype=torch.int32,
            decode=repack_awq,
        ),
        scales_by_group(f"{module}.scales", group_size),
    ]
    if has_zeros:
        components.append(zeros_by_group(f"{module}.qzeros", group_size, awq_zeros))
    name = f"AWQ, groups of {group_size}" + ("" if has_zeros else ", no zero points")
    return Format(name=name, weight=Int4Weight, components=tuple(components))


def gptq(module: str, group_size: int, columns: int, zeros_less_one: bool, has_g_idx: bool) -> Format:
    """GPTQ's layout: qweight [K / 8, N], zero points [K / group_size, N / 8]; `columns`: K.

    zeros_less_one: of checkpoint_format "gptq", the usual one; "gptq_v2" stores them as they are.
    """
    components = (
        Component(
            name=f"{module}.qweight",
            field="qweight",
            dtypes=("I32",),
            axes=(1, 0),
            span=(PER_WORD, 1),
            packed=1,
            unit=(1, PER_WORD),
            dtype=torch.int32,
            decode=torch.t,
        ),
        scales_by_group(f"{module}.scales", group_size),
        zeros_by_group(f"{module}.qzeros", group_size, plus_one if zeros_less_one else unpack_columns),
    )
    g_idx = Check(
        name=f"{module}.g_idx",
        dtypes=("I32", "I64"),
        shapes=((columns,),),
        accepts=partial(in_order, group_size=group_size),
        refusal="the groups are not in the order of the columns: GPTQ with act-order (desc_act) is not supported",
    )
    return Format(
        name=f"GPTQ, groups of {group_size}",
        weight=Int4Weight,
        components=components,
        checks=(g_idx,) if has_g_idx else (),
    )


def in_order(g_idx: torch.Tensor, group_size: int) -> bool:
    """Whether the group of each column is the one that it has without act-order."""
    return torch.equal(g_idx.long(), torch.arange(len(g_idx), device=g_idx.device) // group_size)


def scales_by_group(name: str, group_size: int) -> Component:
    """Scales [K / group_size, N]."""
    return Component(name=name, field="scales", dtypes=SCALE_DTYPES, axes=(1, 0), span=(group_size, 1), decode=torch.t)


def zeros_by_group(name: str, group_size: int, decode: Callable[[torch.Tensor], torch.Tensor]) -> Component:
    """Zero points [K / group_size, N / 8]."""
    return Component(
        name=name,
        field="zeros",
        dtypes=("I32",),
        axes=(1, 0),
        span=(group_size, PER_WORD),
        packed=0,
        dtype=torch.uint8,
        decode=decode,
    )


def pack_quantized(module: str, shape: tuple[int, ...], group_size: int, has_zeros: bool) -> Format:
    """compressed-tensors' pack-quantized: weight_packed [N, K / 8], zero points [N / 8, K / group_size]."""
    components = [
        Component(
            name=f"{module}.weight_packed",
            field="qweight",
            dtypes=("I32",),
            span=(1, PER_WORD),
            packed=1,
            unit=(1, PER_WORD),
            dtype=torch.int32,
        ),
        Component(name=f"{module}.weight_scale", field="scales", dtypes=SCALE_DTYPES, span=(1, group_size)),
    ]
    if has_zeros:
        components.append(
            Component(
                name=f"{module}.weight_zero_point",
                field="zeros",
                dtypes=("I32",),
                span=(PER_WORD, group_size),
                packed=0,
                dtype=torch.uint8,
                decode=unpack_rows,
            )
        )
    stored_shape = Check(
        name=f"{module}.weight_shape",
        dtypes=("I64", "I32"),
        shapes=((2,),),
        accepts=lambda stored: tuple(stored.tolist()) == shape,
        refusal=f"must hold {list(shape)}",
    )
    kind = "asymmetric" if has_zeros else "symmetric"
    return Format(
        name=f"compressed-tensors W4A16, groups of {group_size}, {kind}",
        weight=Int4Weight,
        components=tuple(components),
        checks=(stored_shape,),
    )


def pack_quantized_tensors(module: str, weight: Int4Weight) -> dict[str, torch.Tensor]:
    """Encodes a weight [N, K] as `pack_quantized` reads it: stored tensors by name."""
    stored = {
        "weight_packed": weight.qweight,
        "weight_scale": weight.scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    if weight.zeros is not None:
        stored["weight_zero_point"] = pack_rows(weight.zeros)
    return {f"{module}.{suffix}": tensor for suffix, tensor in stored.items()}


def pack_rows(values: torch.Tensor) -> torch.Tensor:
    """Packs eight values along the first dimension to a word: uint8 [N, G] -> int32 [ceil(N / 8), G]."""
    rows = torch.nn.functional.pad(values.t(), (0, -values.shape[0] % PER_WORD))
    return pack_int4(rows.clone(memory_format=torch.contiguous_format)).t().contiguous()
