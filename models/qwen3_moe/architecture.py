# SPDX-License-Identifier: Apache-2.0
"""Reads a checkpoint's config.json into transformers' config class and refuses what the model cannot honour."""

import json
from pathlib import Path
from typing import Any

from transformers import Qwen3MoeConfig
from transformers.modeling_rope_utils import RopeParameters

from models.layers.rotary import ROPE_TYPES, inverse_frequencies

# of all rope types together (transformers' RopeParameters), in both spellings of the type, and yarn's further ones
ROPE_KEYS = {"type", "mscale", "mscale_all_dim", "truncate", *RopeParameters.__annotations__}


def load_config(model_path: Path, rope_scaling: dict[str, Any] | None = None) -> Qwen3MoeConfig:
    """The config of the checkpoint folder `model_path` (or of a config file), with `rope_scaling` put over its own.

    Raises ValueError, naming the file and the key, for anything that would have to be ignored or guessed.
    """
    file = model_path / "config.json" if model_path.is_dir() else model_path
    if not file.is_file():
        raise ValueError(f"model_path: {model_path} has no config.json")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: expected a JSON object")
    refuse_foreign(file, raw)
    where = str(file)
    if rope_scaling is not None:
        raw = override_rope(raw, rope_scaling)
        where = "model_config.rope_scaling"
    try:
        config = Qwen3MoeConfig.from_dict(raw)
    except Exception as error:  # the config class raises its validators' many own types
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from None
    check_sizes(file, config)
    check_rope(where, config)
    return config


def refuse_foreign(file: Path, raw: dict[str, Any]) -> None:
    """Other architectures, quantised checkpoints, and features that Qwen3-MoE's config names but we do not have."""
    if raw.get("model_type") != "qwen3_moe":
        raise ValueError(f"{file}: model_type {raw.get('model_type')!r} is not supported, only 'qwen3_moe'")
    if raw.get("architectures", ["Qwen3MoeForCausalLM"]) != ["Qwen3MoeForCausalLM"]:
        raise ValueError(f"{file}: architectures {raw['architectures']} is not supported, only Qwen3MoeForCausalLM")
    if raw.get("use_sliding_window"):
        raise ValueError(f"{file}: use_sliding_window true is not supported, only full attention")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{file}: hidden_act {raw['hidden_act']!r} is not supported, only 'silu'")
    if not isinstance(raw.get("head_dim"), int | None):
        raise ValueError(f"{file}: head_dim is {raw['head_dim']!r}, must be a whole number")
    quantization = raw.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ValueError(f"{file}: quantization_config (quant_method {method!r}) is not supported")
    description = file.parent / "quant_model_description.json"
    if description.exists():
        raise ValueError(f"{description}: quantised checkpoints are not supported")


def override_rope(raw: dict[str, Any], rope_scaling: dict[str, Any]) -> dict[str, Any]:
    """The config with other rope parameters; the base (rope_theta) stays the checkpoint's unless overridden."""
    unknown = sorted(map(str, set(rope_scaling) - ROPE_KEYS))
    if unknown:
        raise ValueError(
            f"model_config.rope_scaling: {unknown[0]}: unknown key, possible are {', '.join(sorted(ROPE_KEYS))}"
        )
    if not {"rope_type", "type"} & set(rope_scaling):
        raise ValueError(f"model_config.rope_scaling: rope_type is missing, one of {', '.join(ROPE_TYPES)}")
    own = raw.get("rope_parameters") or {}
    theta = own.get("rope_theta", raw.get("rope_theta"))
    merged = {**({} if theta is None else {"rope_theta": theta}), **rope_scaling}
    return {key: value for key, value in raw.items() if key != "rope_scaling"} | {"rope_parameters": merged}


def check_sizes(file: Path, config: Qwen3MoeConfig) -> None:
    if getattr(config, "head_dim", None) is None:  # the config class has no such field of its own
        config.head_dim = config.hidden_size // max(1, config.num_attention_heads)
    positive = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "decoder_sparse_step max_position_embeddings"
    ).split()
    if not isinstance(config.num_experts, int) or config.num_experts < 0:
        raise ValueError(f"{file}: num_experts is {config.num_experts!r}, must be a whole number, at least 0")
    if config.num_experts > 0:
        positive += ["moe_intermediate_size", "num_experts_per_tok"]
    for key in positive:
        if not isinstance(getattr(config, key), int) or getattr(config, key) < 1:
            raise ValueError(f"{file}: {key} is {getattr(config, key)!r}, must be a whole number, at least 1")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"{file}: num_attention_heads {config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    if 0 < config.num_experts < config.num_experts_per_tok:
        raise ValueError(
            f"{file}: num_experts_per_tok {config.num_experts_per_tok} is more than num_experts {config.num_experts}"
        )


def check_rope(where: str, config: Qwen3MoeConfig) -> None:
    """Rope parameters from which usable frequencies follow; `where` is their origin."""
    rope = config.rope_parameters
    rope_type = rope["rope_type"]
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"{where}: rope type {rope_type!r} is not supported, only {', '.join(ROPE_TYPES)}")
    for key in ("rope_theta", "factor"):
        value, least = rope.get(key, 2.0), 1 if key == "rope_theta" else 0
        if not isinstance(value, int | float) or value <= least:
            raise ValueError(f"{where}: {key} is {value!r}, must be a number above {least}")
    try:
        short, frequencies = (
            inverse_frequencies(config, seq_len)[0] for seq_len in (1, config.max_position_embeddings)
        )
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{where}: rope parameters {rope} give no frequencies: {error!r}") from None
    if not (short.isfinite().all() and frequencies.isfinite().all()):
        raise ValueError(f"{where}: rope parameters {rope} give frequencies that are not finite")
    if 2 * len(frequencies) != config.head_dim:
        raise ValueError(
            f"{where}: rope parameters rotate {2 * len(frequencies)} of {config.head_dim} dimensions (head_dim odd, or "
            "partial_rotary_factor, long_factor or short_factor); only full rotation is supported"
        )


def trained_len(config: Qwen3MoeConfig) -> int:
    """Positions the checkpoint is made for, with its rope scaling."""
    rope = config.rope_parameters
    original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
    return max(config.max_position_embeddings, int(original * rope.get("factor", 1)))
