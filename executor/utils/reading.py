# SPDX-License-Identifier: Apache-2.0
"""The boundary to the user's files: whatever goes wrong with one becomes a ValueError of one line that names it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from executor.utils.text import one_line

MAX_BYTES = 256 << 20  # of a file that is read whole; the tokenizers of published checkpoints have 11 MB


@contextmanager
def refusing(where: str, problem: str = "") -> Iterator[None]:
    """Turns any error inside into a ValueError "WHERE: PROBLEM: what happened".

    For calls into libraries that read or interpret what the user gave; they raise many types, some of them
    (RecursionError, MemoryError, OverflowError) only for hostile input.
    """
    try:
        yield
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, RecursionError):
            reason = "nested too deeply"
        parts = [where, problem, reason or type(error).__name__]
        raise ValueError(one_line(": ".join(part for part in parts if part))) from None


def read_text(file: Path, max_bytes: int = MAX_BYTES) -> str:
    """A UTF-8 file's text. ValueError if it cannot be read, is no UTF-8, or is larger than `max_bytes`."""
    with refusing(str(file), "cannot be read"):
        if not file.is_file():
            raise ValueError("not a file" if file.exists() else "no such file")
        with file.open("rb") as stream:
            data = stream.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise ValueError(f"larger than {max_bytes >> 20} MiB")
        return data.decode("utf-8")


def read_json(file: Path) -> Any:
    """What a JSON file holds. ValueError if it cannot be read or is not JSON."""
    text = read_text(file)
    with refusing(str(file), "not valid JSON"):
        return json.loads(text)


def read_json_object(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds. ValueError if it holds anything else."""
    found = read_json(file)
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected a JSON object")
    return found
