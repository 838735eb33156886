# SPDX-License-Identifier: Apache-2.0
"""Settings of a run: the YAML's keys, types and defaults; docs/configuration.md documents each key."""

import dataclasses
import difflib
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from executor.sampling_params import SamplingParams
from executor.utils.known_names import hint
from executor.utils.reading import read_text, refusing
from executor.utils.strict_yaml import parse_yaml
from executor.utils.text import one_line, printable, quoted
from executor.utils.values import convert

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG_FOLDER = REPOSITORY / "models" / "qwen3_moe" / "config"
MAX_YAML_BYTES = 1 << 20
MAX_SHOWN = 150  # characters of a file's or an override's name in an error
MAX_NAME = 100  # characters of model_name; no key is longer


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    with_ckpt: bool = True
    rope_scaling: dict[str, Any] | None = None
    cache_memory_fraction: float = 0.8
    cache_tokens: int | None = None
    enable_profiler: bool = False


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    dataset: Literal["default", "LongBench", "jsonl"] = "default"
    dataset_path: str | None = None
    longbench_task: str = "gov_report"
    text_field: str = "text"
    prompt_template: str | None = None
    max_prompts: int | None = None
    input_max_len: int = 4080
    long_prompt: Literal["cut", "refuse"] = "cut"
    chat_template: bool = True
    enable_thinking: bool = False
    batch_size: int = 1
    max_new_tokens: int = 32
    sampling_from_checkpoint: bool = False
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    ignore_eos: bool = False


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    attn_tp_size: int = 1
    moe_tp_size: int = 1
    embed_tp_size: int = 1
    lmhead_tp_size: int = 1
    attn_dp_size: int | None = None
    moe_ep_size: int | None = None
    sequence_parallel: bool = False

    def sizes(self) -> dict[str, int]:
        """Parallel group sizes by name; attn_dp_size and moe_ep_size, which are derived, only if set."""
        stated = dataclasses.asdict(self).items()
        return {key: size for key, size in stated if key.endswith("_size") and size is not None}


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    max_step_tokens: int = 8192
    chunk_tokens: int = 2048
    prefix_cache: bool = True


@dataclass(frozen=True, kw_only=True)
class Settings:
    model_name: str
    model_path: str
    exe_mode: Literal["eager", "graph"] = "eager"
    device: Literal["auto", "npu", "cuda", "cpu"] = "auto"
    world_size: int = 1
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    output_dir: str | None = None
    model_config: ModelSettings = field(default_factory=ModelSettings)
    data_config: DataSettings = field(default_factory=DataSettings)
    parallel_config: ParallelSettings = field(default_factory=ParallelSettings)
    engine_config: EngineSettings = field(default_factory=EngineSettings)


SECTIONS = {
    name: kind
    for name, kind in typing.get_type_hints(Settings).items()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind)
}


def load_settings(path: str | Path, overrides: typing.Sequence[str] = ()) -> Settings:
    """Loads a YAML file and applies overrides ("section.key=value" or "key=value").

    Raises ValueError with one line that names the file or override, the key, and what is allowed.
    """
    if isinstance(overrides, str) or not all(isinstance(override, str) for override in overrides):
        raise TypeError("overrides: expected a list of texts, each section.key=value")
    path = Path(path)
    where = one_line(path, MAX_SHOWN)
    with refusing(where):
        is_file = path.is_file()
    if not is_file:
        raise ValueError(f"{where}: no such YAML file")
    text = read_text(path, MAX_YAML_BYTES)
    with refusing(where, "not valid YAML"):
        raw = parse_yaml(text)
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: expected keys and values, such as model_path: ...")
    overridden: dict[str, str] = {}
    for override in overrides:
        key = apply_override(raw, override)
        overridden = {other: by for other, by in overridden.items() if not other.startswith(f"{key}.")}
        overridden[key] = shown(override)
    return settings_from_dict(raw, where, overridden)


def shown(override: str) -> str:
    """Name of an override in errors."""
    return f"--set {one_line(override, MAX_SHOWN)}"


def apply_override(raw: dict[str, Any], override: str) -> str:
    """Applies "section.key=value" to the YAML's tree in place, with a YAML value; returns "section.key"."""
    name, equals, text = override.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts) or len(parts) > 2:
        raise ValueError(f"{shown(override)}: expected section.key=value, such as data_config.max_new_tokens=64")
    with refusing(shown(override), f"{quoted(text)} is not a valid YAML value"):
        value = parse_yaml(text)
    target = raw
    for part in parts[:-1]:
        section = target.get(part)
        if section is not None and not isinstance(section, dict):
            raise ValueError(f"{shown(override)}: {one_line(part, MAX_SHOWN)} is not a section")
        target[part] = dict(section or {})  # a copy: an alias may refer to the same section
        target = target[part]
    target[parts[-1]] = value
    return name.strip()


@dataclass(frozen=True)
class Origin:
    """Source of each setting, as the prefix of errors: "FILE: key: ", or "--set OVERRIDE: key: "."""

    file: str
    overridden: Mapping[str, str] = field(default_factory=dict)  # "section.key" or "key" -> the override

    def error(self, key: str, problem: str) -> ValueError:
        where = self.overridden.get(key) or self.overridden.get(key.partition(".")[0]) or self.file
        return ValueError(one_line(f"{where}: {one_line(key, MAX_SHOWN)}: {problem}"))


def settings_from_dict(raw: dict[str, Any], where: str, overridden: Mapping[str, str] | None = None) -> Settings:
    """Builds `Settings` from a dict; checks names, types and ranges (ValueError).

    where: the dict's source in errors. overridden: "section.key" -> name in errors of the override that set it.
    """
    raw, origin = dict(raw), Origin(where, overridden or {})
    for section, kind in SECTIONS.items():
        if raw.get(section) is None:
            raw.pop(section, None)
        elif isinstance(raw[section], dict):
            raw[section] = build(kind, raw[section], origin, f"{section}.")
        else:
            raise origin.error(section, f"expected a section of keys, got {quoted(raw[section])}")
    settings = build(Settings, raw, origin, "")
    check_values(settings, origin)
    return settings


def build(kind: type, raw: dict[Any, Any], origin: Origin, prefix: str) -> Any:
    """Builds the settings class `kind` from `raw`; checks every key and type."""
    hints = typing.get_type_hints(kind)
    for key in raw:
        if key not in hints:
            name = key if isinstance(key, str) else quoted(key)
            raise origin.error(f"{prefix}{name}", f"unknown key{nearest(name, prefix)}")
    for definition in dataclasses.fields(kind):
        required = definition.default is dataclasses.MISSING and definition.default_factory is dataclasses.MISSING
        if required and definition.name not in raw:
            raise origin.error(f"{prefix}{definition.name}", f"missing, a {hints[definition.name].__name__} is needed")
    values = {}
    for key, value in raw.items():
        try:
            values[key] = convert(value, hints[key])
        except ValueError as error:
            raise origin.error(f"{prefix}{key}", str(error)) from None
    return kind(**values)


def nearest(key: str, prefix: str) -> str:
    """Hint with the closest valid key: in the same section if possible, else in any."""
    key = key[:MAX_NAME]  # the comparison is quadratic in the length
    full_names = {name: name for name in typing.get_type_hints(Settings)}
    for section, kind in SECTIONS.items():
        full_names |= {f"{section}.{name}": name for name in typing.get_type_hints(kind)}
    for name, own in full_names.items():
        if own == key:
            return f"; did you mean {name}?"
    known = hint(key)
    if known is not None:
        return f"; {known}"
    here = [name for name in full_names if name.rpartition(".")[0] == prefix.rstrip(".")]
    for candidates in (here, list(full_names)):
        by_key = {full_names[name]: name for name in candidates}
        match = difflib.get_close_matches(key, by_key, n=1, cutoff=0.6)
        if match:
            return f"; did you mean {by_key[match[0]]}?"
    closest = max(here, key=lambda name: difflib.SequenceMatcher(None, key, full_names[name]).ratio())
    return f"; the nearest valid key is {closest}"


MAX_SIZE = 2**31 - 1
MAX_RANKS = 65_536
LARGEST = {  # maximum of each setting whose minimum is 1
    "world_size": MAX_RANKS,
    "model_config.cache_tokens": MAX_SIZE,
    "data_config.max_prompts": MAX_SIZE,
    "data_config.input_max_len": MAX_SIZE,
    "data_config.batch_size": 2**20,
    "data_config.max_new_tokens": MAX_SIZE,
    "engine_config.max_step_tokens": MAX_SIZE,
    "engine_config.chunk_tokens": MAX_SIZE,
    **{f"parallel_config.{name}": MAX_RANKS for name in typing.get_type_hints(ParallelSettings) if "_size" in name},
}


def check_values(settings: Settings, origin: Origin) -> None:
    """Checks ranges of numbers and validity of names; ValueError."""
    for key, largest in LARGEST.items():
        section, _, name = key.rpartition(".")
        size = getattr(getattr(settings, section) if section else settings, name)
        if size is not None and size < 1:
            raise origin.error(key, f"{quoted(size)} is impossible, must be at least 1")
        if size is not None and size > largest:
            raise origin.error(key, f"{quoted(size)} is impossible, must be at most {largest}")
    fraction = settings.model_config.cache_memory_fraction
    if not 0 < fraction <= 1:
        key = "model_config.cache_memory_fraction"
        raise origin.error(key, f"{fraction} is impossible, must be above 0 and at most 1")
    check_folder_names(settings, origin)
    data = settings.data_config
    if data.top_k > MAX_SIZE:
        raise origin.error("data_config.top_k", f"{data.top_k} is impossible, must be at most {MAX_SIZE}")
    sampling_keys = typing.get_type_hints(SamplingParams)
    try:
        SamplingParams(**{key: value for key, value in vars(data).items() if key in sampling_keys})
    except ValueError as error:  # "key: problem"
        key, _, problem = str(error).partition(": ")
        raise origin.error(f"data_config.{key}", problem) from None


def check_folder_names(settings: Settings, origin: Origin) -> None:
    name = settings.model_name
    if name in ("", ".", "..") or printable(name) != name or any(character in name for character in "/\t\n"):
        raise origin.error("model_name", f"{quoted(name)} is impossible, it names a folder of results")
    if len(name) > MAX_NAME or len(name.encode()) > 2 * MAX_NAME:
        raise origin.error("model_name", f"{quoted(name)} is impossible, must be at most {MAX_NAME} characters")
    for key, path in (("model_path", settings.model_path), ("output_dir", settings.output_dir)):
        if path is not None and (not path or "\0" in path):
            raise origin.error(key, f"{quoted(path)} is impossible, it names a folder")


def resolve_path(path: str | Path) -> Path:
    """Resolves a relative path against the current directory, then the repository.

    Raises ValueError (without the setting's name) for an invalid or inaccessible path.
    """
    with refusing(quoted(str(path))):
        if b"\0" in os.fsencode(path):
            raise ValueError("a null character is impossible in a path")
        given = Path(path).expanduser()
        return given if given.is_absolute() or given.exists() else REPOSITORY / given
