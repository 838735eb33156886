# SPDX-License-Identifier: Apache-2.0
"""The torch_npu wheels that tests read. They are downloaded and unzipped, never installed: import torch would break."""

import fcntl
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

# the newest that this torch pairs with, the oldest, the newest of all, and what docker/Dockerfile.npu installs
VERSIONS = ("2.13.0", "2.8.0.post5", "2.14.0", "2.12.0")
PLATFORM = ("--python-version", "3.11", "--platform", "manylinux_2_28_x86_64", "--only-binary=:all:")
PATIENCE = ("--retries", "1", "--timeout", "20")  # per connection, for machines without a network
TIMEOUT_S = 600


def cache_folder() -> Path:
    """TORCH_NPU_WHEELS, or a folder of the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "torch_npu_wheels"
    return Path(os.environ.get("TORCH_NPU_WHEELS", default))


@cache
def wheel(version: str) -> Path | None:
    """The wheel file of a version, downloaded if it is not in the cache; None where no index can be reached."""
    folder = cache_folder()
    if not list(folder.glob(f"torch_npu-{version}-*.whl")):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # tests run side by side
            if not list(folder.glob(f"torch_npu-{version}-*.whl")):
                download_into(folder, version)
    return next(iter(folder.glob(f"torch_npu-{version}-*.whl")), None)


def unzipped(version: str) -> Path | None:
    """The folder of the cache with a wheel's content: inflating it takes a process longer than to read it.

    None where there is no wheel.
    """
    file = wheel(version)
    if file is None:
        return None
    return made(cache_folder() / f"torch_npu-{version}", lambda folder: zipfile.ZipFile(file).extractall(folder))


def made(folder: Path, make: Callable[[Path], None]) -> Path:
    """Returns `folder`, created atomically by `make` if it does not exist; concurrent processes are safe."""
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            making = Path(scratch) / "making"
            making.mkdir()
            make(making)
            try:
                making.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
    return folder


def download_into(folder: Path, version: str) -> None:
    """Downloads the wheel of a version into `folder` atomically; does nothing where no index can be reached."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        download = (sys.executable, "-m", "pip", "download", "--no-deps", "--dest", scratch, *PLATFORM, *PATIENCE)
        try:
            subprocess.run([*download, f"torch-npu=={version}"], capture_output=True, timeout=TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            return
        for file in Path(scratch).glob("*.whl"):
            file.rename(folder / file.name)
