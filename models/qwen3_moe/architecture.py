# SPDX-License-Identifier: Apache-2.0
"""Parses a checkpoint's config.json into transformers' config class and rejects what the model does not support."""

import math
from typing import Any

from transformers import Qwen3MoeConfig

from models.layers.rotary import ROPE_TYPES, inverse_frequencies
from models.quantization.scheme import parse_scheme
from models.qwen3_moe.config_keys import FLAGS, NETWORK_KEYS, ROPE_KEYS, SIZES, TOKEN_KEYS

ARCHITECTURES = ("Qwen3MoeForCausalLM", "Qwen3MoeModel")
MAX_EXPERTS_OF_ALL_LAYERS = 1 << 17  # the largest published model has 94 x 128
MAX_NUMBER = 1e30
MAX_TOKEN_ID = 1 << 31  # some published configs have -1 or ids beyond the vocabulary

ROPE_LISTS = ("long_factor", "short_factor")
ROPE_ABOVE = {"rope_theta": 1, "factor": 0}


def parse_config(raw: dict[str, Any]) -> Qwen3MoeConfig:
    """Parses the JSON object of a config.json.

    Raises ValueError, naming the key, for invalid or contradictory values, and for unsupported features that change
    the network's results. `attention_limit` gives the length up to which the attention is full causal attention, and
    `config_keys.ignored_keys` the keys without effect.
    """
    check_supported(raw)
    check_values(raw)
    rope = merged_rope_parameters(raw)
    known = {key: raw[key] for key in NETWORK_KEYS if key in raw}
    if rope is not None:
        known["rope_parameters"] = {key: value for key, value in rope.items() if key in ROPE_KEYS}
    check_rope_values({**known, **known.get("rope_parameters", {})})
    try:
        config = Qwen3MoeConfig(**known)
    except Exception as error:  # the config class's validators raise many exception types
        raise ValueError(" ".join(str(error).split())) from None
    if getattr(config, "head_dim", None) is None:  # the config class does not define it
        config.head_dim = config.hidden_size // config.num_attention_heads
    config.dual_chunk_attention_config = raw.get("dual_chunk_attention_config")
    check_sizes(config)
    check_layer_types(raw.get("layer_types"), config.num_hidden_layers)
    check_rope(config)
    attention_limit(config)
    return config


def shown(value: object) -> str:
    """Formats a config value for an error message: repr if it is short, else its type, as it may be of any size."""
    if isinstance(value, list) and len(value) <= 4 and all(isinstance(entry, str) for entry in value):
        return f"[{', '.join(map(shown, value))}]"
    if value is None or isinstance(value, float) or (isinstance(value, str) and len(value) <= 80):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if value.bit_length() <= 100 else f"a number of {value.bit_length()} bits"
    return f"a {type(value).__name__}"


def check_supported(raw: dict[str, Any]) -> None:
    """Rejects other architectures, number formats, and config features that the model does not implement."""
    if raw.get("model_type") != "qwen3_moe":
        raise ValueError(f"model_type {shown(raw.get('model_type'))} is not supported, only 'qwen3_moe'")
    architectures = raw.get("architectures") or [ARCHITECTURES[0]]
    if not isinstance(architectures, list) or not all(name in ARCHITECTURES for name in architectures):
        raise ValueError(f"architectures {shown(architectures)} is not supported, only {' or '.join(ARCHITECTURES)}")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):  # aliases
        raise ValueError(f"hidden_act {shown(raw['hidden_act'])} is not supported, only 'silu'")
    parse_scheme(raw)
    for key in ("per_layer_config", "is_encoder_decoder", "add_cross_attention", "pruned_heads"):
        if raw.get(key):
            raise ValueError(f"{key} {shown(raw[key])} is not supported: leave it out")
    if raw.get("transformers_weights") not in (None, "model.safetensors"):
        raise ValueError(
            f"transformers_weights {shown(raw['transformers_weights'])} is not supported, only model.safetensors"
        )


def check_values(raw: dict[str, Any]) -> None:
    """Checks types and bounds of the keys that are present, before transformers reads them."""
    for key, (least, most) in SIZES.items():
        value = raw.get(key, least)
        if value is None and key in ("head_dim", "sliding_window"):
            continue
        if type(value) is not int or value < least:
            raise ValueError(f"{key} is {shown(value)}, must be a whole number, at least {least}")
        if value > most:
            raise ValueError(f"{key} is {shown(value)}, must be at most {most}")
    for key in FLAGS:
        if not isinstance(raw.get(key, False), bool):
            raise ValueError(f"{key} is {shown(raw[key])}, must be true or false")
    for key in ("rms_norm_eps", "initializer_range"):
        if not is_number(raw.get(key, 0.0)) or raw.get(key, 0.0) < 0:
            raise ValueError(f"{key} is {shown(raw[key])}, must be a number, at least 0")
    for key in TOKEN_KEYS:
        ids = raw[key] if isinstance(raw.get(key), list) else [raw.get(key)]
        if not all(token is None or (type(token) is int and abs(token) < MAX_TOKEN_ID) for token in ids):
            raise ValueError(f"{key} is {shown(raw[key])}, must be a token id")
    dense = raw.get("mlp_only_layers") or []
    most = SIZES["num_hidden_layers"][1]
    if not isinstance(dense, list) or len(dense) > most or any(type(layer) is not int for layer in dense):
        raise ValueError(f"mlp_only_layers is {shown(dense)}, must be a list of at most {most} layer numbers")
    if "num_experts" in raw and raw.get("num_local_experts", raw["num_experts"]) != raw["num_experts"]:
        raise ValueError(f"num_experts {raw['num_experts']} contradicts num_local_experts {raw['num_local_experts']}")


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -MAX_NUMBER <= value <= MAX_NUMBER


def check_sizes(config: Qwen3MoeConfig) -> None:
    """Checks that the sizes are consistent with each other."""
    if config.head_dim < 1:
        raise ValueError(f"hidden_size {config.hidden_size} is less than num_attention_heads")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads {config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    if config.num_experts > 0:
        for key in ("moe_intermediate_size", "num_experts_per_tok"):
            if getattr(config, key) < 1:
                raise ValueError(f"{key} is {getattr(config, key)}, must be a whole number, at least 1")
    if 0 < config.num_experts < config.num_experts_per_tok:
        raise ValueError(
            f"num_experts_per_tok {config.num_experts_per_tok} is more than num_experts {config.num_experts}"
        )
    if config.num_hidden_layers * config.num_experts > MAX_EXPERTS_OF_ALL_LAYERS:
        raise ValueError(
            f"num_hidden_layers {config.num_hidden_layers} x num_experts {config.num_experts} must be at most "
            f"{MAX_EXPERTS_OF_ALL_LAYERS}"
        )


def check_layer_types(layer_types: Any, num_layers: int) -> None:
    if layer_types is None:
        return
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise ValueError(f"layer_types is {shown(layer_types)}, must be a list of num_hidden_layers {num_layers} names")
    other = [kind for kind in layer_types if kind != "full_attention"]
    if other:
        raise ValueError(f"layer_types {shown(other[0])} is not supported, only 'full_attention'")


def merged_rope_parameters(raw: dict[str, Any]) -> dict[str, Any] | None:
    """Rope parameters from rope_scaling or rope_parameters, with transformers' precedence; None without any."""
    for key in ("rope_scaling", "rope_parameters"):
        if raw.get(key) is not None and not isinstance(raw[key], dict):
            raise ValueError(f"{key} is {shown(raw[key])}, must be an object with a rope_type")
        nested = [name for name, value in (raw.get(key) or {}).items() if isinstance(value, dict)]
        if nested:
            raise ValueError(f"{key} {shown(nested[0])} is an object, parameters per kind of layer are not supported")
    return raw.get("rope_scaling") or raw.get("rope_parameters")


def override_rope(raw: dict[str, Any], rope_scaling: dict[str, Any]) -> dict[str, Any]:
    """Replaces the rope parameters of a config.json; rope_theta stays the checkpoint's unless overridden."""
    unknown = sorted(str(key) for key in rope_scaling if key not in ROPE_KEYS)
    if unknown:
        raise ValueError(f"{shown(unknown[0])}: unknown key, possible are {', '.join(sorted(ROPE_KEYS))}")
    if not {"rope_type", "type"} & set(rope_scaling):
        raise ValueError(f"rope_type is missing, one of {', '.join(ROPE_TYPES)}")
    theta = (merged_rope_parameters(raw) or {}).get("rope_theta", raw.get("rope_theta"))
    merged = {**({} if theta is None else {"rope_theta": theta}), **rope_scaling}
    replaced = {"rope_scaling", *({"original_max_position_embeddings"} & set(rope_scaling))}
    return {key: value for key, value in raw.items() if key not in replaced} | {"rope_parameters": merged}


def check_rope(config: Qwen3MoeConfig) -> None:
    """Checks that the rope parameters yield finite frequencies for all of head_dim."""
    rope = config.rope_parameters
    longest = config.max_position_embeddings
    if rope["rope_type"] == "longrope":
        for key in ROPE_LISTS:
            if rope.get(key) is not None and 2 * len(rope[key]) != config.head_dim:
                raise ValueError(f"{key} has {len(rope[key])} numbers, must have head_dim / 2 = {config.head_dim / 2}")
        longest = 1 + max(longest, rope.get("original_max_position_embeddings") or 0)  # uses long_factor
    try:
        (short, factor), (long, _) = (inverse_frequencies(config, seq_len) for seq_len in (1, longest))
    except Exception as error:  # whatever transformers' initialisers and torch raise for odd values
        raise ValueError(f"rope parameters {rope} give no frequencies: {error!r}") from None
    if not (short.isfinite().all() and long.isfinite().all() and math.isfinite(factor)):
        raise ValueError(f"rope parameters {rope} give frequencies that are not finite")
    if 2 * len(long) != config.head_dim or 2 * len(short) != config.head_dim:
        raise ValueError(
            f"rope parameters rotate {2 * len(long)} of {config.head_dim} dimensions (head_dim odd, or "
            "partial_rotary_factor, long_factor or short_factor); only full rotation is supported"
        )


def check_rope_values(given: dict[str, Any]) -> None:
    """Checks the rope type, and types and bounds of the rope values present, before transformers reads them."""
    rope_type = given.get("rope_type", given.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"rope type {shown(rope_type)} is not supported, only {', '.join(ROPE_TYPES)}")
    for key in sorted(ROPE_KEYS & set(given) - {"type", "rope_type"}):
        value = given[key]
        if value is None and key not in ("rope_theta", "factor"):
            continue
        if key in ROPE_LISTS:
            most = SIZES["head_dim"][1]
            if not isinstance(value, list) or len(value) > most or not all(map(is_number, value)):
                raise ValueError(f"{key} is {shown(value)}, must be a list of at most {most} numbers")
        elif key == "truncate":
            if not isinstance(value, bool):
                raise ValueError(f"truncate is {shown(value)}, must be true or false")
        elif key == "original_max_position_embeddings":
            if type(value) is not int or not 1 <= value <= MAX_NUMBER:
                raise ValueError(f"{key} is {shown(value)}, must be a whole number, at least 1")
        else:
            least = ROPE_ABOVE.get(key, -MAX_NUMBER)
            if not is_number(value) or value <= least:
                raise ValueError(f"{key} is {shown(value)}, must be a number above {least}")


def trained_len(config: Qwen3MoeConfig) -> int:
    """Maximum sequence length that the checkpoint supports, extended by its rope scaling."""
    rope = config.rope_parameters
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    return max(config.max_position_embeddings, int(original * rope.get("factor", 1)))


def attention_limit(config: Qwen3MoeConfig) -> tuple[int, str] | None:
    """Sequence length up to which attention equals full causal attention, and the limiting key; None: no limit.

    Dual chunk attention (arXiv:2402.17463): position ids are unchanged within `chunk_size`, queries are scaled beyond
    `original_max_position_embeddings`, and prefill is sparse beyond `sparse_attention_threshold` tokens if enabled.
    Defaults are vLLM's, which Qwen's model cards recommend for it.
    """
    limits = []
    if config.use_sliding_window and config.sliding_window is not None:
        limits.append((config.sliding_window, "use_sliding_window with sliding_window"))
    dual = config.dual_chunk_attention_config
    if dual is not None:
        key = "dual_chunk_attention_config"
        if not isinstance(dual, dict):
            raise ValueError(f"{key} is {shown(dual)}, must be an object")
        sizes = {"chunk_size": 8192, "original_max_position_embeddings": 0, "sparse_attention_threshold": 32768}
        sizes |= {name: dual[name] for name in sizes if name in dual}
        for name, value in sizes.items():
            if type(value) is not int or value < 0:
                raise ValueError(f"{key}.{name} is {shown(value)}, must be a whole number, at least 0")
        limits.append((sizes["chunk_size"], f"{key}.chunk_size"))
        if sizes["original_max_position_embeddings"]:
            name = "original_max_position_embeddings"
            limits.append((sizes[name], f"{key}.{name}"))
        if dual.get("sparse_attention_enabled", bool(dual.get("sparse_attention_config"))):
            name = "sparse_attention_threshold"
            limits.append((sizes[name], f"{key}.{name}"))
    return min(limits, default=None)
