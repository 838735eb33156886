# SPDX-License-Identifier: Apache-2.0
"""Versions, product, memory and settings that determine an NPU's results and speed."""

import os
from pathlib import Path

import torch

from executor.doctor.host import driver_version, installed_cann_version
from executor.loading.device import device_name, free_memory_bytes
from executor.utils.report import commit, versions

PREFIXES = ("ASCEND_", "HCCL_", "PYTORCH_NPU_", "TASK_QUEUE_", "CPU_AFFINITY_", "OMP_NUM_THREADS", "LD_PRELOAD")
HOST_FILES = {
    "CPU governor": "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor",
    "NUMA balancing": "/proc/sys/kernel/numa_balancing",
}


def facts(device: torch.device) -> dict[str, str]:
    """Versions, device and settings to report with the results; "unknown" for what cannot be read."""
    found = {"commit": commit(), **versions(), "CANN": cann_version(), "product": device_name(device)}
    found["driver"] = driver_version()
    found["free memory"] = f"{free_memory_bytes(device) / 1e9:.1f} GB"
    for name, path in HOST_FILES.items():
        found[name] = " ".join(Path(path).read_text(encoding="utf-8").split()) if Path(path).is_file() else "unknown"
    settings = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith(PREFIXES))
    return found | {"environment": " ".join(settings) or "none of the relevant variables is set"}


def cann_version() -> str:
    """CANN version as torch_npu reports it, else as its installed files do; "unknown" if neither does."""
    get_cann_version = getattr(getattr(getattr(torch, "npu", None), "utils", None), "get_cann_version", None)
    reported = get_cann_version() if get_cann_version is not None else ""
    return reported or installed_cann_version(os.environ.get("ASCEND_HOME_PATH", ""))
