# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's configuration says of its number formats, beyond what its tensors show.

Which format a module has is decided by its tensors (detect.py): names of repositories and methods mislead. The
configuration says how activations are quantised, and names what is not supported.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SUPPORTED = (
    "AWQ (4 bits, GEMM), GPTQ (4 bits, no act-order), FP8 (e4m3, blocks), compressed-tensors (W4A16, W8A8 by channel "
    "and token), msModelSlim (W8A8_DYNAMIC, W8A8)"
)
METHODS = ("awq", "gptq", "fp8", "compressed-tensors")
AWQ_LAYOUTS = ("gemm", "exllama", "ipex")  # `version`: all stored as GEMM
REPEATED_GROUP = re.compile(r"\)[*+{]")
MODELSLIM_TYPES = ("FLOAT", "W8A8", "W8A8_DYNAMIC")


@dataclass(frozen=True)
class Group:
    """Modules that share a scheme in a compressed-tensors configuration."""

    targets: tuple[str, ...]  # module names, patterns ("re:..."), or the class name "Linear"
    bits: int
    group_size: int | None  # None: one scale per output channel
    has_zeros: bool = False
    act_order: bool = False


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Number formats as declared in config.json or in msModelSlim's description."""

    method: str | None = None  # None: not quantised, or nothing is declared
    group_size: int = 128  # of awq and gptq
    has_zeros: bool = True  # of awq
    zeros_less_one: bool = True  # of gptq
    act_order: bool = False  # of gptq
    block: tuple[int, int] = (128, 128)  # of fp8
    groups: tuple[Group, ...] = ()  # of compressed-tensors
    float_modules: tuple[str, ...] = ()  # names, patterns or, as awq's and fp8's, parts of names
    types: Mapping[str, str] | None = None  # of msModelSlim: tensor name -> type

    def group(self, module: str) -> Group | None:
        """The group of compressed-tensors that a module belongs to: by name, else by pattern, else by class."""
        for kind_of_target in (is_name, is_pattern, is_class):
            for group in self.groups:
                if any(kind_of_target(target) and matches(target, module) for target in group.targets):
                    return group
        return None

    def quantizes_activations(self, module: str) -> bool:
        """Whether the activations of a module with int8 weights are declared as int8 too."""
        if self.types is not None:
            name = f"{module}.weight"
            return self.types.get(name, self.types.get(name.removeprefix("model."))) == "W8A8_DYNAMIC"
        group = self.group(module)
        return group is not None and group.bits == 8

    def keeps_float(self, module: str) -> bool:
        """Whether a module is declared as not quantised."""
        if self.groups:
            return any(matches(entry, module) for entry in self.float_modules) or self.group(module) is None
        return module == "lm_head" or any(entry in module for entry in self.float_modules)


def is_pattern(target: str) -> bool:
    return target.startswith("re:")


def is_class(target: str) -> bool:
    return target == "Linear"


def is_name(target: str) -> bool:
    return not is_pattern(target) and not is_class(target)


def matches(target: str, module: str) -> bool:
    """Whether an entry of compressed-tensors' `targets` or `ignore` means a linear module."""
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target in ("Linear", module)


def parse_scheme(config: Mapping[str, Any], description: Mapping[str, Any] | None = None) -> Scheme:
    """Parses the quantisation of a config.json, or else msModelSlim's description of tensors.

    Raises ValueError that names what is not supported, and what is.
    """
    if description is not None:
        return modelslim_scheme(description)
    raw = config.get("quantization_config", config.get("compression_config"))
    if raw is None:
        return Scheme()
    if not isinstance(raw, dict):
        raise ValueError(f"quantization_config is {kind(raw)}, must be an object")
    method = raw.get("quant_method")
    if method == "compressed-tensors" or (method is None and "config_groups" in raw):
        return compressed_tensors_scheme(raw)
    if method not in METHODS and not (method is None and {"bits", "w_bit"} & raw.keys()):
        raise not_supported(f"quantization_config with quant_method {shown(method)}")
    return fp8_scheme(raw) if method == "fp8" else grouped_scheme(raw, method)


def grouped_scheme(raw: dict[str, Any], method: str | None) -> Scheme:
    """Scheme of awq and gptq."""
    bits = raw.get("bits", raw.get("w_bit", 4))
    if bits != 4:
        raise not_supported(f"{method or 'AWQ or GPTQ'} with {shown(bits)} bits")
    layout = raw.get("version", "gemm")
    if method == "awq" and str(layout).lower() not in AWQ_LAYOUTS:
        raise not_supported(f"awq with version {shown(layout)}")
    checkpoint_format = raw.get("checkpoint_format") or raw.get("format") or "gptq"
    if method == "gptq" and checkpoint_format not in ("gptq", "gptq_v2"):
        raise not_supported(f"gptq with checkpoint_format {shown(checkpoint_format)}")
    size = raw.get("group_size", raw.get("q_group_size", 128))
    if type(size) is not int or (size < 1 and size != -1):
        raise ValueError(f"group_size is {shown(size)}, must be a whole number, at least 1, or -1")
    return Scheme(
        method=method,
        group_size=size,
        has_zeros=raw.get("zero_point", True) is not False,
        act_order=raw.get("desc_act") is True,
        zeros_less_one=checkpoint_format != "gptq_v2",
        float_modules=names(raw, "modules_to_not_convert"),
    )


def fp8_scheme(raw: dict[str, Any]) -> Scheme:
    activations, block = raw.get("activation_scheme", "dynamic"), raw.get("weight_block_size")
    if activations != "dynamic":
        raise not_supported(f"fp8 with activation_scheme {shown(activations)}")
    if raw.get("fmt", "e4m3") != "e4m3":
        raise not_supported(f"fp8 with fmt {shown(raw['fmt'])}")
    if not isinstance(block, list) or len(block) != 2 or any(type(size) is not int or size < 1 for size in block):
        raise not_supported(f"fp8 with weight_block_size {shown(block)}")
    return Scheme(method="fp8", block=(block[0], block[1]), float_modules=names(raw, "modules_to_not_convert"))


def compressed_tensors_scheme(raw: dict[str, Any]) -> Scheme:
    for key in ("kv_cache_scheme", "transform_config"):
        if raw.get(key):
            raise not_supported(f"compressed-tensors with {key}")
    sparsity = raw.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise not_supported("compressed-tensors with sparsity_config")
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ValueError(f"quantization_config.config_groups is {kind(groups)}, must be an object with a group")
    return Scheme(
        method="compressed-tensors",
        groups=tuple(parse_group(str(name), group) for name, group in groups.items()),
        float_modules=names(raw, "ignore"),
    )


def parse_group(name: str, raw: Any) -> Group:
    """Parses a group of compressed-tensors: W4A16 (int, by group or channel) or W8A8 (int, by channel and token)."""
    where = f"quantization_config.config_groups.{name[:40]}"
    if not isinstance(raw, dict) or not isinstance(raw.get("weights"), dict):
        raise ValueError(f"{where}.weights is missing, must be an object")
    weights, inputs = raw["weights"], raw.get("input_activations")
    strategy, symmetric = weights.get("strategy"), weights.get("symmetric", True) is not False
    found = summary(weights), "float" if inputs is None else summary(inputs) if isinstance(inputs, dict) else "?"
    text = f"compressed-tensors with weights {found[0]} and activations {found[1]} ({where})"
    if raw.get("output_activations") is not None:
        raise not_supported(f"{text} and quantised outputs")
    size = weights.get("group_size")
    is_int = weights.get("type", "int") == "int" and not weights.get("dynamic", False)
    by_group = strategy == "group" and type(size) is int and size > 0
    if is_int and weights.get("num_bits") == 4 and inputs is None and (by_group or strategy == "channel"):
        act_order = weights.get("actorder") in ("group", "dynamic")
        return Group(names(raw, "targets"), 4, size if by_group else None, not symmetric, act_order)
    token = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
    stated = inputs if isinstance(inputs, dict) and {"strategy", "dynamic"} <= inputs.keys() else {}  # no defaults
    dynamic = bool(stated) and {key: stated.get(key, token[key]) for key in token} == token
    if is_int and weights.get("num_bits") == 8 and strategy == "channel" and symmetric and dynamic:
        return Group(names(raw, "targets"), 8, None)
    raise not_supported(text)


def summary(arguments: dict[str, Any]) -> str:
    """Describes quantisation arguments: bits, type, strategy, and what is unusual."""
    words = [f"{shown(arguments.get('num_bits'))} bits", str(arguments.get("type", "int"))[:20]]
    words.append(f"by {str(arguments.get('strategy'))[:20]}")
    words += ["asymmetric"] if arguments.get("symmetric") is False else []
    return " ".join([*words, "dynamic" if arguments.get("dynamic") else "static"])


def modelslim_scheme(description: Mapping[str, Any]) -> Scheme:
    """Scheme of msModelSlim's quant_model_description*.json: the type of every tensor."""
    metadata = description.get("metadata")
    if isinstance(metadata, dict) and metadata.get("quarot"):  # offline rotations are folded into the weights
        raise not_supported("msModelSlim with online rotations (metadata.quarot)")
    types = {name: value for name, value in description.items() if "." in name and isinstance(value, str)}
    other = next((name for name, value in types.items() if value not in MODELSLIM_TYPES), None)
    if other is not None:
        raise not_supported(f"msModelSlim's type {shown(types[other])} of {other[:120]}")
    return Scheme(method="msmodelslim", types=types)


def names(raw: dict[str, Any], key: str) -> tuple[str, ...]:
    """A list of names; absent and null mean none."""
    found = raw.get(key) or []
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        raise ValueError(f"{key} is {kind(found)}, must be a list of names")
    for entry in found:
        if entry.startswith("re:"):
            if REPEATED_GROUP.search(entry):  # such a pattern can take longer than anyone waits
                raise ValueError(f"{key}: {entry[:80]!r} repeats a group")
            try:
                re.compile(entry[3:])
            except re.error as error:
                raise ValueError(f"{key}: {entry[:80]!r} is not a regular expression: {error}") from None
    return tuple(found)


def not_supported(what: str) -> ValueError:
    return ValueError(f"{what} is not supported; supported are {SUPPORTED}")


def shown(value: object) -> str:
    return repr(value) if value is None or isinstance(value, int | float) else repr(str(value)[:60])


def kind(value: object) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
