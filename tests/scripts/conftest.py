# SPDX-License-Identifier: Apache-2.0
"""What infer.sh is tried with: a repository of its own, and a Python without packages."""

import shutil
import venv
from pathlib import Path

import pytest

from tests.scripts.launching import REPORTING_EXECUTOR, ROOT, SCRIPTS


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repository, at a path with spaces, of the launch scripts, two YAMLs and the reporting executor."""
    repo = tmp_path / "my repo"
    for name in [*SCRIPTS, "requirements.txt"]:
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, repo / name)
    (repo / "executor/__init__.py").touch()
    (repo / "executor/launch.py").write_text(REPORTING_EXECUTOR)
    (repo / "models/qwen3_moe/config").mkdir()
    for name in ["demo.yaml", "other.yaml"]:
        (repo / "models/qwen3_moe/config" / name).write_text("model_name: x\n")
    return repo


@pytest.fixture
def bare_python(tmp_path: Path) -> Path:
    """A Python that has no packages at all."""
    venv.create(tmp_path / "bare", symlinks=True)
    return tmp_path / "bare/bin/python"
