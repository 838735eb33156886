# SPDX-License-Identifier: Apache-2.0
"""Decides by its stored tensors which number format a module of a checkpoint has."""

from collections.abc import Mapping
from typing import Protocol

from models.layers.parameter import Source
from models.quantization.format import Format
from models.quantization.fp8 import fp8_blocks
from models.quantization.int4 import awq, gptq, pack_quantized
from models.quantization.int8 import w8a8, w8a8_static
from models.quantization.scheme import Scheme, not_supported
from ops.int4 import PER_WORD

SUFFIX = ".weight"
SUFFIXES = (
    *("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_zero_point", "weight_global_scale"),
    *("weight_shape", "weight_g_idx", "weight"),
    *("weight_scale", "weight_scale_inv", "weight_offset", "input_scale", "deq_scale", "bias"),
)
NORM_BEFORE = {"q_proj": "input_layernorm", "k_proj": "input_layernorm", "v_proj": "input_layernorm"}


class Stored(Protocol):
    """Shape and dtype (safetensors' name) of a tensor in a checkpoint."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...


def format_of(source: Source, found: Mapping[str, Stored], scheme: Scheme) -> Format | None:
    """Returns the format of a logical weight, None if it is stored as a plain tensor (or missing).

    Raises ValueError that names a format which is not supported.
    """
    if len(source.shape) != 2 or not source.name.endswith(SUFFIX):
        refuse_bytes(source, found)
        return None
    module = source.name.removesuffix(SUFFIX)
    stored = {suffix: found[name] for suffix in SUFFIXES if (name := f"{module}.{suffix}") in found}
    if "qweight" in stored:
        return words_format(module, source.shape, stored, scheme)
    if "weight_packed" in stored:
        return packed_format(module, source.shape, stored, scheme)
    for beside, packed in (("qzeros", "qweight"), ("weight_shape", "weight_packed")):
        if beside in stored and "weight" not in stored:
            raise ValueError(f"{module}.{packed} is missing")
    match stored["weight"].dtype if "weight" in stored else None:
        case "I8" if "deq_scale" in stored:
            return static_format(module, source.shape, stored, found)
        case "I8":
            return int8_format(module, source.shape, stored, scheme)
        case "F8_E4M3":
            return fp8_format(module, source.shape, stored, scheme)
    refuse_bytes(source, found)
    return None


def refuse_bytes(source: Source, found: Mapping[str, Stored]) -> None:
    """Raises ValueError for 8-bit tensors of no supported format, such as quantised experts stacked in one tensor."""
    dtype = found[source.name].dtype if source.name in found else ""
    if dtype.startswith("F8") or dtype in ("I8", "U8"):
        raise not_supported(f"{source.name} {list(found[source.name].shape)} of {dtype}")


def words_format(module: str, shape: tuple[int, ...], stored: dict[str, Stored], scheme: Scheme) -> Format:
    """AWQ or GPTQ: both have qweight, packed along different axes."""
    n, k = shape
    size = group_size(module, "scales", k, stored, axis=0)
    found = stored["qweight"].shape
    if found == (k, n // PER_WORD) and n % PER_WORD == 0:
        if scheme.method == "awq" and scheme.has_zeros and "qzeros" not in stored:
            raise ValueError(f"{module}.qzeros is missing, and quantization_config has no zero_point: false")
        return awq(module, size, "qzeros" in stored)
    if found == (k // PER_WORD, n) and k % PER_WORD == 0:
        if scheme.act_order and "g_idx" not in stored:
            raise not_supported(f"{module}: GPTQ with act-order (desc_act: true) without g_idx")
        return gptq(module, size, k, scheme.zeros_less_one, "g_idx" in stored)
    raise not_supported(
        f"{module}.qweight {list(found)}, neither AWQ's [{k}, {n} / 8] nor GPTQ's [{k} / 8, {n}] of 4 bits,"
    )


def packed_format(module: str, shape: tuple[int, ...], stored: dict[str, Stored], scheme: Scheme) -> Format:
    """compressed-tensors' packed integers, of 4 bits only."""
    n, k = shape
    packed = stored["weight_packed"]
    if packed.dtype != "I32" or "weight_global_scale" in stored:  # NVFP4, MXFP4
        raise not_supported(f"{module}.weight_packed of {packed.dtype} (4-bit floating point)")
    if packed.shape != (n, k // PER_WORD) or k % PER_WORD:
        raise not_supported(f"{module}.weight_packed {list(packed.shape)}, not [{n}, {k} / 8] of 4 bits,")
    group = scheme.group(module)
    if "weight_g_idx" in stored or (group is not None and group.act_order):
        raise not_supported(f"{module}: compressed-tensors with act-order (actorder: group)")
    size = group_size(module, "weight_scale", k, stored, axis=1)
    if group is not None and group.group_size and k % group.group_size:
        raise not_supported(f"{module}: {k} columns in groups of {group.group_size}, the last of them partial,")
    if group is not None and group.has_zeros and "weight_zero_point" not in stored:
        raise ValueError(f"{module}.weight_zero_point is missing, and quantization_config has symmetric: false")
    return pack_quantized(module, shape, size, "weight_zero_point" in stored)


def int8_format(module: str, shape: tuple[int, ...], stored: dict[str, Stored], scheme: Scheme) -> Format:
    if "input_scale" in stored:
        raise not_supported(f"{module}.weight of int8 with static activation scales")
    if not scheme.quantizes_activations(module):
        declared = f"quantization by {scheme.method}" if scheme.method else "no quantization_config"
        raise not_supported(f"{module}.weight of int8 with {declared}, not int8 activations too (W8A16),")
    if "weight_scale" not in stored:
        raise ValueError(f"{module}.weight_scale is missing")
    return w8a8(module, shape, stored["weight_scale"].shape, "weight_offset" in stored)


def static_format(
    module: str, shape: tuple[int, ...], stored: dict[str, Stored], found: Mapping[str, Stored]
) -> Format:
    """msModelSlim's static W8A8; the norm before q, k and v may have a bias, which is quantised with their input."""
    if ".experts." in module:
        raise not_supported(f"{module}: experts with static activation scales")
    layer, _, name = module.rpartition(".self_attn.")
    if module.endswith(("mlp.gate", "embed_tokens")):
        raise not_supported(f"{module}: router or embedding with static activation scales")
    norm_bias = f"{layer}.{NORM_BEFORE[name]}.bias" if layer and name in NORM_BEFORE else None
    ignored = tuple(f"{module}.{suffix}" for suffix in ("weight_scale", "bias") if suffix in stored)
    return w8a8_static(
        module, shape, norm_bias if norm_bias in found else None, ignored, has_offset="weight_offset" in stored
    )


def fp8_format(module: str, shape: tuple[int, ...], stored: dict[str, Stored], scheme: Scheme) -> Format:
    if "weight_scale_inv" not in stored:
        raise not_supported(f"{module}.weight of FP8 without weight_scale_inv (scales by tensor or channel)")
    return fp8_blocks(module, shape, scheme.block, is_scalar=stored["weight_scale_inv"].shape == ())


def group_size(module: str, name: str, k: int, stored: dict[str, Stored], axis: int) -> int:
    """Columns of a group, from the shape of the scales."""
    shape = stored[name].shape if name in stored else ()
    groups = shape[axis] if len(shape) == 2 else 0
    if groups < 1 or k % groups:
        found = f"{list(shape)}, whose groups do not divide {k} columns" if name in stored else "missing"
        raise ValueError(f"{module}.{name} is {found}")
    return k // groups
