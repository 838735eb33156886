# SPDX-License-Identifier: Apache-2.0
"""tests/conftest.py, in a pytest session of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

@pytest.mark.parametrize("device", ["cpu", "npu"])
def test_device(device):
    if device == "npu":
        pytest.skip("no NPU here")

@pytest.mark.xfail
def test_expected_to_fail():
    assert False
"""
SKIPPED = "test_some.py::test_device[npu]"


@pytest.mark.parametrize(
    ("ci", "allowed", "exit_code", "printed"),
    [
        ("", "", 0, "1 skipped"),
        ("true", f"# comment\n\n{SKIPPED} | needs an NPU\n", 0, "1 skipped"),
        ("true", "test_some.py::test_dev* | needs an NPU\n", 0, "1 skipped"),
        ("true", "test_other.py::* | needs an NPU\n", 1, f"{SKIPPED} | Skipped: no NPU here"),
        ("true", f"{SKIPPED}\n", 4, "allowed_skips.txt:1: "),
    ],
)
def test_strict_skips(tmp_path: Path, ci: str, allowed: str, exit_code: int, printed: str) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "allowed_skips.txt").write_text(allowed)
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=tmp_path, env=os.environ | {"CI": ci}, capture_output=True, text=True)
    assert result.returncode == exit_code, result.stdout
    assert printed in result.stdout + result.stderr


def test_skipped_file_counts(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "allowed_skips.txt").touch()
    (tmp_path / "test_some.py").write_text("import pytest\npytest.importorskip('no_such_module')\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=tmp_path, env=os.environ | {"CI": "true"}, capture_output=True, text=True)
    assert result.returncode == 1 and "test_some.py | " in result.stdout
