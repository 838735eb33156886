# SPDX-License-Identifier: Apache-2.0
"""Prefetch of weights into the device's L2 cache, overlapped with attention and combine of decode steps."""

import torch

from models.layers.attention import Attention, KVCache
from models.layers.expert_exchange import Dispatched, ExpertExchange
from ops import Ops, RouterLogits, Routing, StepMetadata, Weight


class PrefetchingAttention:
    """Attention that prefetches the weight of o_proj in decode steps."""

    def __init__(self, attention: Attention, weight: Weight, ops: Ops):
        self.attention = attention
        self.weight = weight
        self.ops = ops

    def __call__(
        self, qkv: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor], kv_cache: KVCache, step: StepMetadata
    ) -> torch.Tensor:
        if not step.is_prefill:
            self.ops.prefetch(self.weight)
        return self.attention(qkv, cos_sin, kv_cache, step)


class PrefetchingExchange:
    """Decode exchange that prefetches a weight of the next layer during combine."""

    def __init__(self, exchange: ExpertExchange, weight: Weight, ops: Ops):
        self.exchange = exchange
        self.weight = weight
        self.ops = ops

    def dispatch(self, hidden_states: torch.Tensor, routing: Routing | RouterLogits, step: StepMetadata) -> Dispatched:
        return self.exchange.dispatch(hidden_states, routing, step)

    def combine(self, output: torch.Tensor, dispatched: Dispatched, step: StepMetadata) -> torch.Tensor:
        self.ops.prefetch(self.weight)
        return self.exchange.combine(output, dispatched, step)
