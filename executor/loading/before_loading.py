# SPDX-License-Identifier: Apache-2.0
"""Validation of settings and config files before launch; needs neither a device nor other ranks."""

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from executor.config import SECTIONS, DataSettings, Settings, nearest, resolve_path
from executor.loading.checkpoint import read_description, read_unique_object
from executor.loading.tokenizer import read_generation_config
from executor.sampling_params import SamplingParams
from executor.utils.reading import refusing
from executor.utils.text import one_line, quoted
from models.quantization.scheme import Scheme, parse_scheme
from models.qwen3_moe.architecture import attention_limit, override_rope, parse_config
from models.qwen3_moe.config_keys import ignored_keys
from models.qwen3_moe.sharding import check_layout

if TYPE_CHECKING:
    from transformers import Qwen3MoeConfig

logger = logging.getLogger(__name__)


def check_before_launch(settings: Settings) -> tuple[Path, "Qwen3MoeConfig"]:
    """Checks the checkpoint's config and the parallel layout; returns the checkpoint's folder and config."""
    with refusing("model_path"):
        model_path = resolve_path(settings.model_path)
        found = model_path.exists()
    if not found:
        raise ValueError(one_line(f"model_path: {settings.model_path} does not exist"))
    config = load_config(model_path, settings.model_config.rope_scaling)
    check_attention(model_path, config, settings.data_config)
    check_layout(config, settings.world_size, settings.parallel_config.sizes())
    return model_path, config


def check_attention(model_path: Path, config: "Qwen3MoeConfig", data: DataSettings) -> None:
    """Raises ValueError if a sequence could exceed the length up to which attention is full (`attention_limit`)."""
    limit = attention_limit(config)
    if limit is None:
        return
    tokens, key = limit
    longest = data.input_max_len + data.max_new_tokens
    text = f"{model_path}: config.json: {key} {tokens} is not plain attention beyond {tokens} tokens"
    if longest > tokens:
        raise ValueError(
            one_line(
                f"{text}, which is not supported: data_config.input_max_len {data.input_max_len} + max_new_tokens "
                f"{data.max_new_tokens} must be at most {tokens}"
            )
        )
    logger.warning("%s", one_line(f"{text}: this run's {longest} are computed as plain attention"))


def load_config(model_path: Path, rope_scaling: dict[str, Any] | None = None) -> "Qwen3MoeConfig":
    """Loads the config of a checkpoint folder (or a config file), with `rope_scaling` overriding its own.

    Raises ValueError with file and key for unsupported values; logs ignored keys.
    """
    with refusing(f"model_path: {model_path}"):
        file = model_path / "config.json" if model_path.is_dir() else model_path
        found = file.exists()
    if not found:
        raise ValueError(one_line(f"model_path: {model_path} has no config.json"))
    raw = read_unique_object(file)
    own = raw if rope_scaling is None else {**raw, "rope_scaling": None, "rope_parameters": None}
    with refusing(str(file)):
        config = parse_config(own)
    load_scheme(file.parent, raw)
    if rope_scaling is not None:
        with refusing("model_config.rope_scaling"):
            config = parse_config(override_rope(raw, rope_scaling))
    if ignored := ignored_keys(own):
        logger.warning("%s", one_line(f"{file}: keys without effect here and in transformers: {', '.join(ignored)}"))
    return config


def load_scheme(model_path: Path, raw: dict[str, Any]) -> Scheme:
    """Loads what a checkpoint declares of its number formats; raw: its config. ValueError for unsupported ones.

    What quantization_config leaves out is taken from quantize_config.json, where tools of GPTQ put it.
    """
    description, older = read_description(model_path), model_path / "quantize_config.json"
    stated = raw.get("quantization_config") or {}
    if isinstance(stated, dict) and "compression_config" not in raw and older.is_file():
        raw = raw | {"quantization_config": read_unique_object(older) | stated}
    with refusing(str(model_path)):
        return parse_scheme(raw, description)


def folder_name(model_path: str | Path) -> str:
    """Derives model_name from the checkpoint folder's name; "model" if that is not valid. ValueError for no path."""
    if not isinstance(model_path, str | Path) or not str(model_path):
        raise ValueError(f"model_path: expected the folder of a checkpoint, got {quoted(model_path)}")
    with refusing(f"model_path: {quoted(str(model_path))}"):
        name = Path(model_path).expanduser().resolve().name
        return name if name and name.isprintable() and len(name.encode()) <= 100 else "model"


def store_setting(raw: dict[str, Any], key: str, value: Any) -> None:
    """Stores a setting, given by its name without section, in its section of `raw`; ValueError if unknown."""
    if key in {definition.name for definition in dataclasses.fields(Settings)} and key not in SECTIONS:
        raw[key] = value
        return
    for section, kind in SECTIONS.items():
        if key in {definition.name for definition in dataclasses.fields(kind)}:
            raw.setdefault(section, {})[key] = value
            return
    advice = "; its keys are settings by their own names" if key in SECTIONS else nearest(key, "")
    raise ValueError(one_line(f"LLM: {one_line(key, 100)}: unknown setting{advice}"))


def default_sampling(data: DataSettings, model_path: Path) -> SamplingParams:
    """Builds the default SamplingParams: data_config, or generation_config.json with `sampling_from_checkpoint`."""
    keys = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    stated = {key: getattr(data, key) for key in keys}
    origins = dict.fromkeys(keys, "data_config.")
    if data.sampling_from_checkpoint:
        defaults = DataSettings()
        both = [key for key in keys if stated[key] != getattr(defaults, key)]
        if both:
            raise ValueError(f"data_config.{both[0]}: cannot be set beside data_config.sampling_from_checkpoint: True")
        file, generation = read_generation_config(model_path)
        origins = dict.fromkeys(keys, f"{file}: ")
        stated |= {key: value for key in keys if (value := getattr(generation, key)) is not None}
        do_sample = generation.do_sample or False
        if not isinstance(do_sample, bool):
            raise ValueError(f"{file}: do_sample: expected true or false, got {quoted(do_sample)}")
        if not do_sample:
            stated["temperature"] = 0.0
        elif generation.temperature is None:
            stated["temperature"] = 1.0
    try:
        return SamplingParams(
            max_new_tokens=data.max_new_tokens,
            seed=data.seed,
            stop=tuple(data.stop),
            ignore_eos=data.ignore_eos,
            **stated,
        )
    except ValueError as error:
        key = str(error).partition(":")[0]
        raise ValueError(f"{origins.get(key, 'data_config.')}{error}") from None
