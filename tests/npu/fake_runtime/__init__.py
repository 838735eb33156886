# SPDX-License-Identifier: Apache-2.0
"""A stand-in for CANN under the real torch_npu: a device in host memory, whose operations compute nothing.

The torch_npu of the wheel, unmodified, imports and finds one NPU. All its own code runs: the Python bindings, the
checks of arguments, the allocation of outputs, the queue of launches, the caching allocator. What it hands to CANN is
accepted and ignored: memory and copies work, outputs of operations are uninitialised, and CANN's own checks of
arguments, several devices, communication and graph capture are missing.

    environment = fake_npu()                               # builds what is not built yet; Unavailable says why not
    subprocess.run([sys.executable, ...], env=environment)  # `import torch` in it finds the NPU

Processes that do not communicate may see several: FAKE_NPUS=2. On the command line: `python -m tests.npu.fake_runtime
COMMAND ...` runs the command on it. The wheel is unzipped into the wheels' cache folder and is on the path of those
processes only: to install it would break `import torch` elsewhere.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.npu.wheels import cache_folder, made, unzipped

VERSION = "2.13.0"
SOC_NAME = "Ascend910_9391"  # an Atlas A3
CANN_VERSION = "8.5.0"
SOURCE = Path(__file__).with_name("runtime.c")
LIBRARIES = ("ascendcl", "acl_op_compiler", "acl_tdt_channel", "atb", "ge_runner", "graph", "hccl", "opapi")
# functions of CANN that the wheel links to, or looks up by name as it runs; the last are the C++ ones of atb
ENTRY_POINT = rb"\0((?:acl[a-z]*[A-Z]|Hccl[A-Z]|Hcom|Msprof|rt[A-Z]|(?:Init|UnInit|Release)HugeMem|_ZNK?3atb)\w+)(?=\0)"
WRITTEN = re.compile(r"\b(acl\w+)\([^;]*?\) \{|^DESCRIPTOR\((acl\w+)\)", re.MULTILINE)


class Unavailable(Exception):
    """Raised with the reason why this machine cannot build the fake runtime."""


def fake_npu() -> dict[str, str]:
    """This process's environment with the fake NPU added; built on first use."""
    import torch

    if platform.machine() != "x86_64" or sys.version_info[:2] != (3, 11):
        raise Unavailable("the wheel is for Python 3.11 on x86-64 Linux")
    if torch.__version__ not in (VERSION, f"{VERSION}+cpu") or torch.version.cuda:
        raise Unavailable(f"torch_npu {VERSION} needs the CPU build of torch {VERSION}, this is {torch.__version__}")
    if shutil.which("gcc") is None:
        raise Unavailable("no gcc")
    site = unzipped(VERSION)
    if site is None:
        raise Unavailable(f"torch_npu {VERSION}: no wheel in the cache and no package index")
    recipe = hashlib.sha256(SOURCE.read_bytes() + Path(__file__).read_bytes()).hexdigest()[:12]
    libraries = made(cache_folder() / f"fake_runtime-{VERSION}-{recipe}", lambda folder: build(site, folder))
    added = {"PYTHONPATH": site, "LD_LIBRARY_PATH": libraries}
    return os.environ | {
        name: os.pathsep.join([str(folder), *filter(None, [os.environ.get(name)])]) for name, folder in added.items()
    }


def build(site: Path, folder: Path) -> None:
    """Builds the CANN libraries that the wheel unzipped in `site` needs: one file, linked under every name."""
    names = entry_points(site / "torch_npu")
    written = {name for pair in WRITTEN.findall(SOURCE.read_text(encoding="utf-8")) for name in pair}
    stubs = "".join(f"long {name}(void) {{ return 0; }}\n" for name in sorted(names - written))
    first, *others = (folder / f"lib{name}.so" for name in LIBRARIES)
    headers = site / "torch_npu/include/third_party/acl/inc"
    strings = (f'-DSOC_NAME="{SOC_NAME}"', f'-DCANN_VERSION="{CANN_VERSION}"')
    compiler = ("gcc", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-deprecated-declarations")
    compile_stubs = ("-fno-builtin", "-x", "c", "-")
    subprocess.run(
        [*compiler, f"-I{headers}", *strings, "-o", first, SOURCE, *compile_stubs], input=stubs, text=True, check=True
    )
    for other in others:
        other.symlink_to(first.name)


def entry_points(torch_npu: Path) -> set[str]:
    """Names of all functions of CANN that the wheel may look up, found as strings in its libraries."""
    names: set[bytes] = set()
    for library in [*torch_npu.glob("lib/*.so"), *torch_npu.glob("_C.*.so")]:
        names.update(re.findall(ENTRY_POINT, library.read_bytes()))
    # an operation has two functions, and possibly only one name is in the library
    names.update(name + b"GetWorkspaceSize" for name in list(names) if name.startswith(b"aclnn"))
    return {name.decode() for name in names}
