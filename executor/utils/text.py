# SPDX-License-Identifier: Apache-2.0
"""Sanitizing text for display: one line of bounded length for errors, control characters escaped."""

import unicodedata
from typing import Any

MAX_LINE = 400  # characters of an error line
MAX_VALUE = 80  # characters of a value quoted in an error line
DIRECTIONS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # bidirectional controls


def one_line(text: object, limit: int = MAX_LINE) -> str:
    """Formats `text` as one line of at most `limit` characters.

    Collapses white space, escapes non-printing characters, and cuts out the middle of longer text.
    """
    line = str(text)
    if len(line) > 8 * limit:
        line = f"{line[: 4 * limit]} {line[-4 * limit :]}"
    line = "".join(character if character.isprintable() else escaped(character) for character in " ".join(line.split()))
    if len(line) <= limit:
        return line
    keep = limit - 5
    return f"{line[: keep - keep // 3]} ... {line[len(line) - keep // 3 :]}"


def printable(text: str) -> str:
    """Escapes control characters, bidirectional controls and lone surrogates of `text`; tabs and newlines stay."""
    return "".join(character if shows(character) else escaped(character) for character in text)


def shows(character: str) -> bool:
    if unicodedata.bidirectional(character) in DIRECTIONS:
        return False
    return character in "\t\n" or unicodedata.category(character) not in ("Cc", "Cs")


def escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


def quoted(value: Any) -> str:
    """repr of a user's value, of bounded length for large or deeply nested values."""
    if isinstance(value, str):
        return one_line(repr(value[: 4 * MAX_VALUE]), MAX_VALUE)
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, dict | list | tuple | set) and len(value) > 20:
        return f"a {type(value).__name__} of {len(value)} entries"
    try:
        return one_line(repr(value), MAX_VALUE)
    except (RecursionError, ValueError, MemoryError):
        return f"a {type(value).__name__}, nested too deeply"
