# SPDX-License-Identifier: Apache-2.0
"""Checks this machine's NPU: `python -m executor.doctor npu [--json FILE]`.

Prints versions and settings, then compares each operation of the backend with the reference at the shapes of
Qwen3-30B-A3B and of its tensor-parallel slices. Exit code 0: all agree; 1: something differs or fails; 2: invalid
arguments, or no NPU.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from executor.launch.command import run_command
from executor.utils.arguments import ArgumentParser
from executor.utils.files import check_output, replace

if TYPE_CHECKING:
    import torch

    from executor.doctor.findings import Finding
    from executor.doctor.inputs import Shapes

SLICES = (2, 4, 8)


def main(
    arguments: list[str] | None = None, device: "torch.device | None" = None, shapes: "Sequence[Shapes]" = ()
) -> int:
    """Runs the doctor and returns its exit code; tests pass `device` and `shapes` instead of the NPU and real ones."""

    def body() -> int:
        parsed = parse_arguments(arguments)
        if parsed.json:
            check_output("--json", Path(parsed.json))
        report = examine(device or find_npu(), shapes)
        if parsed.json:
            replace(Path(parsed.json), json.dumps(report, indent=1, allow_nan=False) + "\n")
        return int(not report["fine"])

    return run_command(body)


def find_npu() -> "torch.device":
    try:
        from executor.loading.device import select_device

        return select_device("npu")
    except (ImportError, RuntimeError, OSError) as error:  # torch autoloads torch_npu, which loads CANN
        problem = str(error).splitlines()[0]
        raise ValueError(f"device: torch_npu does not load: {problem} (is CANN's set_env.sh sourced?)") from None


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m executor.doctor", description=__doc__)
    parser.add_argument("backend", choices=["npu"])
    parser.add_argument("--json", metavar="FILE", help="also write the full report there, one entry per comparison")
    return parser.parse_args(arguments)


def examine(device: "torch.device", shapes: "Sequence[Shapes]") -> dict[str, Any]:
    """Runs all comparisons, prints the results, and returns them as a JSON-serialisable report."""
    from executor.doctor.comparisons import compare_all, compare_undocumented
    from executor.doctor.inputs import Shapes
    from executor.doctor.machine import facts
    from ops.npu import NpuOps

    machine = facts(device)
    for name, value in machine.items():
        print(f"{name}: {value}")
    ops = NpuOps(device.type)
    print("in use:", ", ".join(f"{what}: {name}" for what, name in ops.bindings.items()), flush=True)
    findings: list[Finding] = []
    shapes = shapes or (Shapes(), *map(Shapes().slice, SLICES))
    for part in shapes:
        print(f"comparing at {part.name} ...", file=sys.stderr, flush=True)
        findings += compare_all(ops, device, part)
    findings += compare_undocumented(ops, device, shapes[0])
    print(f"\n{verdicts(findings)}")
    fine = all(finding.fine for finding in findings)
    print("\nall agree" if fine else "\nsomething differs or fails")
    listed = [dataclasses.asdict(finding) | {"verdict": finding.verdict} for finding in findings]
    for finding in listed:
        if finding["error"] is not None and not math.isfinite(finding["error"]):
            finding["error"] = None  # JSON has no NaN; the verdict says that it is not fine
    return {"fine": fine, "machine": machine, "bindings": ops.bindings, "findings": listed}


def verdicts(findings: "list[Finding]") -> str:
    """Formats a table with the worst comparison of each operation and variant, then a line for each that is not ok."""
    from executor.utils.report import table

    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.operation, finding.variant), []).append(finding)
    rows, remarks = [], []
    for (operation, variant), members in groups.items():
        worst = max(members, key=lambda member: math.inf if member.error is None else member.error)
        error = None if worst.error is None else f"{worst.error:.4f}"
        rows.append([operation, variant, len(members), error, worst.limit, worst.verdict])
        if worst.verdict != "ok":
            problem = worst.problem or f"relative error {worst.error:.4f}"
            remarks.append(f"{worst.verdict}: {operation}, {variant}, {worst.case}: {problem}")
    header = ["operation", "variant", "cases", "max relative error", "limit", "verdict"]
    return "\n".join([table(header, rows), *remarks])


if __name__ == "__main__":
    sys.exit(main())
