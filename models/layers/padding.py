# SPDX-License-Identifier: Apache-2.0
"""Rows that fill a tensor up where an exchange needs the same number on every rank."""

import torch
from torch.nn import functional as F


def share_of(num_tokens: int, size: int) -> int:
    """Rows of each of `size` ranks that share tokens out; the last ones may get fewer, filled up with zeros."""
    return -(-num_tokens // size)


def pad_rows(tensor: torch.Tensor, count: int, value: float = 0) -> torch.Tensor:
    """[N, ...] -> [count, ...], the new rows filled with `value`."""
    missing = count - tensor.shape[0]
    return tensor if missing == 0 else F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, missing), value=value)
