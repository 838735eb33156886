# SPDX-License-Identifier: Apache-2.0
"""JSON schema of the YAML, for editors: `python -m executor.utils.settings_schema FILE` regenerates it."""

import dataclasses
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal

from executor.config import LARGEST, Settings
from executor.utils.files import replace

JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", list: "array"}


def schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of `Settings`."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Settings of a run",
        "description": "docs/configuration.md says what each key means.",
        **object_schema(Settings, ""),
    }


def object_schema(kind: type, prefix: str) -> dict[str, Any]:
    """Schema of a settings class; `prefix` is its section with a dot, as in `LARGEST`."""
    hints = typing.get_type_hints(kind)
    properties, required = {}, []
    for field in dataclasses.fields(kind):
        properties[field.name] = value_schema(hints[field.name], f"{prefix}{field.name}")
        if field.default is not dataclasses.MISSING:
            properties[field.name]["default"] = field.default
        elif field.default_factory is dataclasses.MISSING:
            required.append(field.name)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def value_schema(hint: Any, key: str) -> dict[str, Any]:
    if dataclasses.is_dataclass(hint):
        return {"anyOf": [object_schema(typing.cast(type, hint), f"{key}."), {"type": "null"}]}
    if typing.get_origin(hint) is Literal:
        return {"enum": list(typing.get_args(hint))}
    if isinstance(hint, types.UnionType):  # X | None
        inner = value_schema(typing.get_args(hint)[0], key)
        return inner | {"type": [inner["type"], "null"]}
    found: dict[str, Any] = {"type": JSON_TYPES[typing.get_origin(hint) or hint]}
    if found["type"] == "array":
        found["items"] = value_schema(typing.get_args(hint)[0], "")
    if key in LARGEST:
        found |= {"minimum": 1, "maximum": LARGEST[key]}
    return found


def text() -> str:
    return json.dumps(schema(), indent=2) + "\n"


if __name__ == "__main__":
    replace(Path(sys.argv[1]), text())
