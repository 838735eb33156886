# SPDX-License-Identifier: Apache-2.0
"""Checks this machine's NPUs: `python -m executor.doctor npu [--ranks N] [--json FILE]`.

Prints versions and settings, then compares each operation of the backend with the reference at the shapes of
Qwen3-30B-A3B and of its tensor-parallel slices. With `--ranks N` every one of N NPUs does so, and what they exchange is
compared and timed; NODE_IPS names the nodes, on each of which the command is run. Exit code 0: all agree; 1: something
differs or fails; 2: invalid arguments, or no NPU.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from executor.config import Settings
from executor.launch.command import run_command
from executor.launch.rank import forget_rank, set_up_rank
from executor.utils.arguments import ArgumentParser
from executor.utils.files import check_output, replace

if TYPE_CHECKING:
    import torch

    from executor.doctor.findings import Finding
    from executor.doctor.inputs import Shapes

SLICES = (2, 4, 8)
EXPERTS = 128  # of Qwen3-30B-A3B
MODEL = "models/qwen3_moe/shapes/qwen3_30b_a3b"


def main(
    arguments: list[str] | None = None, device: "torch.device | None" = None, shapes: "Sequence[Shapes]" = ()
) -> int:
    """Runs the doctor and returns its exit code; tests pass `device` and `shapes` instead of the NPU and real ones."""

    def body() -> int:
        parsed = parse_arguments(arguments)
        if os.environ.get("WORLD_SIZE", "1") == "1":
            forget_rank()
        rank = set_up_rank()
        if parsed.json and rank == 0:
            check_output("--json", Path(parsed.json))
        if parsed.ranks > 1 and "WORLD_SIZE" not in os.environ:
            start(parsed.ranks)
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if parsed.ranks != world_size:
            raise ValueError(f"--ranks: {parsed.ranks}, but WORLD_SIZE is {world_size}")
        report = examine(device or find_npu(), shapes, parsed.ranks)
        if parsed.json and rank == 0:
            replace(Path(parsed.json), json.dumps(report, indent=1, allow_nan=False) + "\n")
        return int(not report["fine"])

    return run_command(body)


def start(ranks: int) -> None:
    """Runs this command in `ranks` ranks, on the nodes of NODE_IPS, and exits."""
    from executor.launch.launcher import launch

    with naming_torch_npu():
        import torch  # noqa: F401

    settings = Settings(model_name="doctor", model_path=MODEL, device="npu", world_size=ranks)
    launch(settings, ["executor.doctor", *sys.argv[1:]])


def find_npu() -> "torch.device":
    with naming_torch_npu():
        from executor.loading.device import select_device
        from ops.comm import local_rank

        return select_device("npu", local_rank())


@contextlib.contextmanager
def naming_torch_npu() -> Iterator[None]:
    """Raises ValueError where torch cannot be imported: it autoloads torch_npu, which loads CANN."""
    try:
        yield
    except (ImportError, RuntimeError, OSError) as error:
        problem = str(error).splitlines()[0]
        raise ValueError(f"device: torch_npu does not load: {problem} (is CANN's set_env.sh sourced?)") from None


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m executor.doctor", description=__doc__)
    parser.add_argument("backend", choices=["npu"])
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="NPUs of all nodes, which exchange data too")
    parser.add_argument("--json", metavar="FILE", help="also write the full report there, one entry per comparison")
    parsed = parser.parse_args(arguments)
    if parsed.ranks < 1 or EXPERTS % parsed.ranks:
        raise ValueError(
            f"--ranks: {parsed.ranks} does not divide {EXPERTS} experts; take 1, 2, 4, 8, 16, 32, 64 or 128"
        )
    return parsed


def examine(device: "torch.device", shapes: "Sequence[Shapes]", size: int) -> dict[str, Any]:
    """Runs all comparisons on this rank; rank 0 prints those of all ranks. Returns a JSON-serialisable report.

    What ranks exchange comes first and is printed at once: an operation that is compared later may crash the device.
    """
    from executor.doctor.comparisons import compare_all, compare_undocumented
    from executor.doctor.host import compare_versions
    from executor.doctor.inputs import Shapes
    from executor.doctor.machine import facts
    from executor.doctor.ranks import Ranks, compare_job
    from ops.npu import NpuOps

    def say(text: str, file: TextIO | None = None) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(text, file=file or sys.stdout, flush=True)

    shapes = shapes or (Shapes(), *map(Shapes().slice, SLICES))
    machine = facts(device)
    say("\n".join(f"{name}: {value}" for name, value in machine.items()))
    ops = NpuOps(device.type)
    ranks = Ranks(ops, device, shapes[0], size) if size > 1 else None
    say(f"in use: {', '.join(f'{what}: {name}' for what, name in ops.bindings.items())}")
    findings = list(compare_versions(machine))
    if ranks is not None:
        findings = ranks.worst([*findings, *compare_job(ranks, ops, machine, shapes[0])])
        say(f"\n{verdicts(findings)}")
    of_operations: list[Finding] = []
    for part in shapes:
        say(f"comparing at {part.name} ...", sys.stderr)
        of_operations += compare_all(ops, device, part)
    if ranks is None:
        findings += [*of_operations, *compare_undocumented(ops, device, shapes[0])]
        say(f"\n{verdicts(findings)}")
    else:
        of_operations = ranks.worst(of_operations)
        findings += of_operations
        say(f"\n{verdicts(of_operations)}")
    fine = all(finding.fine for finding in findings)
    say("\nall agree" if fine else "\nsomething differs or fails")
    listed = [dataclasses.asdict(finding) | {"verdict": finding.verdict} for finding in findings]
    for finding in listed:
        if finding["error"] is not None and not math.isfinite(finding["error"]):
            finding["error"] = None  # JSON has no NaN; the verdict says that it is not fine
    return {"fine": fine, "ranks": size, "machine": machine, "bindings": ops.bindings, "findings": listed}


def verdicts(findings: "list[Finding]") -> str:
    """Formats a table with the worst comparison of each operation and variant, then a line for each that is not ok."""
    from executor.utils.report import table

    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.operation, finding.variant), []).append(finding)
    rows, remarks = [], []
    for (operation, variant), members in groups.items():
        worst = max(members, key=lambda member: member.severity)
        error = None if worst.error is None else f"{worst.error:.4f}"
        times = " ".join(f"{member.time_ms:.3f}" for member in members if member.time_ms is not None) or None
        rows.append([operation, variant, len(members), error, worst.limit, times, worst.verdict])
        if worst.verdict != "ok":
            problem = worst.problem or f"relative error {worst.error:.4f}"
            remarks.append(f"{worst.verdict}: {operation}, {variant}, {worst.case}: {problem}")
    header = ["operation", "variant", "cases", "max relative error", "limit", "ms", "verdict"]
    return "\n".join([table(header, rows), *remarks])


if __name__ == "__main__":
    sys.exit(main())
