# SPDX-License-Identifier: Apache-2.0
"""Trace and kernel times that the NPU backend reads from the reports of torch_npu's profiler."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

REPORT = """Device_id,Name,Type,Accelerator Core,Start Time(us),Duration(us),Wait Time(us),Block Num
0,aclnnMm_1,MatMulV2,AI_CORE,"1.5\t",3000.5,0.1,24
0,"aclnnSwiGlu,a",SwiGlu,AI_VECTOR_CORE,"5000.0\t",10.0,0,24
0,aclnnMm_2,MatMulV2,AI_CORE,"6000.0\t",2000.0,0.1,24
"""


def profiler_that_writes(kernel_details: str | None) -> SimpleNamespace:
    """The part of torch_npu.profiler that the backend uses; kernel_details None: it fails and only logs it."""

    @contextlib.contextmanager
    def profile(activities, on_trace_ready):
        assert activities == ["cpu", "npu"]
        yield
        output = on_trace_ready / "host_1_ascend_pt" / "ASCEND_PROFILER_OUTPUT"
        output.mkdir(parents=True)
        (output / "trace_view.json").write_text("[]")
        if kernel_details is not None:
            (output / "kernel_details.csv").write_text(kernel_details)

    return SimpleNamespace(
        profile=profile, tensorboard_trace_handler=Path, ProfilerActivity=SimpleNamespace(CPU="cpu", NPU="npu")
    )


def trace(file: Path, monkeypatch, kernel_details: str | None):
    import torch_npu

    from ops.npu.profiler import NpuProfiler

    monkeypatch.setattr(torch_npu, "profiler", profiler_that_writes(kernel_details), raising=False)
    done = []
    kernels = NpuProfiler().trace(lambda: done.append(True), file, torch.device("cpu"))
    assert done == [True]
    return kernels


def test_kernels_are_summed_by_type(tmp_path, monkeypatch):
    file = tmp_path / "trace_0.json"
    for _ in range(2):  # reports of an earlier run are not added
        kernels = trace(file, monkeypatch, REPORT)
    assert [(kernel.name, kernel.calls, kernel.total_ms) for kernel in kernels] == [
        ("MatMulV2", 2, pytest.approx(5.0005)),
        ("SwiGlu", 1, pytest.approx(0.01)),
    ]
    assert file.read_text() == "[]"


def test_missing_reports_are_an_error(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match=r"kernel_details\.csv"):
        trace(tmp_path / "trace_0.json", monkeypatch, None)
