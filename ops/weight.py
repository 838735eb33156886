# SPDX-License-Identifier: Apache-2.0
"""A weight knows its number format; operations dispatch on its type, models never ask."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DenseWeight:
    """A matrix [N, K], or a stack of them [E, N, K], in the model's own dtype."""

    data: torch.Tensor


@dataclass(frozen=True)
class TransposedWeight:
    """A matrix [K, N], or a stack of them [E, K, N], possibly in a tiled format of the device: not to be sliced."""

    data: torch.Tensor


Weight = DenseWeight | TransposedWeight
