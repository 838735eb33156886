# SPDX-License-Identifier: Apache-2.0
"""The settings of a run: what a YAML may say, with types and defaults; docs/configuration.md says what each means."""

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    with_ckpt: bool = True
    rope_scaling: dict[str, Any] | None = None
    cache_memory_fraction: float = 0.8
    cache_tokens: int | None = None
    enable_profiler: bool = False
    npu_prefetch: bool = False


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
    npu_mm_all_reduce_base: bool = False

    def sizes(self) -> dict[str, int]:
        """The sizes that are given; the two that follow from the others only where the user states them."""
        stated = dataclasses.asdict(self).items()
        return {key: size for key, size in stated if key.endswith("_size") and size is not None}


@dataclass(frozen=True, kw_only=True)
class Settings:
    model_name: str
    model_path: str
    exe_mode: Literal["eager", "graph"] = "eager"
    device: Literal["auto", "npu", "cuda", "cpu"] = "auto"
    world_size: int = 1
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    model_config: ModelSettings = field(default_factory=ModelSettings)
    data_config: DataSettings = field(default_factory=DataSettings)
    parallel_config: ParallelSettings = field(default_factory=ParallelSettings)


SECTIONS = {name: kind for name, kind in typing.get_type_hints(Settings).items() if dataclasses.is_dataclass(kind)}


def load_settings(path: str | Path, overrides: typing.Sequence[str] = ()) -> Settings:
    """Reads a YAML file and puts overrides ("section.key=value" or "key=value") over it.

    Raises ValueError with one line that names the file or override, the key, and what is allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such YAML file")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, TypeError) as error:  # the latter two: impossible dates, keys that are lists
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected keys and values, such as model_path: ...")
    for override in overrides:
        apply_override(raw, override)
    return settings_from_dict(raw, str(path))


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML lets the last of two equal keys win silently; here the second is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.YAMLError(f"the key in line {key_node.start_mark.line + 1} is not a plain word")
            if key_node.value in seen:
                raise yaml.YAMLError(
                    f"key {key_node.value!r} stands twice, again in line {key_node.start_mark.line + 1}"
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Puts "section.key=value" into the tree read from a YAML; the value is read as YAML."""
    name, equals, text = override.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts) or len(parts) > 2:
        raise ValueError(f"--set {override}: expected section.key=value, such as data_config.max_new_tokens=64")
    try:
        value = yaml.load(text, UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, TypeError):
        raise ValueError(f"--set {override}: {text!r} is not a valid YAML value") from None
    target = raw
    for part in parts[:-1]:
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            raise ValueError(f"--set {override}: {part} is not a section")
    target[parts[-1]] = value


def settings_from_dict(raw: dict[str, Any], where: str) -> Settings:
    """Checks names, types and sizes of a tree of settings; `where` names its origin in errors."""
    raw = dict(raw)
    for section, kind in SECTIONS.items():
        if raw.get(section) is None:
            raw.pop(section, None)
        elif isinstance(raw[section], dict):
            raw[section] = build(kind, raw[section], where, f"{section}.")
        else:
            raise ValueError(f"{where}: {section}: expected a section of keys, got {raw[section]!r}")
    settings = build(Settings, raw, where, "")
    check_sizes(settings, where)
    return settings


def build(kind: type, raw: dict[str, Any], where: str, prefix: str) -> Any:
    """An instance of the settings class `kind` from `raw`, every key and type checked."""
    hints = typing.get_type_hints(kind)
    for key in raw:
        if key not in hints:
            raise ValueError(f"{where}: {prefix}{key}: unknown key{nearest(str(key), prefix)}")
    for definition in dataclasses.fields(kind):
        required = definition.default is dataclasses.MISSING and definition.default_factory is dataclasses.MISSING
        if required and definition.name not in raw:
            raise ValueError(
                f"{where}: {prefix}{definition.name}: missing, a {hints[definition.name].__name__} is needed"
            )
    values = {key: convert(value, hints[key], f"{where}: {prefix}{key}") for key, value in raw.items()}
    return kind(**values)


def nearest(key: str, prefix: str) -> str:
    """A hint at the valid key that looks most like `key`: in its own section if possible, else anywhere."""
    full_names = {name: name for name in typing.get_type_hints(Settings)}
    for section, kind in SECTIONS.items():
        full_names |= {f"{section}.{name}": name for name in typing.get_type_hints(kind)}
    for name, own in full_names.items():
        if own == key:
            return f"; did you mean {name}?"
    here = [name for name in full_names if name.rpartition(".")[0] == prefix.rstrip(".")]
    for candidates in (here, list(full_names)):
        by_key = {full_names[name]: name for name in candidates}
        match = difflib.get_close_matches(key, by_key, n=1, cutoff=0.6)
        if match:
            return f"; did you mean {by_key[match[0]]}?"
    closest = max(here, key=lambda name: difflib.SequenceMatcher(None, key, full_names[name]).ratio())
    return f"; the nearest valid key is {closest}"


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotated type `hint`; ints pass as floats, everything else must match."""
    if typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint) and isinstance(value, str):
            return value
        allowed = ", ".join(typing.get_args(hint))
        match = difflib.get_close_matches(str(value), typing.get_args(hint), n=1)
        raise ValueError(
            f"{where}: {value!r} is not one of {allowed}" + (f"; did you mean {match[0]}?" if match else "")
        )
    if isinstance(hint, types.UnionType):  # X | None
        return None if value is None else convert(value, typing.get_args(hint)[0], where)
    container = typing.get_origin(hint) or hint
    if container is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-3 as a string
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, container) or (container is int and isinstance(value, bool)):
        raise ValueError(f"{where}: expected {container.__name__}, got {value!r}")
    if container is list and not all(isinstance(item, typing.get_args(hint)[0]) for item in value):
        raise ValueError(f"{where}: expected a list of {typing.get_args(hint)[0].__name__}, got {value!r}")
    return value


def check_sizes(settings: Settings, where: str) -> None:
    """Numbers no run can have. Sampling settings are checked where they are used, in SamplingParams."""
    data, model, parallel = settings.data_config, settings.model_config, settings.parallel_config
    at_least_one = {
        "world_size": settings.world_size,
        "model_config.cache_tokens": model.cache_tokens,
        "data_config.max_prompts": data.max_prompts,
        "data_config.input_max_len": data.input_max_len,
        "data_config.batch_size": data.batch_size,
        "data_config.max_new_tokens": data.max_new_tokens,
        **{f"parallel_config.{key}": size for key, size in parallel.sizes().items()},
    }
    for key, size in at_least_one.items():
        if size is not None and size < 1:
            raise ValueError(f"{where}: {key}: {size} is impossible, must be at least 1")
    if settings.model_name in ("", ".", "..") or "/" in settings.model_name:
        raise ValueError(f"{where}: model_name: {settings.model_name!r} is impossible, it names a folder of results")
    if not 0 < model.cache_memory_fraction <= 1:
        raise ValueError(
            f"{where}: model_config.cache_memory_fraction: {model.cache_memory_fraction} is impossible, "
            "must be above 0 and at most 1"
        )


def resolve_path(path: str) -> Path:
    """Relative paths are looked for in the current directory, then in the repository."""
    given = Path(path).expanduser()
    return given if given.is_absolute() or given.exists() else REPOSITORY / given
