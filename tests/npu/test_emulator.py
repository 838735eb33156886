# SPDX-License-Identifier: Apache-2.0
"""Runs the emulator's own checks in a separate process, under each supported wheel."""

import contextlib
import os
from pathlib import Path

import pytest

from tests.npu.wheels import wheel
from tests.parallel.ranks import run_ranks

CHECKS = sorted(Path(__file__).with_name("emulator_checks").glob("check_*.py"))


def run_checks(wheel: str, output: Path) -> int:
    """pytest's exit code; its output is written to `output`."""
    os.environ["NPU_WHEEL"] = wheel
    with output.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        return int(pytest.main(["-q", "-p", "no:cacheprovider", "--no-header", *map(str, CHECKS)]))


@pytest.mark.parametrize("version", ["2.13.0", "2.8.0.post5"])
def test_operations_agree_with_their_documentation(version, tmp_path):
    path = wheel(version)
    if path is None:
        pytest.skip(f"torch-npu {version} is neither in the cache folder nor to be had from a package index")
    output = tmp_path / "output"
    assert run_ranks(1, run_checks, tmp_path, str(path), output) == [0], output.read_text()[-8000:]
