# SPDX-License-Identifier: Apache-2.0
"""Error lines show every character of the user's data, visibly."""

import unicodedata

import pytest

from executor.utils.text import one_line

CHARACTERS = {"zero width": "\u200d", "mark": "\ufeff", "direction": "\u202e", "private": "\ue000", "tag": "\U000e0041"}
CHARACTERS |= {"unassigned": "\u0378", "half": "\ud83d", "line": "\u2028", "escape": "\x1b"}


@pytest.mark.parametrize("name", CHARACTERS)
def test_what_does_not_print_is_escaped(name: str) -> None:
    line = one_line(f"model_path: a{CHARACTERS[name]}b does not exist")
    assert line.isprintable() and line.isascii()
    if not CHARACTERS[name].isspace():
        assert "ab" not in line


def test_escapes_are_unambiguous() -> None:
    assert one_line("\U000e0041") == "\\U000e0041" and one_line("\ue004" + "1") == "\\ue0041"


def test_letters_of_all_scripts_stay() -> None:
    text = "é 東京 🎭 שלום e\N{COMBINING ACUTE ACCENT}"
    assert one_line(text) == text and unicodedata.combining(text[-1])
