# SPDX-License-Identifier: Apache-2.0
"""Type conversion and validation of settings' values."""

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from typing import Any, Literal

from executor.utils.known_names import known_value
from executor.utils.text import quoted


def convert(value: Any, hint: Any) -> Any:
    """Converts `value` to the annotated type `hint`: ints to floats, all others must match; else ValueError."""
    if typing.get_origin(hint) is Literal:
        if isinstance(value, str) and value in typing.get_args(hint):
            return value
        allowed = ", ".join(typing.get_args(hint))
        match = nearest_value(str(value)[:100], typing.get_args(hint)) if is_plain(value) else None
        raise ValueError(f"{quoted(value)} is not one of {allowed}" + (f"; did you mean {match}?" if match else ""))
    if isinstance(hint, types.UnionType):  # X | None
        return None if value is None else convert(value, typing.get_args(hint)[0])
    container = typing.get_origin(hint) or hint
    if container is float and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):  # YAML 1.1 reads 1e-3 as a string
            value = float(value)
    if not isinstance(value, container) or (container is int and isinstance(value, bool)):
        raise ValueError(f"expected {container.__name__}, got {quoted(value)}")
    if container is list and not all(isinstance(item, typing.get_args(hint)[0]) for item in value):
        raise ValueError(f"expected a list of {typing.get_args(hint)[0].__name__}, got {quoted(value)}")
    if not dataclasses.is_dataclass(value):  # a section: its values are already checked
        check_plain(value)
    return value


def nearest_value(value: str, allowed: tuple[str, ...]) -> str | None:
    known = known_value(value)
    return known if known in allowed else next(iter(difflib.get_close_matches(value, allowed, n=1)), None)


def is_plain(value: Any) -> bool:
    return isinstance(value, str | bool | float) or isinstance(value, int) and abs(value) < 2**63


def check_plain(value: Any) -> None:
    """Raises ValueError for what JSON results cannot hold: NaN, infinity, lone surrogates, dates, ints from 2**63."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is impossible, must be a finite number")
    if isinstance(value, str) and not is_unicode(value):
        raise ValueError(f"{quoted(value)} holds half of a surrogate pair, which is no text")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"expected text keys, got {quoted(key)}")
            check_plain(key)
            check_plain(item)
    elif isinstance(value, list | tuple):
        for item in value:
            check_plain(item)
    elif value is not None and not is_plain(value):
        raise ValueError(f"{quoted(value)} is impossible, must be a plain text or a number below 2**63")


def is_unicode(text: str) -> bool:
    """Returns whether text can be encoded: False for lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
