# SPDX-License-Identifier: Apache-2.0
"""The JSON schema for editors matches the settings classes."""

import json
import typing

import pytest

from executor.config import REPOSITORY, SECTIONS, Settings, load_settings
from executor.utils import settings_schema

CONFIG = REPOSITORY / "models/qwen3_moe/config"
FILE = CONFIG / "settings.schema.json"
YAMLS = sorted(CONFIG.glob("*.yaml"))


def test_committed_schema_is_current():
    assert FILE.read_text(encoding="utf-8") == settings_schema.text()


def test_schema_has_every_key():
    properties = json.loads(FILE.read_text(encoding="utf-8"))["properties"]
    assert set(properties) == set(typing.get_type_hints(Settings))
    for name, kind in SECTIONS.items():
        assert set(properties[name]["anyOf"][0]["properties"]) == set(typing.get_type_hints(kind))
    data = properties["data_config"]["anyOf"][0]["properties"]
    assert data["dataset"]["enum"] == ["default", "LongBench", "jsonl"] and data["batch_size"]["minimum"] == 1
    engine = properties["engine_config"]["anyOf"][0]["properties"]
    assert engine["prefix_cache"] == {"type": "boolean", "default": True}
    assert engine["chunk_tokens"] == {"type": "integer", "minimum": 1, "maximum": 2**31 - 1, "default": 2048}
    assert data["seed"]["type"] == ["integer", "null"] and data["stop"] == {
        "type": "array",
        "items": {"type": "string"},
    }


@pytest.mark.parametrize("yaml", YAMLS, ids=lambda file: file.stem)
def test_every_yaml_refers_to_the_schema(yaml):
    assert yaml.read_text(encoding="utf-8").splitlines()[0] == f"# yaml-language-server: $schema={FILE.name}"
    load_settings(yaml)
