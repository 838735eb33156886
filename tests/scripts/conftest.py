# SPDX-License-Identifier: Apache-2.0
"""Fixtures for infer.sh: a repository with a stub executor, and a Python without packages."""

import shutil
import venv
from pathlib import Path

import pytest

from tests.scripts.launching import REPORTING_EXECUTOR, ROOT, SCRIPTS


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repository at a path with spaces: launch scripts, two YAMLs and a stub executor."""
    repo = tmp_path / "my repo"
    for name in [*SCRIPTS, "requirements.txt"]:
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, repo / name)
    (repo / "executor/launch").mkdir()
    for package in ("executor", "executor/launch"):
        (repo / package / "__init__.py").touch()
    (repo / "executor/launch/__main__.py").write_text(REPORTING_EXECUTOR)
    (repo / "models/qwen3_moe/config").mkdir()
    for name in ["demo.yaml", "other.yaml"]:
        (repo / "models/qwen3_moe/config" / name).write_text("model_name: x\n")
    return repo


@pytest.fixture
def bare_python(tmp_path: Path) -> Path:
    """A Python without any packages."""
    venv.create(tmp_path / "bare", symlinks=True)
    return tmp_path / "bare/bin/python"
