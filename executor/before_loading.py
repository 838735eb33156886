# SPDX-License-Identifier: Apache-2.0
"""What follows from the settings and the checkpoint's small files, before a device or another rank is needed."""

import dataclasses
from pathlib import Path
from typing import Any

from transformers import Qwen3MoeConfig

from executor.config import SECTIONS, DataSettings, Settings, nearest, resolve_path
from executor.sampling_params import SamplingParams
from executor.tokenizer import read_generation_config
from models.qwen3_moe.architecture import load_config
from models.qwen3_moe.sharding import check_layout


def check_before_launch(settings: Settings) -> tuple[Path, Qwen3MoeConfig]:
    """The checkpoint's folder and config, checked with the layout; nothing of it needs a device or other ranks."""
    model_path = resolve_path(settings.model_path)
    if not model_path.exists():
        raise ValueError(f"model_path: {settings.model_path} does not exist")
    config = load_config(model_path, settings.model_config.rope_scaling)
    check_layout(config, settings.world_size, settings.parallel_config.sizes())
    return model_path, config


def place(raw: dict[str, Any], key: str, value: Any) -> None:
    """Puts a setting given by its bare name where it belongs in the tree of settings."""
    if key in {definition.name for definition in dataclasses.fields(Settings)} and key not in SECTIONS:
        raw[key] = value
        return
    for section, kind in SECTIONS.items():
        if key in {definition.name for definition in dataclasses.fields(kind)}:
            raw.setdefault(section, {})[key] = value
            return
    hint = "; its keys are settings by their own names" if key in SECTIONS else nearest(key, "")
    raise ValueError(f"LLM: {key}: unknown setting{hint}")


def default_sampling(data: DataSettings, model_path: Path) -> SamplingParams:
    """Sampling as the settings say, or as the checkpoint's generation_config.json does if they say so."""
    keys = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    stated = {key: getattr(data, key) for key in keys}
    if data.sampling_from_checkpoint:
        defaults = DataSettings()
        both = [key for key in keys if stated[key] != getattr(defaults, key)]
        if both:
            raise ValueError(f"data_config.{both[0]}: cannot be set beside data_config.sampling_from_checkpoint: True")
        generation = read_generation_config(model_path)
        stated |= {key: generation[key] for key in keys if generation.get(key) is not None}
        if not generation.get("do_sample", False):
            stated["temperature"] = 0.0
        elif "temperature" not in generation:
            stated["temperature"] = 1.0
    try:
        return SamplingParams(
            max_new_tokens=data.max_new_tokens,
            seed=data.seed,
            stop=tuple(data.stop),
            ignore_eos=data.ignore_eos,
            **stated,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"data_config.{error}") from None
