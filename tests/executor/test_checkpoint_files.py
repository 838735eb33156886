# SPDX-License-Identifier: Apache-2.0
"""Damaged or hostile checkpoint files, pipes and devices: a one-line error that names the file, without blocking."""

import json
import os
import shutil
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from executor.config import settings_from_dict
from executor.loading.before_loading import check_before_launch, load_config
from executor.loading.checkpoint import INDEX_NAME, SINGLE_NAME
from executor.loading.loader import load_parameters
from executor.loading.stored_model import check_tensors
from models.quantization.scheme import Scheme
from models.qwen3_moe.sharding import Layout
from models.qwen3_moe.weights import parameter_specs
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a single-file and a sharded checkpoint."""
    folder = tmp_path_factory.mktemp("made")
    make_checkpoint(folder / "single")
    make_checkpoint(folder / "sharded", max_shard_size="100KB")
    return folder


@pytest.fixture
def single(made, tmp_path) -> Path:
    return Path(shutil.copytree(made / "single", tmp_path / "single"))


@pytest.fixture
def sharded(made, tmp_path) -> Path:
    return Path(shutil.copytree(made / "sharded", tmp_path / "sharded"))


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """Fails a test that blocks on a pipe or reads a device forever."""

    def late(*_):
        pytest.fail("took more than 30 s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as error:
        specs = parameter_specs(load_config(folder), Layout())
        load_parameters(check_tensors(folder, specs, Scheme()), specs, torch.float32, torch.device("cpu"))
    line = str(error.value)
    assert line.isprintable() and len(line) <= 500, line
    return line


def put(file: Path, kind: str) -> None:
    """Replaces a file by something that is not a readable file."""
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to({"dangling": "nowhere", "loop": file.name, "device": "/dev/zero", "link": "."}[kind])


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling", "loop", "device", "link"])
@pytest.mark.parametrize("name", ["config.json", SINGLE_NAME])
def test_checkpoint_entries_that_are_not_files(name, kind, single):
    put(single / name, kind)
    assert str(single) in refusal(single) and name in refusal(single)


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling", "loop", "device"])
@pytest.mark.parametrize("which", [INDEX_NAME, "shard"])
def test_sharded_checkpoint_entries_that_are_not_files(which, kind, sharded):
    name = sorted(sharded.glob("*.safetensors"))[1].name if which == "shard" else which
    put(sharded / name, kind)
    line = refusal(sharded)
    assert str(sharded / INDEX_NAME) in line and name in line


def header(tensors: object, length: int | None = None) -> bytes:
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def of(start: int, end: int, shape: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HEADERS = {
    "length_beyond_file": header({}, 1 << 40),
    "length_all_bits": b"\xff" * 8 + b"{}",
    "length_zero": header({}, 0),
    "not_json": header(b"{" * 100),
    "deep": header(b'{"a":' + b"[" * 10**5),
    "not_utf8": header(b'{"\xff": 1}'),
    "list": header([1]),
    "overlapping": header({"a": of(0, 8, [2]), "b": of(4, 12, [2])}) + b"\0" * 12,
    "hole": header({"a": of(0, 8, [2]), "b": of(16, 24, [2])}) + b"\0" * 24,
    "beyond_the_end": header({"a": of(0, 80, [20])}) + b"\0" * 8,
    "reversed": header({"a": of(8, 0, [2])}) + b"\0" * 8,
    "negative": header({"a": of(-8, 0, [2])}) + b"\0" * 8,
    "size_differs": header({"a": of(0, 8, [3])}) + b"\0" * 8,
    "shape_overflows": header({"a": of(0, 8, [1 << 40, 1 << 40])}) + b"\0" * 8,
    "type_unknown": header({"a": of(0, 8, [2], "X9")}) + b"\0" * 8,
    "bytes_left_over": header({"a": of(0, 8, [2])}) + b"\0" * 16,
    "long_name": header({"n" * 10**6: of(0, 8, [2])}) + b"\0" * 8,
    "control_characters": header({"a\x1b[31m\r\n\ud800": of(0, 8, [2])}) + b"\0" * 8,
    "many_names": header({f"{i}": of(0, 0, [0]) for i in range(10**5)}),
    "many_dimensions": header({"a": of(0, 4, [1] * 10**5)}) + b"\0" * 4,
    "twice": header(b'{"a":%s,"a":%s}' % ((json.dumps(of(0, 8, [2])).encode(),) * 2)) + b"\0" * 8,
    "no_tensors": header({}),
    "pickle": b"\x80\x02ctorch._utils\n" + b"\0" * 100,
}


@pytest.mark.parametrize("kind", HEADERS)
def test_invalid_headers(kind, single):
    (single / SINGLE_NAME).write_bytes(HEADERS[kind])
    assert str(single) in refusal(single)


@pytest.mark.parametrize(
    "name",
    [
        *("../single/model.safetensors", "/etc/passwd", "a/../../x", "..", "", ".", "x" * 300, "x/" * 3000, "a\0b"),
        *("\x1b[31mred", "none.safetensors", "config.json", "\ud800", "https://example.org/x", "~root/x", "a\\..\\b"),
    ],
)
def test_invalid_file_names_in_an_index(name, sharded):
    index = json.loads((sharded / INDEX_NAME).read_text())
    index["weight_map"]["lm_head.weight"] = name
    (sharded / INDEX_NAME).write_text(json.dumps(index))
    line = refusal(sharded)
    assert line.startswith(str(sharded / (name if name == "config.json" else INDEX_NAME)))


def test_too_many_files_in_an_index(sharded):
    (sharded / INDEX_NAME).write_text(json.dumps({"weight_map": {str(i): f"{i}.safetensors" for i in range(10**5)}}))
    assert "names 100000 files, more than 2000" in refusal(sharded)


JSONS = {
    "empty": b"",
    "zeros": b"\0" * 1000,
    "not_utf8": b'{"a": "\xff"}',
    "utf16": '{"a": 1}'.encode("utf-16"),
    "deep": b"[" * 10**5,
    "deep_objects": b'{"a":' * 10**5,
    "long_number": b'{"a": ' + b"9" * 10**5 + b"}",
    "twice": b'{"weight_map": {}, "weight_map": {}}',
    "twice_within": b'{"rope_scaling": {"factor": 2.0, "factor": 4.0}}',
    "long_key_twice": b'{"%s": 1, "%s": 1}' % ((b"k" * 10**6,) * 2),
    "string": b'"x"',
    "null": b"null",
}


@pytest.mark.parametrize("kind", JSONS)
@pytest.mark.parametrize("name", ["config.json", INDEX_NAME])
def test_invalid_json_files(name, kind, sharded):
    (sharded / name).write_bytes(JSONS[kind])
    assert refusal(sharded).startswith(str(sharded / name))


def test_config_too_large(single):
    with (single / "config.json").open("wb") as stream:
        stream.truncate(1 << 40)  # sparse
    assert f"{single / 'config.json'}: cannot be read: larger than" in refusal(single)


@pytest.mark.parametrize("kind", JSONS)
def test_invalid_description_of_quantised_tensors(kind, single):
    file = single / "quant_model_description.json"
    file.write_bytes(JSONS[kind])
    assert refusal(single).startswith(str(file))


def test_several_descriptions_of_quantised_tensors(single):
    for name in ("quant_model_description.json", "quant_model_description_w8a8.json"):
        (single / name).write_text("{}")
    assert "has several descriptions (quant_model_description.json, quant_model_description_w8a8" in refusal(single)


@pytest.mark.parametrize(
    "path", ["x" * 300, "a/" * 3000, "x\0y", "~nobody_at_all/x", "/dev/zero", "/dev/null", "pipe", "loop"]
)
def test_paths_without_a_checkpoint(path, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    if path in ("pipe", "loop"):
        path = str(tmp_path / path)
    with pytest.raises(ValueError) as error:
        check_before_launch(settings_from_dict({"model_name": "m", "model_path": path}, "test"))
    line = str(error.value)
    assert line.isprintable() and len(line) <= 500 and ("model_path: " in line or path in line)
