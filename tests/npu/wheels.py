# SPDX-License-Identifier: Apache-2.0
"""torch_npu wheel files for the tests: fetched from the package index, read, and never installed.

Installed beside torch, torch_npu makes `import torch` fail where CANN is not.
"""

import os
import subprocess
import sys
from pathlib import Path

TAGS = ("--python-version=3.11", "--implementation=cp", "--abi=cp311", "--platform=manylinux_2_28_x86_64")
TIMEOUT_S = 300


def _cache() -> Path:
    return Path(os.environ.get("NPU_WHEEL_CACHE") or Path.home() / ".cache" / "qwen3_moe_npu").expanduser()


def _find(version: str) -> Path | None:
    return next(iter(sorted(_cache().glob(f"torch_npu-{version}-*.whl"))), None)


def wheel(version: str) -> Path | None:
    """The wheel file of torch_npu `version`, from the cache folder or the package index; None where neither has it.

    NPU_WHEEL_CACHE names the folder (default ~/.cache/qwen3_moe_npu). The file is of one Python version, whichever
    runs the tests: only its text is read.
    """
    if found := _find(version):
        return found
    _cache().mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", *TAGS, "--dest", str(_cache()), f"torch-npu=={version}"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return None
    return _find(version) if result.returncode == 0 else None
