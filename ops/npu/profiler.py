# SPDX-License-Identifier: Apache-2.0
"""Profiling with torch_npu.profiler, which writes its reports to files: kernel times and Chrome traces of an NPU."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch_npu

from ops.profiler import KernelTime, Profiler


class NpuProfiler(Profiler):
    """Profiles with torch_npu.profiler; its report folder is kept beside the trace."""

    def trace(self, work: Callable[[], object], file: Path, device: torch.device) -> list[KernelTime]:
        folder = file.with_suffix("")
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
        profiler = torch_npu.profiler
        activities = [profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.NPU]
        with profiler.profile(activities=activities, on_trace_ready=profiler.tensorboard_trace_handler(str(folder))):
            work()
        reports = list(folder.glob("*_ascend_pt/ASCEND_PROFILER_OUTPUT"))
        if len(reports) != 1 or not (reports[0] / "kernel_details.csv").is_file():
            raise RuntimeError(f"torch_npu's profiler left no kernel_details.csv in {folder}; its messages say why")
        shutil.copy(reports[0] / "trace_view.json", file)
        return kernel_times(reports[0] / "kernel_details.csv")


def kernel_times(file: Path) -> list[KernelTime]:
    """Sums kernel_details.csv, one line per launch, by kernel type, in descending order of total time."""
    durations_us: dict[str, list[float]] = {}
    with file.open(encoding="utf-8", newline="") as lines:
        for line in csv.DictReader(lines):
            durations_us.setdefault(line["Type"], []).append(float(line["Duration(us)"]))
    kernels = [
        KernelTime(name=name, calls=len(durations), total_ms=sum(durations) / 1e3)
        for name, durations in durations_us.items()
    ]
    return sorted(kernels, key=lambda kernel: kernel.total_ms, reverse=True)
