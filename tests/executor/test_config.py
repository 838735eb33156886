# SPDX-License-Identifier: Apache-2.0
"""Settings from YAML and --set: values, defaults, and one-line errors."""

import dataclasses
import typing
from pathlib import Path

import pytest
import yaml

from executor import LLM
from executor.config import (
    REPOSITORY,
    SECTIONS,
    DataSettings,
    EngineSettings,
    ModelSettings,
    Settings,
    load_settings,
    resolve_path,
    settings_from_dict,
)

GOOD = """
model_name: tiny
model_path: somewhere
model_config:
    dtype: float32
data_config:
    max_new_tokens: 5
    batch_size: 2
"""
LITERALS = [
    (f"{prefix}{key}", value)
    for prefix, kind in [("", Settings), *((f"{name}.", kind) for name, kind in SECTIONS.items())]
    for key, hint in typing.get_type_hints(kind).items()
    if typing.get_origin(hint) is typing.Literal
    for value in typing.get_args(hint)
]


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    file = tmp_path / "good.yaml"
    file.write_text(GOOD)
    return file


def refusal(file: Path, *overrides: str) -> str:
    """The one-line error of a file or its overrides."""
    with pytest.raises(ValueError) as error:
        load_settings(file, overrides)
    assert str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def value_of(settings: Settings, name: str) -> typing.Any:
    for part in name.split("."):
        settings = getattr(settings, part)
    return settings


def test_values_and_defaults(yaml_file):
    settings = load_settings(yaml_file)
    assert settings == Settings(
        model_name="tiny",
        model_path="somewhere",
        model_config=ModelSettings(dtype="float32"),
        data_config=DataSettings(max_new_tokens=5, batch_size=2),
    )
    assert (settings.data_config.input_max_len, settings.exe_mode, settings.device) == (4080, "eager", "auto")
    assert settings.engine_config == EngineSettings(max_step_tokens=8192, chunk_tokens=2048, prefix_cache=True)


@pytest.mark.parametrize("file", sorted((REPOSITORY / "models/qwen3_moe/config").glob("*.yaml")), ids=lambda f: f.stem)
def test_shipped_yaml_loads(file):
    settings = load_settings(file)
    assert resolve_path(settings.model_path).is_dir()


@pytest.mark.parametrize("section", SECTIONS)
def test_empty_section_has_defaults(section, yaml_file):
    yaml_file.write_text(f"model_name: m\nmodel_path: p\n{section}:\n")
    assert value_of(load_settings(yaml_file), section) == SECTIONS[section]()


@pytest.mark.parametrize(
    ("misspelt", "nearest"),
    [
        ("model_nam", "model_name"),
        ("exec_mode", "exe_mode"),
        ("devise", "device"),
        ("log_levle", "log_level"),
        ("modell_config", "model_config"),
        ("data_confg", "data_config"),
        ("batch_size", "data_config.batch_size"),
        ("max_new_token", "data_config.max_new_tokens"),
        ("model_config.dtypes", "model_config.dtype"),
        ("model_config.with_ckp", "model_config.with_ckpt"),
        ("model_config.rope_scalling", "model_config.rope_scaling"),
        ("data_config.batchsize", "data_config.batch_size"),
        ("data_config.max_new_token", "data_config.max_new_tokens"),
        ("data_config.temprature", "data_config.temperature"),
        ("data_config.Seed", "data_config.seed"),
        ("parallel_config.atn_tp_size", "parallel_config.attn_tp_size"),
        ("engine_config.max_step_token", "engine_config.max_step_tokens"),
        ("engine_config.prefixcache", "engine_config.prefix_cache"),
        ("chunk_tokens", "engine_config.chunk_tokens"),
        ("engine_confg", "engine_config"),
        ("data_config.zzzzzz", "data_config."),
        ("zzzzzz", ""),
    ],
)
@pytest.mark.parametrize("by_override", [False, True])
def test_misspelt_key(misspelt, nearest, by_override, yaml_file):
    section, _, key = misspelt.rpartition(".")
    if by_override:
        line = refusal(yaml_file, f"{misspelt}=1")
    else:
        entry = f"{section}: {{{key}: 1}}" if section else f"{key}: 1"
        yaml_file.write_text(f"model_name: m\nmodel_path: p\n{entry}\n")
        line = refusal(yaml_file)
    where = f"--set {misspelt}=1" if by_override else str(yaml_file)
    assert line.startswith(f"{where}: {misspelt}: unknown key"), line
    assert line.rstrip("?").split()[-1].startswith(nearest), line
    known = typing.get_type_hints(Settings) | {
        f"{s}.{k}": 0 for s in SECTIONS for k in typing.get_type_hints(SECTIONS[s])
    }
    assert line.rstrip("?").split()[-1] in known


def test_key_in_wrong_section(yaml_file):
    top_level = {name for name in typing.get_type_hints(Settings) if name not in SECTIONS}
    homes = {key: key for key in top_level}
    homes |= {key: f"{section}.{key}" for section, kind in SECTIONS.items() for key in typing.get_type_hints(kind)}
    for key, right in homes.items():
        for section in SECTIONS:
            if right != f"{section}.{key}":
                line = refusal(yaml_file, f"{section}.{key}=1")
                assert line.endswith(f"{section}.{key}: unknown key; did you mean {right}?"), line


@pytest.mark.parametrize(
    ("key", "right"),
    [
        ("max_model_len", "data_config.input_max_len"),
        ("data_config.max_tokens", "data_config.max_new_tokens"),
        ("tensor_parallel_size", "parallel_config.attn_tp_size"),
        ("gpu_memory_utilization", "model_config.cache_memory_fraction"),
    ],
)
def test_foreign_key(key, right, yaml_file):
    assert f": {key}: unknown key; " in (line := refusal(yaml_file, f"{key}=1")) and right in line


@pytest.mark.parametrize(
    ("setting", "right"),
    [("device=gpu", "cuda"), ("device=cuda:0", "cuda"), ("model_config.dtype=torch.bfloat16", "bfloat16")],
)
def test_foreign_value(setting, right, yaml_file):
    assert refusal(yaml_file, setting).endswith(f"; did you mean {right}?")


@pytest.mark.parametrize("key", ["model_name", "model_path"])
def test_missing_key(key, yaml_file):
    yaml_file.write_text(GOOD.replace(f"{key}:", "#"))
    assert f"{yaml_file}: {key}: missing" in refusal(yaml_file)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("model_name", ["3", "true", "null", "[a]"]),
        ("world_size", ["two", "1.0", "true", "null", "'1'"]),
        ("exe_mode", ["fast", "1", "null", "[eager]", "Eager"]),
        ("device", ["gpu", "true"]),
        ("log_level", ["info", "2"]),
        ("model_config", ["3", "[dtype]", "float32"]),
        ("model_config.dtype", ["fp32", "int8", "null"]),
        ("model_config.with_ckpt", ["1", "'True'", "null"]),
        ("model_config.rope_scaling", ["yarn", "4.0", "[yarn]"]),
        ("model_config.cache_memory_fraction", ["most", "true", "null", "[0.5]"]),
        ("model_config.cache_tokens", ["4k", "1e4", "true", "2.5"]),
        ("data_config.dataset", ["longbench", "csv", "null"]),
        ("data_config.dataset_path", ["3", "[a]"]),
        ("data_config.text_field", ["null", "1"]),
        ("data_config.batch_size", ["true", "1.5", "'4'", "null"]),
        ("data_config.temperature", ["hot", "false", "null", "{a: 1}"]),
        ("data_config.seed", ["x", "true", "1.5"]),
        ("data_config.stop", ["end", "[1]", "[a, null]", "null", "{a: b}"]),
        ("data_config.ignore_eos", ["0", "'no'"]),
        ("parallel_config.moe_tp_size", ["true", "one"]),
        ("engine_config", ["3", "prefix_cache"]),
        ("engine_config.max_step_tokens", ["many", "true", "1.5", "null"]),
        ("engine_config.chunk_tokens", ["2k", "null"]),
        ("engine_config.prefix_cache", ["1", "'on'", "null"]),
    ],
)
def test_wrong_type(key, values, yaml_file):
    for value in values:
        line = refusal(yaml_file, f"{key}={value}")
        assert f": {key}: " in line and ("expected" in line or "not one of" in line), line


PARALLEL_SIZES = ("attn_tp", "moe_tp", "embed_tp", "lmhead_tp", "attn_dp", "moe_ep")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((f"data_config.{key}", v) for key in ("input_max_len", "batch_size", "max_new_tokens") for v in (0, -1)),
        ("data_config.max_prompts", 0),
        ("model_config.cache_tokens", 0),
        *(("model_config.cache_memory_fraction", v) for v in (0.0, -0.1, 1.01, ".nan", ".inf")),
        *(("world_size", v) for v in (0, -1)),
        *((f"parallel_config.{key}_size", v) for key in PARALLEL_SIZES for v in (0, -2, 65_537)),
        *((f"data_config.{key}", 2**31) for key in ("input_max_len", "batch_size", "max_new_tokens")),
        *((f"data_config.{key}", 2**31) for key in ("max_prompts", "top_k")),
        ("model_config.cache_tokens", 2**31),
        *((f"engine_config.{key}", v) for key in ("max_step_tokens", "chunk_tokens") for v in (0, -1, 2**31)),
        ("world_size", 10**12),
        *((f"data_config.{key}", ".nan") for key in ("temperature", "top_p", "min_p", "repetition_penalty")),
        *(("data_config.temperature", v) for v in (-1.0, 1e-06, ".inf")),
        *(("data_config.seed", v) for v in (-1, 2**63)),
        ("data_config.top_k", -3),
        ("data_config.top_p", 0.0),
        ("data_config.min_p", 1.0),
        ("data_config.repetition_penalty", 1000.0),
    ],
)
def test_size_out_of_range(key, value, yaml_file):
    problem = f": {key}: {str(value).strip('.')} is impossible, must be "
    assert refusal(yaml_file, f"{key}={value}").startswith(f"--set {key}={value}{problem}")
    section, _, name = key.rpartition(".")
    settings = yaml.safe_load(GOOD)
    (settings.setdefault(section, {}) if section else settings)[name] = yaml.safe_load(str(value))
    yaml_file.write_text(yaml.safe_dump(settings))
    assert refusal(yaml_file).startswith(f"{yaml_file}{problem}")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "expected keys and values"),
        ("just text", "expected keys and values"),
        ("- model_name: m", "expected keys and values"),
        ("model_name: [m", "not valid YAML"),
        ("model_name: m\n\tmodel_path: p", "not valid YAML"),
        ("model_name: m\nmodel_name: n\n", "'model_name' is a duplicate, again in line 2"),
        (
            "model_name: m\nmodel_path: p\ndata_config:\n  seed: 1\n  top_k: 2\n  seed: 3\n",
            "'seed' is a duplicate, again in line 6",
        ),
        ("model_name: m\nmodel_path: p\ndata_config:\ndata_config:\n", "'data_config' is a duplicate"),
        ("model_name: m\nmodel_path: p\n1: 2\n", "1: unknown key"),
        ("model_name: m\nmodel_path: p\n? [a, b]\n: 2\n", "not valid YAML"),
        ("model_name: 2020-13-45\nmodel_path: p\n", "not valid YAML"),
        ("model_name: !!python/name:os.system\n", "not valid YAML"),
        (b"model_name: \xff\xfe", "cannot be read: 'utf-8' codec"),
        (b"model_name: \x00", "not valid YAML"),
    ],
)
def test_invalid_yaml(content, named, yaml_file):
    yaml_file.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refusal(yaml_file)
    assert line.startswith(f"{yaml_file}: ") and named in line, line


@pytest.mark.parametrize("name", ["none.yaml", "."])
def test_no_such_file(name, tmp_path):
    assert refusal(tmp_path / name) == f"{tmp_path / name}: no such YAML file"


@pytest.mark.parametrize(("key", "value"), LITERALS)
def test_every_literal_value(key, value, yaml_file):
    assert value_of(load_settings(yaml_file, [f"{key}={value}"]), key) == value


def test_settings_round_trip(yaml_file):
    settings = load_settings(yaml_file, ["data_config.stop=[a]", "model_config.rope_scaling={rope_type: linear}"])
    assert settings_from_dict(dataclasses.asdict(settings), "again") == settings


def test_engine_settings_reach_the_engine():
    """By their own names; a chunk is no larger than a step."""
    own = {"max_step_tokens": 300, "chunk_tokens": 40, "prefix_cache": False}
    for settings, expected in (
        ({}, (8192, 2048, True)),
        (own, (300, 40, False)),
        ({"chunk_tokens": 9000}, (8192, 8192, True)),
    ):
        [scheduler] = LLM("models/qwen3_moe/demo", device="cpu", **settings).engine.schedulers
        assert (scheduler.max_step_tokens, scheduler.chunk_tokens, scheduler.prefix_cache) == expected


def test_settings_are_frozen(yaml_file):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_settings(yaml_file).data_config.seed = 3


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_new_token": 3}, "LLM: max_new_token: unknown setting; did you mean data_config.max_new_tokens?"),
        ({"exec_mode": "eager"}, "LLM: exec_mode: unknown setting; did you mean exe_mode?"),
        ({"model_config": {"dtype": "float32"}}, "LLM: model_config: "),
        ({"batch_size": 0}, "LLM: data_config.batch_size: 0 is impossible"),
        ({"dtype": "int8"}, "LLM: model_config.dtype: 'int8' is not one of"),
        ({"device": "tpu"}, "LLM: device: 'tpu' is not one of"),
        ({"exe_mode": "graph", "device": "cpu"}, "exe_mode: graph is not possible on device cpu"),
    ],
)
def test_llm_rejects_invalid_settings(settings, named):
    with pytest.raises(ValueError, match="^" + named.replace("?", r"\?")) as error:
        LLM("models/qwen3_moe/demo", **settings)
    assert "did you mean model_config?" not in str(error.value)


IMPOSSIBLE_NAMES = ["a/b", "..", ".", "''", "n" * 101, "名" * 67, '"a\\0"', '"a\\eb"', '"a\\nb"', '"\\ud83d"']


@pytest.mark.parametrize("name", IMPOSSIBLE_NAMES)
def test_model_name_stays_in_the_result_folder(name, yaml_file):
    assert ": model_name: " in refusal(yaml_file, f"model_name={name}")


@pytest.mark.parametrize("name", ["n" * 100, "名 字" * 20, "Qwen3 (30B)", "...", "-x"])
def test_model_name_with_unicode(name, yaml_file):
    assert load_settings(yaml_file, [f"model_name='{name}'"]).model_name == name


def test_output_dir(yaml_file):
    assert load_settings(yaml_file).output_dir is None
    assert load_settings(yaml_file, ["output_dir=~/my results"]).output_dir == "~/my results"
    for value in ("3", "[a]", "''", '"a\\0"', '"\\ud83d"'):
        assert ": output_dir: " in refusal(yaml_file, f"output_dir={value}")
