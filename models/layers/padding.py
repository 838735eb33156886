# SPDX-License-Identifier: Apache-2.0
"""Padding of rows for collectives that need equal shapes on every rank."""

import torch
from torch.nn import functional as F


def share_of(num_tokens: int, size: int) -> int:
    """Rows per rank when tokens are sharded over `size` ranks, rounded up: the last ranks' shards are padded."""
    return -(-num_tokens // size)


def pad_rows(tensor: torch.Tensor, count: int, value: float = 0) -> torch.Tensor:
    """Pads [N, ...] to [count, ...] with rows of `value`."""
    missing = count - tensor.shape[0]
    return tensor if missing == 0 else F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, missing), value=value)
