# SPDX-License-Identifier: Apache-2.0
"""Overrides (`--set section.key=value`): parsing, and errors that name the override."""

from pathlib import Path

import pytest

from executor.config import load_settings

GOOD = """
model_name: tiny
model_path: somewhere
data_config:
    batch_size: 2
"""


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


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("", "expected section.key=value"),
        ("data_config.seed", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        (".seed=3", "expected section.key=value"),
        ("data_config.=3", "expected section.key=value"),
        ("model_config.rope_scaling.factor=3", "expected section.key=value"),
        ("data_config.stop=[a", "not a valid YAML value"),
        ("data_config.seed={a: 1, a: 2}", "not a valid YAML value"),
        ("data_config.seed=2020-13-45", "not a valid YAML value"),
        ("model_name.seed=3", "model_name is not a section"),
    ],
)
def test_invalid_override(override, named, yaml_file):
    line = refusal(yaml_file, override)
    assert line.startswith(f"--set {override}: ") and named in line, line


@pytest.mark.parametrize(
    ("overrides", "blamed"),
    [
        (["device=cpu", "data_config.batch_size=0"], "--set data_config.batch_size=0: data_config.batch_size: 0 is"),
        (["data_config={batch_size: 0}"], "--set data_config={batch_size: 0}: data_config.batch_size: "),
        (["data_config={batch_sise: 1}"], "--set data_config={batch_sise: 1}: data_config.batch_sise: unknown key"),
        (["data_config.seed=3", "data_config={seed: x}"], "--set data_config={seed: x}: data_config.seed: "),
        (["data_config={seed: 3}", "data_config.seed=x"], "--set data_config.seed=x: data_config.seed: "),
        (["data_config.temperature=-1"], "--set data_config.temperature=-1: data_config.temperature: "),
        (["data_config.stop=['']"], "--set data_config.stop=['']: data_config.stop: "),
        (["model_config=float32"], "--set model_config=float32: model_config: expected a section"),
        (["model_name=null"], "--set model_name=null: model_name: expected str"),
        (["data_config.seed=0", "device=gpu"], "--set device=gpu: device: 'gpu' is not one of"),
        (["model_config.cache_tokens=" + "[" * 5000], "--set model_config.cache_tokens=[[["),
        (["data_config.batch_size=" + "9" * 400], "--set data_config.batch_size=999"),
        (["x" * 10**5 + "=1"], "--set xxx"),
        (["x" * 10**5], "--set xxx"),
    ],
)
def test_error_names_the_override(overrides, blamed, yaml_file):
    line = refusal(yaml_file, *overrides)
    assert line.startswith(blamed) and str(yaml_file) not in line and len(line) <= 400, line


def test_error_names_the_file_for_its_own_values(yaml_file):
    yaml_file.write_text(GOOD.replace("batch_size: 2", "batch_size: 0"))
    for override in ("data_config.seed=1", "model_config={dtype: float32}"):
        assert refusal(yaml_file, override).startswith(f"{yaml_file}: data_config.batch_size: 0 is impossible")


def test_overrides_must_be_a_list(yaml_file):
    for overrides in ("data_config.seed=1", [1], [b"data_config.seed=1"]):
        with pytest.raises(TypeError, match="overrides: expected a list of texts"):
            load_settings(yaml_file, overrides)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data_config.max_new_tokens=64", 64),
        (" data_config.max_new_tokens =64", 64),
        ("data_config.prompt_template=a=b={context}", "a=b={context}"),
        ("data_config.prompt_template='Answer: {input}'", "Answer: {input}"),
        ("data_config.stop=[a, 'b, c', '\n']", ["a", "b, c", " "]),
        ('data_config.stop=["\\n\\n"]', ["\n\n"]),
        ("data_config.stop=[]", []),
        ("data_config.seed=null", None),
        ("data_config.seed=", None),
        ("data_config.seed=0x10", 16),
        ("data_config.temperature=1e-3", 1e-3),
        ("data_config.temperature=1", 1.0),
        ("data_config.ignore_eos=True", True),
        ("data_config.dataset_path=~/x y.jsonl", "~/x y.jsonl"),
        ("model_config.cache_tokens=1_000", 1000),
        ("model_config.rope_scaling={rope_type: yarn, factor: 4.0}", {"rope_type": "yarn", "factor": 4.0}),
        ("model_name=other", "other"),
        ("parallel_config.attn_tp_size=1", 1),
    ],
)
def test_override_value(override, value, yaml_file):
    found = load_settings(yaml_file, [override])
    for part in override.partition("=")[0].strip().split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


def test_last_override_wins(yaml_file):
    settings = load_settings(yaml_file, ["data_config.seed=1", "device=cpu", "data_config.seed=2"])
    assert (settings.data_config.seed, settings.data_config.batch_size, settings.device) == (2, 2, "cpu")
