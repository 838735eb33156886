# SPDX-License-Identifier: Apache-2.0
"""Runs the emulator's own checks in a process that it may take over, under the wheels that users have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.npu.wheels import wheel

ROOT = Path(__file__).resolve().parents[2]
CHECKS = sorted(Path(__file__).with_name("emulator_checks").glob("check_*.py"))


@pytest.mark.parametrize("version", ["2.13.0", "2.8.0.post5"])
def test_operations_agree_with_their_documentation(version):
    path = wheel(version)
    if path is None:
        pytest.skip(f"torch-npu {version} is neither in the cache folder nor to be had from a package index")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", *map(str, CHECKS)],
        cwd=ROOT,
        env=os.environ | {"NPU_WHEEL": str(path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
