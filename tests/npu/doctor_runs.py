# SPDX-License-Identifier: Apache-2.0
"""Runs of the doctor on emulated operations, some of them broken; each needs a process of its own."""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch

from executor.doctor.__main__ import main
from executor.doctor.inputs import Shapes
from ops.comm import Group
from tests.npu.emulated import emulate_communicators
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
LARGER = dataclasses.replace(SMALL, hidden_size=1024)  # the smallest that dispatch takes on A3


def run_doctor_on_ranks(wheel: str, product: str, broken: list[tuple[str, str]], folder: Path) -> list[dict[str, Any]]:
    """As `run_doctor`, but of the communication between these ranks, which is broken on rank 1."""
    install(wheel, product)
    emulate_communicators()
    from executor.doctor import comparisons
    from ops.npu.exchange import DispatchCombine

    comparisons.compare_all = lambda ops, device, shapes: iter(())  # what one device does has tests of its own
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]
    file = folder / f"report_{os.environ['RANK']}.json"
    runs = []
    for name, how in broken:
        with pytest.MonkeyPatch.context() as patch:
            if name and os.environ["RANK"] == "1":
                owner = DispatchCombine if hasattr(DispatchCombine, name) else Group
                patch.setattr(owner, name, broken_method(getattr(owner, name), how))
            runs.append(run_once(["--ranks", os.environ["WORLD_SIZE"]], file, LARGER))
    return runs


def broken_method(method: Callable[..., torch.Tensor], how: str) -> Callable[..., torch.Tensor]:
    """The method with a wrong result ("wrong later": not of the first call), or raising after it has communicated."""
    calls = itertools.count()

    @functools.wraps(method)
    def function(*arguments: Any, **named: Any) -> torch.Tensor:
        result = method(*arguments, **named)
        if how == "wrong later" and next(calls) < 1:
            return result
        if how == "raises":
            raise RuntimeError("not supported here")
        return result * 1.5

    return function


def run_once(arguments: list[str], file: Path, shapes: Shapes) -> dict[str, Any]:
    """Exit code, output and report (None: not written) of one run of the doctor."""
    file.unlink(missing_ok=True)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = main(["npu", "--json", str(file), *arguments], torch.device("cpu"), [shapes])
    report = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    return {"code": code, "output": output.getvalue(), "report": report}


def run_doctor(
    wheel: str, broken: list[tuple[str, str]], folder: Path, quantized: Collection[str]
) -> list[dict[str, Any]]:
    """Exit code, output and report with each operation broken in turn: it returns "wrong" rows, or "raises".

    quantized: operations with which only those on quantised weights are compared, to save time.
    """
    state = {"broken": ("", "")}

    def breakable(name: str, kernel: Kernel) -> Kernel:
        @functools.wraps(kernel.function)
        def function(**arguments: Any) -> Any:
            if state["broken"] == (name, "raises"):
                raise RuntimeError(f"{name} is not supported here")
            results = kernel.function(**arguments)
            if state["broken"] == (name, "wrong"):
                first = results[0] if isinstance(results, list | tuple) else results
                (arguments["key_cache"] if first is None else arguments.get("q_out", first))[0] *= 2
            return results

        return kernel._replace(function=function)

    KERNELS.update({name: breakable(name, kernel) for name, kernel in KERNELS.items()})
    install(wheel)
    from executor.doctor import comparisons
    from executor.doctor.findings import Context
    from executor.doctor.quantized import compare_quantized

    runs = []
    for state["broken"] in broken:
        with pytest.MonkeyPatch.context() as patch:
            if state["broken"][0] in quantized:
                patch.setattr(comparisons, "compare_all", lambda *given: compare_quantized(Context(*given)))
            runs.append(run_once([], folder / "report.json", SMALL))
    return runs
