# SPDX-License-Identifier: Apache-2.0
"""Device selection and memory queries. An unusable accelerator is an error: no silent fallback to the CPU."""

import glob
import os
import resource
from pathlib import Path

import psutil
import torch

from executor.loading.cgroup import memory_left_bytes
from ops import npu_available


def select_device(name: str, local_rank: int = 0) -> torch.device:
    """Selects this rank's device for a `device` setting (auto, npu, cuda, cpu) and creates a context on it.

    Raises ValueError as `count_devices`, or if there are fewer devices than ranks.
    """
    kind, count = count_devices(name)
    if kind == "cpu":
        return torch.device("cpu")
    if local_rank >= count:
        what = {"npu": "an NPU", "cuda": "a GPU"}[kind]
        raise ValueError(f"device: rank {local_rank} of this node needs {what}, there are {count}")
    torch.get_device_module(kind).set_device(local_rank)
    return torch.device(kind, local_rank)


def count_devices(name: str) -> tuple[str, int]:
    """Type of the device that a `device` setting means, and how many there are (0: CPU), without using any.

    Raises ValueError if it is not available, or if `auto` finds an accelerator that torch cannot use.
    """
    if name == "cpu":
        return "cpu", 0
    if name in ("auto", "npu") and npu_available():
        return "npu", torch.npu.device_count()
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return "cuda", torch.cuda.device_count()
    if name != "auto":
        raise ValueError(f"device: {name} is not available to this Python's torch {torch.__version__}")
    for kind, pattern, need in (
        ("NPU", "/dev/davinci[0-9]*", "torch_npu"),
        ("GPU", "/dev/nvidia[0-9]*", "a CUDA torch"),
    ):
        if glob.glob(pattern):
            raise ValueError(
                f"device: auto sees the {kind} {glob.glob(pattern)[0]}, which torch {torch.__version__} cannot use; "
                f"install {need}, or set device: cpu"
            )
    return "cpu", 0


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished all queued work (a host sync)."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def free_memory_bytes(device: torch.device) -> int:
    """Free memory of the device in bytes.

    On accelerators: with what the caching allocator reserves but does not use.
    On a CPU: this rank's share of the available memory within the control groups' limits, but no more than the
    process's own limits (ulimit -v, -d) leave.
    """
    if device.type != "cpu":
        module = torch.get_device_module(device)
        cached = module.memory_reserved(device) - module.memory_allocated(device)
        return module.mem_get_info(device)[0] + cached
    shared = [psutil.virtual_memory().available, memory_left_bytes()]
    share = min(size for size in shared if size is not None) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min([share, *process_left_bytes()])


def process_left_bytes() -> list[int]:
    """Bytes left under each resource limit of this process: RLIMIT_AS and RLIMIT_DATA."""
    used = psutil.Process().memory_info()
    limits = ((resource.RLIMIT_AS, used.vms), (resource.RLIMIT_DATA, used.data))
    allowed = [(resource.getrlimit(limit)[0], used_bytes) for limit, used_bytes in limits]
    return [max(0, soft - used_bytes) for soft, used_bytes in allowed if soft != resource.RLIM_INFINITY]


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory in bytes: allocated by tensors on an accelerator, resident (RSS) of the process on a CPU."""
    if device.type != "cpu":
        return torch.get_device_module(device).max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_name(device: torch.device) -> str:
    """Human-readable name: of the accelerator, or of the CPU with its thread count."""
    if device.type != "cpu":
        return torch.get_device_module(device).get_device_name(device)
    return f"{cpu_name(Path('/proc/cpuinfo'))}, {torch.get_num_threads()} threads"


def cpu_name(file: Path) -> str:
    """Model name in /proc/cpuinfo, "CPU" if there is none, as on some CPUs and containers."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")
