# SPDX-License-Identifier: Apache-2.0
"""Device timing with events, and the device's measured ceilings: read bandwidth and matmul rate."""

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypedDict

import torch

from executor.loading.device import free_memory_bytes, synchronize

READ_BYTES = {"cpu": 2**28, "cuda": 2**31, "npu": 2**31}  # far larger than any cache
ROW_BYTES = 2**14
MATRIX_SIZE = {"cpu": 512, "cuda": 8192, "npu": 8192}
REPEATS = 10


def time_ms(run: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Median time of `run` in ms over `repeats`, after one warm-up."""
    run()
    if device.type == "cpu":
        times_ms = []
        for _ in range(repeats):
            start_s = time.perf_counter()
            run()
            times_ms.append((time.perf_counter() - start_s) * 1e3)
    else:
        event = getattr(torch, device.type).Event
        events = [event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for after in events[1:]:
            run()
            after.record()
        synchronize(device)
        times_ms = [before.elapsed_time(after) for before, after in zip(events, events[1:], strict=False)]
    return sorted(times_ms)[repeats // 2]


class ReadCeiling(TypedDict):
    """Read bandwidth entry of a report."""

    gb_per_s: float
    measured_by: str


class MatmulCeiling(TypedDict):
    """Matmul throughput entry of a report."""

    tflop_per_s: float
    measured_by: str


def read_ceiling(device: torch.device) -> ReadCeiling:
    """Highest read bandwidth of several operations on a tensor much larger than the caches."""
    rows = min(READ_BYTES[device.type], free_memory_bytes(device) // 4) // ROW_BYTES // 2 * 2
    data = torch.ones(rows, ROW_BYTES // 4, device=device)
    upper, lower = data.chunk(2)
    ways = {
        "sum": lambda: data.sum(),
        "dot product": lambda: torch.dot(upper.flatten(), lower.flatten()),
        "matrix-vector product": lambda: torch.mv(data, data[0]),
        "copy, read and written": lambda: upper.copy_(lower),
    }
    rates = {name: data.nbytes / time_ms(run, device) / 1e6 for name, run in ways.items()}
    best = max(rates, key=lambda name: rates[name])
    return {"gb_per_s": round(rates[best], 1), "measured_by": f"{best} of {data.nbytes / 1e9:.2f} GB"}


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> MatmulCeiling:
    """Throughput of a large square matmul, in `dtype` or float32, whichever is faster.

    On some CPUs large bfloat16 matmuls are far slower than small ones, which torch computes via float32.
    """
    size, repeats = MATRIX_SIZE[device.type], 3 if device.type == "cpu" else REPEATS
    rates = {}
    for one in {dtype: None, torch.float32: None}:
        left, right = (torch.randn(size, size, device=device, dtype=one) for _ in range(2))
        rates[one] = 2 * size**3 / time_ms(partial(torch.matmul, left, right), device, repeats) / 1e9
    best = max(rates, key=lambda one: rates[one])
    kind = str(best).removeprefix("torch.")
    return {
        "tflop_per_s": float(f"{rates[best]:.6g}"),
        "measured_by": f"product of two {size} x {size} matrices of {kind}",
    }


def process_age_s() -> float:
    """Seconds since this process started, including interpreter start-up and imports.

    psutil's create_time would be up to a second off: it truncates the boot time to seconds.
    """
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s
