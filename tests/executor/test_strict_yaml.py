# SPDX-License-Identifier: Apache-2.0
"""Hostile YAML files: too large, too deep, damaged or ambiguous; unreadable files and invalid paths."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from executor.config import load_settings, resolve_path

GOOD = """
model_name: tiny
model_path: somewhere
model_config:
    dtype: float32
data_config:
    max_new_tokens: 5
    batch_size: 2
"""


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    file = tmp_path / "good.yaml"
    file.write_text(GOOD)
    return file


def refusal(file: Path) -> str:
    """The one-line error of a YAML file."""
    with pytest.raises(ValueError) as error:
        load_settings(file)
    assert str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def levels(count: int, width: int) -> str:
    """Alias bomb: width**count values in count lines."""
    lines = [f"l0: &l0 [{', '.join('x' * width)}]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * width)}]" for n in range(1, count)]
    return "\n".join(lines)


HOSTILE = {
    "lists in lists": ("model_name: " + "[" * 5000, "nested more than 50 deep"),
    "mappings in mappings": ("{a: " * 5000, "nested more than 50 deep"),
    "blocks in blocks": ("".join(" " * n + "a:\n" for n in range(500)), "nested more than 50 deep"),
    "dashes": ("- " * 5000, "nested more than 50 deep"),
    "aliases of aliases": (levels(9, 10), "more than 10000 keys and values"),
    "a chain of aliases": ("l0: &l0 [x]\n" + "".join(f"l{n}: &l{n} [*l{n - 1}]\n" for n in range(1, 60)), "50 deep"),
    "merges of merges": (
        "l0: &l0 {a: 1}\n" + "".join(f"l{n}: &l{n} {{<<: [{f'*l{n - 1}, ' * 10}]}}\n" for n in range(1, 9)),
        "more than 10000 keys and values",
    ),
    "a list in itself": ("model_name: &a [*a]", "a recursive alias"),
    "a mapping in itself": ("&a {model_name: *a}", "a recursive alias"),
    "a merge of itself": ("model_name: &a {<<: *a}", "a recursive alias"),
    "an alias of nothing": ("model_name: *a", "undefined alias"),
    "a long list": ("model_name: [" + "a, " * 20_000 + "]", "more than 10000 keys and values"),
    "5000 digits": ("world_size: " + "9" * 5000, "is not a valid int"),
    "400 digits": (
        "model_name: m\nmodel_path: p\nworld_size: " + "9" * 400,
        "world_size: a number of 1329 bits is impossible",
    ),
    "100000 hexadecimal digits": (
        "model_name: m\nmodel_path: p\nworld_size: 0x" + "f" * 100_000,
        "world_size: a number of 400000 bits is impossible",
    ),
    "400 digits as a float": (
        "model_name: m\nmodel_path: p\ndata_config: {temperature: " + "9" * 400 + "}",
        "data_config.temperature: expected float, got a number of",
    ),
    "minutes and seconds": ("model_name: m\nmodel_path: p\nworld_size: 1:30", "world_size: expected int, got '1:30'"),
    "a date": ("model_name: 2024-02-03\nmodel_path: p", "model_name: expected str, got datetime.date"),
    "month 13": ("model_name: 2020-13-45", "'2020-13-45' is not a valid timestamp"),
    "bytes": ("model_name: !!binary aGk=\nmodel_path: p", "model_name: expected str, got b'hi'"),
    "not base64": ("model_name: !!binary é", "not valid YAML"),
    "an empty int": ("world_size: !!int ''", "'' is not a valid int"),
    "no bool": ("model_name: !!bool x", "'x' is not a valid bool"),
    "no timestamp": ("model_name: !!timestamp x", "'x' is not a valid timestamp"),
    "a Python object": ("model_name: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "an unknown tag": ("model_name: !" + "a" * 10_000 + " x", "could not determine a constructor"),
    "a set": ("model_name: !!set {a, b}\nmodel_path: p", "model_name: expected str"),
    "two documents": ("model_name: m\n---\nmodel_path: p", "another document"),
    "a long key": ("a" * 10**6 + ": 1", "not valid YAML"),
    "a long explicit key": ("? " + "a" * 10**6 + "\n: 1", "unknown key"),
    "a key of escapes": ('"a\\e[31m": 1', "a\\x1b[31m: unknown key"),
    "too large": ("#" * 2**20 + "\n" + GOOD, "larger than 1 MiB"),
    "UTF-16": (GOOD.encode("utf-16"), "cannot be read: 'utf-8' codec"),
    "a null character": ("model_name: m\0", "special characters are not allowed"),
    "an escaped null character": ('model_name: m\nmodel_path: "a\\0"', "model_path: 'a\\x00' is impossible"),
    "half a surrogate pair": ('model_name: m\nmodel_path: "\\ud83d"', "model_path: '\\ud83d' holds half of a"),
    "a date as a rope parameter": (
        "model_name: m\nmodel_path: p\nmodel_config: {rope_scaling: {factor: 2024-02-03}}",
        "model_config.rope_scaling: datetime.date(2024, 2, 3) is impossible",
    ),
    "infinity as a rope parameter": (
        "model_name: m\nmodel_path: p\nmodel_config: {rope_scaling: {factor: [.inf]}}",
        "model_config.rope_scaling: inf is impossible, must be a finite number",
    ),
    "a number as a rope key": (
        "model_name: m\nmodel_path: p\nmodel_config: {rope_scaling: {1: 2}}",
        "model_config.rope_scaling: expected text keys, got 1",
    ),
    "null as a key": ("model_name: m\nmodel_path: p\nnull: 1", "None: unknown key"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file(case, yaml_file):
    content, named = HOSTILE[case]
    yaml_file.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refusal(yaml_file)
    assert line.startswith(f"{yaml_file}: ") and named in line and len(line) <= 400 and line.isprintable(), line


def test_anchors_merges_and_byte_order_mark(yaml_file):
    merged = GOOD + "    <<: {seed: 3, batch_size: 7}\nmodel_config: &m {dtype: float32}\n"
    merged = merged.replace("model_config:\n    dtype: float32\n", "")
    yaml_file.write_text("\ufeff" + merged, encoding="utf-8")
    settings = load_settings(yaml_file)
    assert (settings.data_config.seed, settings.data_config.batch_size) == (3, 2)
    assert settings.model_config.dtype == "float32"


def test_repeated_merge_is_no_duplicate_key(yaml_file):
    yaml_file.write_text(
        "model_name: m\nmodel_path: p\nmodel_config: {rope_scaling: "
        "{a: &a {x: 1}, b: &b {<<: *a, x: 2}, c: {<<: *b}, d: {<<: [*b, *a], y: 3}}}"
    )
    rope = load_settings(yaml_file).model_config.rope_scaling
    assert rope == {"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 2}, "d": {"x": 2, "y": 3}}


@pytest.mark.parametrize("kind", ["fifo", "loop", "dangling", "folder", "long name", "device"])
def test_yaml_path_is_not_a_file(kind, tmp_path):
    file = tmp_path / ("n" * 300 if kind == "long name" else "x.yaml")
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind in ("loop", "dangling", "device"):
        file.symlink_to({"loop": file, "dangling": tmp_path / "gone", "device": "/dev/zero"}[kind])
    line = refusal(file)
    assert line.startswith(str(file)[:50]) and ("no such YAML file" in line or "File name too long" in line), line


@contextlib.contextmanager
def no_rights() -> Iterator[None]:
    """Drops root's privileges, for which no file is unreadable."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_permission_denied():
    with tempfile.TemporaryDirectory() as name:  # tmp_path is in a folder without access for others
        folder = Path(name)
        folder.chmod(0o755)
        file, inside = folder / "x.yaml", folder / "closed" / "x.yaml"
        inside.parent.mkdir()
        for path in (file, inside):
            path.write_text(GOOD)
        file.chmod(0)
        inside.parent.chmod(0)
        with no_rights():
            assert refusal(file) == f"{file}: cannot be read: Permission denied"
            assert refusal(inside) == f"{inside}: Permission denied"
        inside.parent.chmod(0o700)


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("~nobody_of_that_name/x", "Could not determine home directory"),
        ("a\0b", "a null character is impossible"),
        ("n" * 300, "File name too long"),
        ("a/" * 5000, "File name too long"),
        ("\ud83d", "surrogates not allowed"),
    ],
)
def test_invalid_path(path, named):
    with pytest.raises(ValueError, match=named) as error:
        resolve_path(path)
    assert len(str(error.value)) <= 400 and str(error.value).isprintable()
