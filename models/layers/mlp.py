# SPDX-License-Identifier: Apache-2.0
"""Feed-forward blocks, dense and mixture of experts, with the preceding residual add and norm."""

import torch

from models.layers.expert_exchange import ExpertExchange
from models.layers.linear import NormLinear, RowLinear
from ops import Ops, StepMetadata, Weight


class DenseMlp:
    """Dense SwiGLU feed-forward block."""

    def __init__(self, gate_up_proj: NormLinear, down_proj: RowLinear, ops: Ops):
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj
        self.ops = ops

    def __call__(
        self, hidden_states: torch.Tensor, residual: torch.Tensor, step: StepMetadata
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gate_up, residual = self.gate_up_proj(hidden_states, residual, step)
        return self.down_proj(self.ops.silu_and_mul(gate_up), step), residual


class SparseMoe:
    """Mixture of experts: router, dispatch to the top-k experts of each token, experts, combine."""

    def __init__(
        self,
        norm_weight: torch.Tensor,
        eps: float,
        router_weight: torch.Tensor,
        top_k: int,
        renormalize: bool,
        gate_up_proj: Weight,
        down_proj: Weight,
        decode_exchange: ExpertExchange,
        prefill_exchange: ExpertExchange,
        ops: Ops,
    ):
        self.norm_weight = norm_weight
        self.eps = eps
        self.router_weight = router_weight
        self.top_k = top_k
        self.renormalize = renormalize
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj
        self.decode_exchange = decode_exchange
        self.prefill_exchange = prefill_exchange
        self.ops = ops

    def __call__(
        self, hidden_states: torch.Tensor, residual: torch.Tensor, step: StepMetadata
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, residual, routing = self.ops.route(
            hidden_states, residual, self.norm_weight, self.eps, self.router_weight, self.top_k, self.renormalize
        )
        exchange = self.decode_exchange if step.is_decode else self.prefill_exchange
        dispatched = exchange.dispatch(normed, routing, step)
        output = self.ops.experts(dispatched.rows, dispatched.routing, self.gate_up_proj, self.down_proj)
        return exchange.combine(output, dispatched, step), residual
