# SPDX-License-Identifier: Apache-2.0
"""Runs of the doctor on emulated operations, some of them broken; each needs a process of its own."""

import contextlib
import functools
import io
import json
from pathlib import Path
from typing import Any

import torch

from executor.doctor.__main__ import main
from executor.doctor.inputs import Shapes
from tests.npu.emulator import install
from tests.npu.emulator.registry import KERNELS, Kernel

SMALL = Shapes(
    name="small",
    hidden_size=256,
    num_heads=4,
    num_kv_heads=2,
    num_experts=16,
    top_k=4,
    width=64,
    vocab_size=1000,
)


def run_doctor(wheel: str, broken: list[tuple[str, str]], folder: Path) -> list[dict[str, Any]]:
    """Exit code, output and report with each operation broken in turn: it returns "wrong" rows, or "raises"."""
    state = {"broken": ("", "")}

    def breakable(name: str, kernel: Kernel) -> Kernel:
        @functools.wraps(kernel.function)
        def function(**arguments: Any) -> Any:
            if state["broken"] == (name, "raises"):
                raise RuntimeError(f"{name} is not supported here")
            results = kernel.function(**arguments)
            if state["broken"] == (name, "wrong"):
                first = results[0] if isinstance(results, list | tuple) else results
                (arguments["key_cache"] if first is None else first)[0] *= 2
            return results

        return kernel._replace(function=function)

    KERNELS.update({name: breakable(name, kernel) for name, kernel in KERNELS.items()})
    install(wheel)
    runs = []
    for state["broken"] in broken:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            code = main(["npu", "--json", str(folder / "report.json")], torch.device("cpu"), [SMALL])
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        runs.append({"code": code, "output": output.getvalue(), "report": report})
    return runs
