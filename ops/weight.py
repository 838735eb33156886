# SPDX-License-Identifier: Apache-2.0
"""Weight types, one per number format; operations dispatch on the type."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DenseWeight:
    """Unquantised weight [N, K], or stacked experts [E, N, K], in the model's dtype."""

    data: torch.Tensor


@dataclass(frozen=True)
class TransposedWeight:
    """Weight [K, N], or stacked experts [E, K, N], possibly in a tiled device layout, which must not be sliced."""

    data: torch.Tensor


Weight = DenseWeight | TransposedWeight
