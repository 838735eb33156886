# SPDX-License-Identifier: Apache-2.0
"""Hostile prompt files, LongBench folders, archives and templates: damaged, huge or malformed."""

import json
import os
import struct
import zipfile
from pathlib import Path

import pytest

from executor.config import DataSettings
from executor.utils import data_utils
from executor.utils.data_utils import build_dataset_input, load_prompts, source_files

RECORD = {"context": "some text", "input": "why?", "length": 3, "answers": ["a", {"b": "c"}]}
DEEP = "[" * 50_000
HALF = '"\\ud83d"'  # half of an emoji, as JSON writes it
DIGITS = "9" * 5_000


def refusal(**data) -> str:
    """The one-line error of these data settings."""
    with pytest.raises(ValueError) as error:
        load_prompts(DataSettings(**data))
    assert len(str(error.value)) <= 400 and str(error.value).isprintable(), error.value
    return str(error.value)


# Prompt files


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (f'["a", {HALF}]', "prompt 2: half of a surrogate pair, '\\ud83d', at character 1"),
        ('["a", "b\\udc00"]', "prompt 2: half of a surrogate pair, '\\udc00', at character 2"),
        (HALF, "prompt 1: half of a surrogate pair"),
        ('["a", 3]', "prompt 2: expected a text that is not empty, got 3"),
        ('["a", NaN]', "prompt 2: expected a text that is not empty, got nan"),
        ('["a", ""]', "prompt 2: expected a text"),
        (f'["a", {[[0] * 1000] * 1000}]', "prompt 2: expected a text that is not empty, got a list of 1000 entries"),
        (DEEP, "not valid JSON: nested too deeply"),
        ('{"a": ' * 50_000, "not valid JSON: nested too deeply"),
        (f"[{DIGITS}]", "not valid JSON: Exceeds the limit"),
        ('"' + "a" * (16 << 20) + 'b"', "prompt 1: a prompt of more than 16777216 characters"),
        (b'"\xed\xa0\xbd"', "cannot be read: 'utf-8' codec"),
        ("\0", "not valid JSON"),
    ],
    ids=range(13),
)
def test_default_file(content, named, tmp_path):
    file = tmp_path / "p.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refusal(dataset_path=str(file))
    assert line.startswith(f"{file}: ") and named in line, line


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (f'{{"text": {HALF}}}', "half of a surrogate pair"),
        (b'{"text": "\xed\xa0\xbd"}', "half of a surrogate pair"),
        (b'{"text": "\xff"}', "not valid JSON: 'utf-8' codec"),
        (f'{{"text": {DEEP}', "not valid JSON: nested too deeply"),
        (f'{{"text": {DIGITS}}}', "not valid JSON: Exceeds the limit"),
        ('{"' + "k" * 10**6 + '": 1}', "the fields are kkk"),
        (json.dumps(dict.fromkeys(map(str, range(10_000)))), "the fields are 0, 1, 2"),
        ('{"\\u001b[31m": 1}', "the fields are \\x1b[31m"),
        ("[1]", "expected a JSON object"),
        ("a" * (64 << 20) + "b", "longer than 64 MiB"),
        ("\n" * 100_001, "more than 100000 empty lines"),
    ],
    ids=range(11),
)
@pytest.mark.parametrize("layout", ["jsonl", "folder", "archive"])
def test_line_of_a_jsonl_file(layout, line, named, tmp_path):
    content = b'{"text": "a"}\n' + (line if isinstance(line, bytes) else line.encode())
    if layout == "jsonl":
        (tmp_path / "p.jsonl").write_bytes(content)
        found = refusal(dataset="jsonl", dataset_path=str(tmp_path / "p.jsonl"))
        assert found.startswith(f"{tmp_path / 'p.jsonl'}: line ") and named in found, found
        return
    if layout == "folder":
        (tmp_path / "x.jsonl").write_bytes(content)
    else:
        with zipfile.ZipFile(tmp_path / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("data/x.jsonl", content)
    found = refusal(dataset="LongBench", dataset_path=str(tmp_path), longbench_task="x", prompt_template="{text}")
    assert found.startswith(str(tmp_path)) and "x.jsonl: line " in found, found
    assert named.replace("the fields", "does not fit, the record's fields") in found, found


def test_number_instead_of_text(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"text": NaN}')
    line = refusal(dataset="jsonl", dataset_path=str(tmp_path / "p.jsonl"))
    assert "line 1: data_config.text_field 'text' is no text there" in line


def test_lines_after_max_prompts_are_not_read(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"text": "a"}\n{"text": "b"}\nnothing\n')
    data = {"dataset": "jsonl", "dataset_path": str(file)}
    assert load_prompts(DataSettings(max_prompts=2, **data)) == ["a", "b"]
    assert "line 3: not valid JSON" in refusal(max_prompts=3, **data)


def test_byte_order_mark_and_non_finite_numbers(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('\ufeff{"text": "a", "score": NaN, "id": 1e999}\r\n', encoding="utf-8")
    assert load_prompts(DataSettings(dataset="jsonl", dataset_path=str(file))) == ["a"]


@pytest.mark.parametrize("dataset", ["default", "jsonl", "LongBench"])
@pytest.mark.parametrize("kind", ["fifo", "loop", "dangling", "device", "long name", "deep name", "null", "home"])
def test_path_is_not_a_file(kind, dataset, tmp_path):
    file = tmp_path / "p"
    given = {"long name": "n" * 300, "deep name": "a/" * 5000, "null": "a\0b", "home": "~nobody_of_that_name/x"}
    if kind == "fifo":
        os.mkfifo(file)
    elif kind in ("loop", "dangling", "device"):
        file.symlink_to({"loop": file, "dangling": tmp_path / "gone", "device": "/dev/zero"}[kind])
    line = refusal(dataset=dataset, dataset_path=given.get(kind, str(file)))
    assert line.startswith("data_config.dataset_path: ") or line == f"{file}: cannot be read: not a file", line


@pytest.mark.parametrize("kind", ["fifo", "loop", "dangling", "device", "folder"])
def test_task_is_not_a_file(kind, tmp_path):
    file = tmp_path / "x.jsonl"
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to({"loop": file, "dangling": tmp_path / "gone", "device": "/dev/zero"}[kind])
    line = refusal(dataset="LongBench", dataset_path=str(tmp_path), longbench_task="x")
    assert line.startswith(f"{file}: cannot be read: "), line


ODD_TASKS = ["../x", "*", "", ".", "/etc/passwd", "a\0", "n" * 300, "x.jsonl", "data/x", "\x1b[31m"]


@pytest.mark.parametrize("task", ODD_TASKS)
@pytest.mark.parametrize("layout", ["folder", "archive"])
def test_invalid_task_name(task, layout, tmp_path):
    folder = tmp_path / "bench"
    folder.mkdir()
    (tmp_path / "x.jsonl").write_text(json.dumps(RECORD))
    if layout == "folder":
        (folder / "y.jsonl").write_text(json.dumps(RECORD))
    else:
        with zipfile.ZipFile(folder / "data.zip", "w") as archive:
            archive.writestr("data/y.jsonl", json.dumps(RECORD))
    line = refusal(dataset="LongBench", dataset_path=str(folder), longbench_task=task)
    assert line.startswith("data_config.longbench_task: ") and line.endswith("which has y"), line


def test_task_list_is_bounded(tmp_path):
    for number in range(500):
        (tmp_path / f"task_{number}.jsonl").touch()
    (tmp_path / "\x1b[31m.jsonl").touch()
    assert "is not in" in refusal(dataset="LongBench", dataset_path=str(tmp_path))


# Archives


def write_archive(folder: Path, content: bytes = json.dumps(RECORD).encode(), **changed: int) -> None:
    """Writes data.zip with the task x; `changed` overwrites fields of both headers."""
    with zipfile.ZipFile(folder / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/x.jsonl", content)
    data = bytearray((folder / "data.zip").read_bytes())
    local, central = 0, data.index(b"PK\x01\x02")
    places = {"flags": (6, 8, "<H"), "method": (8, 10, "<H"), "crc": (14, 16, "<I"), "size": (22, 24, "<I")}
    for field, value in changed.items():
        in_local, in_central, form = places[field]
        struct.pack_into(form, data, local + in_local, value)
        struct.pack_into(form, data, central + in_central, value)
    (folder / "data.zip").write_bytes(data)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"flags": 1}, "encrypted"),
        ({"method": 99}, "compression"),
        ({"method": 0}, "damaged"),
        ({"crc": 7}, "Bad CRC-32"),
        ({"size": 5}, "Bad CRC-32"),
        ({"size": 0xFFFFFFF0}, "larger than 512 MiB when unpacked"),
    ],
)
def test_archive_with_invalid_headers(changed, named, tmp_path):
    write_archive(tmp_path, **changed)
    line = refusal(dataset="LongBench", dataset_path=str(tmp_path), longbench_task="x")
    assert line.startswith(f"{tmp_path / 'data.zip'}: data/x.jsonl: ") and named in line, line


def test_zip_bomb(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "data.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("x.jsonl", "w", force_zip64=True) as member,
    ):
        for _ in range(513):
            member.write(bytes(1 << 20))
    line = refusal(dataset="LongBench", dataset_path=str(tmp_path), longbench_task="x")
    assert line == f"{tmp_path / 'data.zip'}: x.jsonl: larger than 512 MiB when unpacked"


@pytest.mark.parametrize("member", ["../../x.jsonl", "/x.jsonl", "x.jsonl\0.txt", "data/\x1b[31m/x.jsonl"])
def test_archive_with_unsafe_names(member, tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr(member.replace("\0", "#"), json.dumps(RECORD))
    file = tmp_path / "data.zip"
    file.write_bytes(file.read_bytes().replace(b"#", b"\0"))
    data = DataSettings(dataset="LongBench", dataset_path=str(tmp_path), longbench_task="x", prompt_template="{input}")
    assert load_prompts(data) == ["why?"]  # read in place, never extracted


@pytest.mark.parametrize("cut", [0, 1, 10, 40, 80, 120, -1, -10, -22])
def test_truncated_archive(cut, tmp_path):
    write_archive(tmp_path, json.dumps({"context": "a" * 100}).encode())
    file = tmp_path / "data.zip"
    file.write_bytes(file.read_bytes()[:cut])
    line = refusal(dataset="LongBench", dataset_path=str(tmp_path), longbench_task="x")
    assert line.startswith(f"{file}: damaged") and "download" in line, line


# Templates


@pytest.mark.parametrize(
    "template",
    [
        "{context.__class__}",
        "{context.__class__.__mro__}",
        "{answers[1].b}",
        "{context:>9999999999}",
        "{context:99999}",
        "{length:.99999999f}",
        "{context:{length}}",
        "{context!q}",
        "{context!}",
        "{0}",
        "{}",
        "{context",
        "context}",
        "{{context}",
        "{{{context}}",
        "{[0]}",
        "{context[}",
        "{" * 9_999,
        "{" + "a" * 10**5 + ".b}",
        "{\x1b[31m.a}",
    ],
    ids=range(20),
)
def test_invalid_template_is_rejected_before_reading_files(template):
    line = refusal(dataset="jsonl", dataset_path="no/such", prompt_template=template)
    assert line.startswith("data_config.prompt_template: "), line
    with pytest.raises(ValueError, match="the record's fields are context, input, length, answers$"):
        build_dataset_input(RECORD, template)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{context}{input}", "some textwhy?"),
        ("{{{context}}} {{}}", "{some text} {}"),
        ("{context!r} {context!s:.4} {context!a}", "'some text' some 'some text'"),
        ("{context:.4}|{context:>12}|{context:*^13}|", "some|   some text|**some text**|"),
        ("{length:05d} {length:+.2f} {length:x}", "00003 +3.00 3"),
        ("{answers[0]} {answers[1][b]}", "a c"),
        ("{answers}", "['a', {'b': 'c'}]"),
        ("no field", "no field"),
    ],
)
def test_valid_templates(template, expected):
    assert build_dataset_input(RECORD, template) == expected


def test_template_with_unusual_field_names():
    assert build_dataset_input({"my field": 1, "é": 2, "a-b": 3}, "{my field}{é}{a-b}") == "123"


@pytest.mark.parametrize("template", ["{context}" * 1000, "{length:.9999999f}" * 1000, "a" * (17 << 20) + "{context}"])
def test_template_with_huge_result(template):
    record = RECORD | {"context": "a" * (1 << 20)}
    with pytest.raises(ValueError, match="a prompt of more than 16777216 characters does not fit"):
        build_dataset_input(record, template)


def test_template_error_names_the_line(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(f'{json.dumps(RECORD)}\n{{"other": 1}}\n')
    line = refusal(dataset="jsonl", dataset_path=str(file), prompt_template="{context}")
    problem = "'context' does not fit, the record's fields are other"
    assert line == f"{file}: line 2: data_config.prompt_template: {problem}"


# Source files


def test_source_files(tmp_path, monkeypatch):
    monkeypatch.setattr(data_utils, "LONGBENCH_FOLDER", tmp_path / "none")
    assert source_files(DataSettings()) == [data_utils.DEFAULT_PROMPTS]
    assert source_files(DataSettings(dataset="LongBench")) == []  # fetched from the hub
    file = tmp_path / "p.jsonl"
    file.touch()
    for dataset in ("default", "jsonl"):
        assert source_files(DataSettings(dataset=dataset, dataset_path=str(file))) == [file]
    bench = tmp_path / "bench"
    bench.mkdir()
    data = DataSettings(dataset="LongBench", longbench_task="x", dataset_path=str(bench))
    assert source_files(data) == []
    write_archive(bench)
    assert source_files(data) == [bench / "data.zip"]
    (bench / "x.jsonl").touch()
    assert source_files(data) == [bench / "x.jsonl"]
