# SPDX-License-Identifier: Apache-2.0
"""Reading user files: every error becomes a one-line ValueError that names the file."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from executor.utils.text import one_line

MAX_BYTES = 256 << 20  # limit for whole-file reads; tokenizers of published checkpoints have 11 MB
PART_BYTES = 1 << 20  # read() sets aside as much memory as it may return


@contextmanager
def refusing(where: str, problem: str = "") -> Iterator[None]:
    """Converts any error in the block to a ValueError "WHERE: PROBLEM: error".

    For library calls that parse user input: they raise many types, some (RecursionError, MemoryError, OverflowError)
    only for hostile input.
    """
    try:
        yield
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, RecursionError):
            reason = "nested too deeply"
        if isinstance(error, MemoryError):
            reason = "not enough memory"
        parts = [where, problem, reason or type(error).__name__]
        raise ValueError(one_line(": ".join(part for part in parts if part))) from None


def read_text(file: Path, max_bytes: int = MAX_BYTES) -> str:
    """Reads a UTF-8 text file. ValueError if it is unreadable, not UTF-8, or larger than `max_bytes`."""
    with open_file(file) as stream, refusing(str(file), "cannot be read"):
        data = bytearray()
        while len(data) <= max_bytes and (part := stream.read(PART_BYTES)):
            data += part
        if len(data) > max_bytes:
            raise ValueError(f"larger than {max_bytes >> 20} MiB")
        return data.decode("utf-8")


def open_file(file: Path) -> BinaryIO:
    """Opens a regular file for reading. ValueError for anything else, or without permission.

    Reading it never waits: the kernel's logs look like regular files.
    """
    with refusing(str(file), "cannot be read"):
        if not file.is_file():
            raise ValueError("not a file" if file.exists() else "no such file")
        return open(file, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))


def read_json(file: Path) -> Any:
    """Parses a JSON file. ValueError if it is unreadable or not JSON."""
    text = read_text(file)
    with refusing(str(file), "not valid JSON"):
        return json.loads(text)


def read_json_object(file: Path) -> dict[str, Any]:
    """Parses a JSON file with an object at the top level. ValueError for anything else."""
    found = read_json(file)
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected a JSON object")
    return found
