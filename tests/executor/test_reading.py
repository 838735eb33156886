# SPDX-License-Identifier: Apache-2.0
"""Reading user files, and sanitizing text for display."""

import os
import random

import pytest

from executor.utils.reading import open_file, read_json, read_json_object, read_text, refusing
from executor.utils.text import one_line, printable, quoted


def test_one_line_is_bounded_and_keeps_both_ends():
    text = "begin " + "x\n\t y " * random.randint(1000, 2000) + " end"
    line = one_line(text, 100)
    assert len(line) <= 100 and line.startswith("begin x y") and line.endswith("x y end")
    assert one_line("a\n  b") == "a b" and one_line("é 東京 🎭") == "é 東京 🎭"


@pytest.mark.parametrize("character", ["\x1b", "\x07", "\x00", "\x9b", "\ud83d", "\x7f", "\u202e", "\u2066"])
def test_control_characters_are_escaped(character):
    assert character not in one_line(f"a{character}b") and character not in printable(f"a{character}b")
    printable(f"a{character}b").encode()
    assert printable("a\tb\nc") == "a\tb\nc" and printable("שלום\u200f \u200d") == "שלום\u200f \u200d"


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def test_quoted_values_are_short():
    for value in ("x" * 10**6, [1] * 10**6, {i: i for i in range(10**5)}, 10**5000, nested(10**5)):
        assert len(quoted(value)) <= 80


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "not valid JSON"),
        (b"\xff", "cannot be read"),
        (b"[" * 10**5, "nested too deeply"),
        (b"9" * 10**4, "not valid JSON"),
        (b"[]", "expected a JSON object"),
    ],
)
def test_invalid_json_names_the_file(content, problem, tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(ValueError) as raised:
        read_json_object(file)
    assert str(raised.value).startswith(f"{file}: ") and problem in str(raised.value)


@pytest.mark.parametrize("name", ["none", ".", "x" * 300, "\0"])
def test_unreadable_files(name, tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_text(tmp_path / name)
    (tmp_path / "large").write_bytes(b"1" * 11)
    with pytest.raises(ValueError, match="larger than 0 MiB"):
        read_text(tmp_path / "large", max_bytes=10)
    assert read_json(tmp_path / "large") == 11111111111


def test_reading_never_waits(tmp_path):
    """/proc/kmsg, which looks like a file, would else wait for the kernel's next message."""
    (tmp_path / "a").touch()
    with open_file(tmp_path / "a") as stream:
        assert not os.get_blocking(stream.fileno())


def test_refusing_converts_every_exception():
    errors = (KeyError("k"), MemoryError(), RecursionError("deep"), OSError(13, "Permission denied"), OverflowError())
    with pytest.raises(ValueError, match="^place: not enough memory$"), refusing("place"):
        raise MemoryError
    for error in errors:
        with pytest.raises(ValueError, match="^place: problem: ."), refusing("place", "problem"):
            raise error
