# SPDX-License-Identifier: Apache-2.0
"""Experts on torch_npu's routing and grouped matmul. Shape letters as in ops/__init__.py; R = T * K routed rows."""

from typing import Any

import torch
from torch import Tensor

from ops import GroupedRows, RouterLogits, Routing
from ops.npu.calls import npu
from ops.quantized_matmul import unknown_weight
from ops.reference import ReferenceOps
from ops.routing import NO_EXPERT
from ops.weight import DenseWeight, TransposedWeight, Weight

EXPERT_IDS = NO_EXPERT + 1  # the most that npu_moe_init_routing_v2 takes
MAX_EXPERT_TOKENS = 8192  # per chunk, to limit memory: the top-k rows take K times that of the tokens
MAX_EXPERT_ROWS = 8 * MAX_EXPERT_TOKENS


class NpuExperts(ReferenceOps):
    """Operations of the experts; which variants they use is selected by the backend."""

    combine: Any
    combine_local: Any
    regroup_rows: Any

    def experts(
        self, hidden_states: Tensor, routing: Routing | RouterLogits | GroupedRows, gate_up: Weight, down: Weight
    ) -> Tensor:
        tokens = hidden_states.shape[0]
        if tokens == 0:
            return hidden_states
        if isinstance(routing, GroupedRows):
            return super().experts(hidden_states, routing, gate_up, down)
        routing = routing.chosen()
        if tokens <= MAX_EXPERT_TOKENS:
            return self.experts_of_few(hidden_states, routing, gate_up, down)
        output = torch.empty_like(hidden_states)
        for start in range(0, tokens, MAX_EXPERT_TOKENS):
            part = slice(start, start + MAX_EXPERT_TOKENS)
            share = routing._replace(topk_weights=routing.topk_weights[part], topk_ids=routing.topk_ids[part])
            output[part] = self.experts_of_few(hidden_states[part], share, gate_up, down)
        return output

    def experts_of_few(self, hidden_states: Tensor, routing: Routing, gate_up: Weight, down: Weight) -> Tensor:
        """`experts` of at most MAX_EXPERT_TOKENS tokens."""
        if self.combine_local is None or not routing.has_elsewhere:
            return super().experts(hidden_states, routing, gate_up, down)
        count = gate_up.shape[0]
        local = [routing.first, routing.first + count]
        rows, row_index, counts = self.sort_experts(hidden_states, routing.topk_ids, local, EXPERT_IDS)
        output = self.grouped_experts(rows, counts, gate_up, down)
        return self.combine_local(output, row_index, cast(routing.topk_weights, output.dtype))

    def sort_by_expert(
        self, hidden_states: Tensor, topk_ids: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        if topk_ids.numel() == 0:
            none = topk_ids.new_empty(0, dtype=torch.int32)
            return hidden_states, none, topk_ids.new_zeros(num_experts, dtype=torch.int64)
        return self.sort_experts(hidden_states, topk_ids, [0, num_experts], num_experts)

    def sort_experts(
        self, hidden_states: Tensor, topk_ids: Tensor, experts: list[int], num_experts: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`sort_by_expert` of the ids in the range `experts`; rows of other ids are undefined and have index -1."""
        rows, row_index, counts, _ = npu.npu_moe_init_routing_v2(
            hidden_states,
            topk_ids.int(),
            active_num=topk_ids.numel(),
            expert_num=num_experts,
            drop_pad_mode=0,
            expert_tokens_num_type=1,  # counts
            expert_tokens_num_flag=True,
            quant_mode=-1,
            active_expert_range=experts,  # the default is fixed by the first call of a process
            row_idx_type=0,  # row_index[t * K + k] is the row of choice k of token t
        )
        return rows, row_index, counts

    def weighted_sum(self, rows: Tensor, row_index: Tensor, topk_weights: Tensor) -> Tensor:
        if rows.shape[0] == 0:
            return rows
        return self.combine(rows, row_index, cast(topk_weights, rows.dtype))

    def regroup(self, rows: Tensor, tokens_per_rank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if rows.shape[0] == 0:
            return rows, tokens_per_rank.new_empty(0), tokens_per_rank.sum(0)
        return self.regroup_rows(rows, tokens_per_rank)

    def grouped_experts(self, rows: Tensor, tokens_per_expert: Tensor, gate_up: Weight, down: Weight) -> Tensor:
        """Runs the experts in chunks of MAX_EXPERT_ROWS rows, which bounds the memory of activations."""
        if rows.shape[0] <= MAX_EXPERT_ROWS:
            return super().grouped_experts(rows, tokens_per_expert, gate_up, down)
        output = torch.empty_like(rows)
        ends = tokens_per_expert.cumsum(0)
        for start in range(0, rows.shape[0], MAX_EXPERT_ROWS):
            part = slice(start, start + MAX_EXPERT_ROWS)
            counts = (ends - start).clamp(0, MAX_EXPERT_ROWS).diff(prepend=ends.new_zeros(1))
            output[part] = super().grouped_experts(rows[part], counts, gate_up, down)
        return output

    def grouped_linear(self, rows: Tensor, weight: Weight, tokens_per_expert: Tensor) -> Tensor:
        if not isinstance(weight, DenseWeight | TransposedWeight):
            raise unknown_weight(weight)
        data = weight.data.transpose(1, 2) if isinstance(weight, DenseWeight) else weight.data  # [E, K, N]
        return npu.npu_grouped_matmul(
            [rows],
            [data],
            group_list=tokens_per_expert,
            split_item=3,
            group_type=0,
            # a single count is rejected; for one group the cumulative form is the same
            group_list_type=0 if tokens_per_expert.shape[0] == 1 else 1,
        )[0]


def cast(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts where needed: even a cast that changes nothing costs host time."""
    return weights if weights.dtype is dtype else weights.to(dtype)
