# SPDX-License-Identifier: Apache-2.0
"""The operations' schema strings, read from a torch_npu wheel file that is never imported."""

import re
import zipfile
from pathlib import Path

LIBRARY = "torch_npu/lib/libtorch_npu.so"
_ARROW = re.compile(rb"\) -> ")
_SCHEMA = re.compile(rb"[A-Za-z_]\w*(?:\.\w+)?\([^\0]{0,8000}?\) -> [^\0]{1,300}")
_VERSION = re.compile(r"torch_npu-([^-/]+)\.dist-info(?:/|$)")


def _library(wheel: Path) -> bytes:
    if wheel.is_dir():
        return (wheel / LIBRARY).read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(LIBRARY)


def read_schemas(wheel: Path) -> list[str]:
    """The schemas of the namespace `npu`, in the order of the wheel's library (a wheel file or its unzipped folder)."""
    data = _library(wheel)
    found = []
    for arrow in _ARROW.finditer(data):  # strings of the library end with a zero byte
        text = data[data.rfind(b"\0", 0, arrow.start()) + 1 : data.find(b"\0", arrow.end())]
        if _SCHEMA.fullmatch(text):
            found.append(text.decode())
    return list(dict.fromkeys(found))


def read_version(wheel: Path) -> str:
    """The version in the name of the wheel's dist-info folder; ValueError where there is none."""
    if wheel.is_dir():
        names = [path.name for path in wheel.iterdir()]
    else:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
    for name in names:
        if match := _VERSION.match(name):
            return match[1]
    raise ValueError(f"{wheel}: no torch_npu-*.dist-info in it")
