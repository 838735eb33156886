# SPDX-License-Identifier: Apache-2.0
"""Copies of small tensors to the device."""

import torch


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copies a small CPU tensor to the device, without a host sync on CUDA.

    CUDA copies small pageable memory to a staging buffer before the call returns; other devices may read it later.
    """
    return tensor.to(device, non_blocking=torch.device(device).type == "cuda")
