# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention with q/k norm over a paged KV cache. Shape letters as in ops/__init__.py."""

import torch

from ops import Ops, StepMetadata

KVCache = tuple[torch.Tensor, torch.Tensor]  # keys and values of one layer, each [L, S, G, C]


class Attention:
    """Attention of one layer: packed qkv [T, (H + 2G) * C] -> output [T, H * C]; writes the layer's KV cache."""

    def __init__(self, q_norm_weight: torch.Tensor, k_norm_weight: torch.Tensor, eps: float, ops: Ops):
        self.q_norm_weight = q_norm_weight
        self.k_norm_weight = k_norm_weight
        self.eps = eps
        self.ops = ops

    def __call__(
        self, qkv: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor], kv_cache: KVCache, step: StepMetadata
    ) -> torch.Tensor:
        return self.ops.attention(qkv, self.q_norm_weight, self.k_norm_weight, self.eps, cos_sin, *kv_cache, step)
