# SPDX-License-Identifier: Apache-2.0
"""Profiling with torch.profiler: kernel times and Chrome traces."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity


@dataclass(frozen=True, kw_only=True)
class KernelTime:
    """Total time of all calls of one kernel; on a CPU, self time of one operation."""

    name: str
    calls: int
    total_ms: float


class Profiler:
    """Profiler for CPUs and NVIDIA GPUs."""

    def trace(self, work: Callable[[], object], file: Path, device: torch.device) -> list[KernelTime]:
        """Profiles `work`, writes a Chrome trace and returns the kernels sorted by total time, descending."""
        on_gpu = device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with torch.profiler.profile(activities=activities, acc_events=True) as profiler:  # avoids a warning
            work()
        profiler.export_chrome_trace(str(file))
        kernels = [
            KernelTime(
                name=event.key,
                calls=event.count,
                total_ms=(event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3,
            )
            for event in profiler.key_averages()
            if event.device_type == (DeviceType.CUDA if on_gpu else DeviceType.CPU)
        ]
        return sorted(kernels, key=lambda kernel: kernel.total_ms, reverse=True)
