# SPDX-License-Identifier: Apache-2.0
"""Versions that do not fit each other, and HCCL ports that the host's kernel may give to other programs.

Sources: torch_npu's COMPATIBILITY.md and the release notes of CANN 9.1.0 (compatibility with Ascend HDK).
"""

import re
from collections.abc import Iterator
from pathlib import Path

from executor.doctor.findings import Finding
from executor.utils.hccl_ports import KERNEL, hccl_ports

DRIVER_FILE = Path("/usr/local/Ascend/driver/version.info")
CANN_OF = {  # torch_npu -> the CANN that it is paired with; docs/npu.md has the same table
    "2.8.0.post5": "9.0",
    "2.9.0.post2": "9.0",
    "2.10.0": "9.0",
    "2.9.0.post6": "9.1",
    "2.10.0.post4": "9.1",
    "2.11.0": "9.1",
    "2.12.0": "9.1",
    "2.13.0": "9.1",
    "2.14.0": "9.1",
}
ASSUMED = ("2.8.0.post5", "2.10.0", "2.13.0", "2.14.0")  # not in the vendor's table, but between or after its rows
HDK_OF = {"9.0": "25.0", "9.1": "25.2"}  # CANN -> oldest compatible driver (Ascend HDK)
GRAPH_HDK = "25.5.1"  # older ones have streams for few graphs


def driver_version(file: Path = DRIVER_FILE) -> str:
    """Version of the NPU driver (Ascend HDK); "unknown" where it is not installed."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = re.search(r"^Version=(\S+)", text, flags=re.MULTILINE)
    return found[1] if found else "unknown"


def installed_cann_version(home: str) -> str:
    """CANN version in the files under ASCEND_HOME_PATH, for CANN that does not report it; "unknown" without any."""
    files = (
        [file for pattern in ("", "*/") for file in Path(home).glob(f"{pattern}ascend_*_install.info")] if home else []
    )
    for file in sorted(files):
        found = re.search(r"^version=(\S+)", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        if found:
            return found[1]
    return "unknown"


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparison: 25.5.1 -> (25, 5, 1); none for "unknown"."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def compare_versions(machine: dict[str, str]) -> Iterator[Finding]:
    """Yields a finding for each pair of driver, CANN, torch_npu and torch that the vendor's pages have."""
    torch, torch_npu = (machine.get(name, "unknown") for name in ("torch", "torch_npu"))
    cann, driver = machine["CANN"], machine["driver"]
    if numbers(torch_npu):
        yield pair(
            "torch and torch_npu", torch, torch_npu, numbers(torch)[:3] == numbers(torch_npu)[:3], "its own torch_npu"
        )
    if torch_npu in CANN_OF and numbers(cann):
        need = CANN_OF[torch_npu]
        fits, known = numbers(cann) >= numbers(need), torch_npu not in ASSUMED
        yield pair("torch_npu and CANN", torch_npu, cann, fits, f"CANN {need} or later", relied_on=known)
    need = HDK_OF.get(".".join(map(str, numbers(cann)[:2])), "")
    if need and numbers(driver):
        yield pair("CANN and driver", cann, driver, numbers(driver) >= numbers(need), f"Ascend HDK {need} or later")
    if numbers(driver):
        enough = numbers(driver) >= numbers(GRAPH_HDK)
        yield pair(
            "graph mode and driver", "graph", driver, enough, f"Ascend HDK {GRAPH_HDK} or later", relied_on=False
        )


def pair(what: str, one: str, other: str, fits: bool, need: str, relied_on: bool = True) -> Finding:
    problem = "" if fits else f"{one} needs {need}, this is {other}"
    return Finding("versions", what, f"{one} with {other}", 0.0 if fits else None, 0.0, problem, relied_on)


def compare_ports(kernel: Path = KERNEL) -> Iterator[Finding]:
    """Yields a finding on whether the kernel may give HCCL's ports to outgoing connections of other programs."""
    ports, command = hccl_ports(kernel)
    problem = "" if command is None else f"not reserved: {command}"
    yield Finding("ports", "HCCL", ports, 0.0 if command is None else None, 0.0, problem, relied_on=False)
