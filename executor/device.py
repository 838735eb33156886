# SPDX-License-Identifier: Apache-2.0
"""The device of this process. An accelerator that is visible but unusable is an error, not a reason for the CPU."""

import glob
import os
import resource

import torch

from ops import npu_available


def select_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of this rank for a `device` setting (auto, npu, cuda, cpu).

    Raises ValueError if the device named is not there, or `auto` sees an accelerator it cannot use.
    """
    if name == "cpu":
        return torch.device("cpu")
    if name in ("auto", "npu") and npu_available():
        count = torch.npu.device_count()
        if local_rank >= count:
            raise ValueError(f"device: rank {local_rank} of this node needs an NPU, there are {count}")
        torch.npu.set_device(local_rank)
        return torch.device("npu", local_rank)
    if name in ("auto", "cuda") and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"device: rank {local_rank} of this node needs a GPU, there are {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
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
    return torch.device("cpu")


def synchronize(device: torch.device) -> None:
    """Waits for everything queued on the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def free_memory_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on the device; on a CPU, this rank's share of what is available."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "npu":
        return torch.npu.mem_get_info(device)[0]
    with open("/proc/meminfo", encoding="ascii") as meminfo:
        sizes = dict(line.split(":") for line in meminfo)
    return int(sizes["MemAvailable"].split()[0]) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held at a time: by tensors on an accelerator, by this whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "npu":
        return torch.npu.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_name(device: torch.device) -> str:
    """What a person calls the device: the card, or the CPU and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "npu":
        return torch.npu.get_device_name(device)
    with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
        names = [line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {torch.get_num_threads()} threads"
