# SPDX-License-Identifier: Apache-2.0
"""Experts on torch_npu's routing and grouped matmul. Shape letters as in ops/__init__.py; R = T * K routed rows."""

from typing import Any

import torch
from torch import Tensor

from ops import GroupedRows, RouterLogits, Routing
from ops.npu.calls import npu
from ops.npu.quantized import NpuQuantized, multiply_swiglu, quantize_rows
from ops.npu.weights import Int4Matrix, Int8Experts
from ops.quantized_matmul import unknown_weight
from ops.routing import NO_EXPERT
from ops.weight import DenseWeight, TransposedWeight, Weight

EXPERT_IDS = NO_EXPERT + 1  # the most that npu_moe_init_routing_v2 takes
MAX_EXPERT_TOKENS = 8192  # per chunk, to limit memory: the top-k rows take K times that of the tokens
MAX_EXPERT_ROWS = 8 * MAX_EXPERT_TOKENS
FLOAT, DYNAMIC = -1, 1  # quant_mode of npu_moe_init_routing_v2


class NpuExperts(NpuQuantized):
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
        """`experts` of at most MAX_EXPERT_TOKENS tokens; for int8 experts, sorting rounds the rows."""
        is_int8 = isinstance(gate_up, Int8Experts)
        if routing.has_elsewhere and self.combine_local is None or not (routing.has_elsewhere or is_int8):
            return super().experts(hidden_states, routing, gate_up, down)
        count = gate_up.shape[0]
        local, expert_ids, combine = [0, count], count, self.combine
        if routing.has_elsewhere:
            local, expert_ids, combine = [routing.first, routing.first + count], EXPERT_IDS, self.combine_local
        sort = self.sort_experts(hidden_states, routing.topk_ids, local, expert_ids, DYNAMIC if is_int8 else FLOAT)
        rows, row_index, counts, row_scales = sort
        output = self.grouped_experts(rows, counts, gate_up, down, row_scales if is_int8 else None)
        return combine(output, row_index, cast(routing.topk_weights, output.dtype))

    def sort_by_expert(
        self, hidden_states: Tensor, topk_ids: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        if topk_ids.numel() == 0:
            none = topk_ids.new_empty(0, dtype=torch.int32)
            return hidden_states, none, topk_ids.new_zeros(num_experts, dtype=torch.int64)
        return self.sort_experts(hidden_states, topk_ids, [0, num_experts], num_experts, FLOAT)[:3]

    def sort_experts(
        self, hidden_states: Tensor, topk_ids: Tensor, experts: list[int], num_experts: int, quant_mode: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`sort_by_expert` of the ids in the range `experts`; rows of other ids are undefined and have index -1.

        quant_mode DYNAMIC: rows are int8, and have scales [R] float32, which are returned too.
        """
        return npu.npu_moe_init_routing_v2(
            hidden_states,
            topk_ids.int(),
            active_num=topk_ids.numel(),
            expert_num=num_experts,
            drop_pad_mode=0,
            expert_tokens_num_type=1,  # counts
            expert_tokens_num_flag=True,
            quant_mode=quant_mode,
            active_expert_range=experts,  # the default is fixed by the first call of a process
            row_idx_type=0,  # row_index[t * K + k] is the row of choice k of token t
        )

    def weighted_sum(self, rows: Tensor, row_index: Tensor, topk_weights: Tensor) -> Tensor:
        if rows.shape[0] == 0:
            return rows
        return self.combine(rows, row_index, cast(topk_weights, rows.dtype))

    def regroup(self, rows: Tensor, tokens_per_rank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if rows.shape[0] == 0:
            return rows, tokens_per_rank.new_empty(0), tokens_per_rank.sum(0)
        return self.regroup_rows(rows, tokens_per_rank)

    def grouped_experts(
        self,
        rows: Tensor,
        tokens_per_expert: Tensor,
        gate_up: Weight,
        down: Weight,
        row_scales: Tensor | None = None,
    ) -> Tensor:
        """Runs the experts in chunks of MAX_EXPERT_ROWS rows, which bounds the memory of activations.

        row_scales: [R] of int8 rows.
        """
        if rows.shape[0] <= MAX_EXPERT_ROWS:
            return self.experts_of_rows(rows, tokens_per_expert, gate_up, down, row_scales)
        dtype = gate_up.dtype if isinstance(gate_up, Int8Experts) else rows.dtype
        output = rows.new_empty(rows.shape[0], down.shape[1], dtype=dtype)
        ends = tokens_per_expert.cumsum(0)
        for start in range(0, rows.shape[0], MAX_EXPERT_ROWS):
            part = slice(start, start + MAX_EXPERT_ROWS)
            counts = (ends - start).clamp(0, MAX_EXPERT_ROWS).diff(prepend=ends.new_zeros(1))
            scales = None if row_scales is None else row_scales[part]
            output[part] = self.experts_of_rows(rows[part], counts, gate_up, down, scales)
        return output

    def experts_of_rows(
        self, rows: Tensor, tokens_per_expert: Tensor, gate_up: Weight, down: Weight, row_scales: Tensor | None
    ) -> Tensor:
        """`grouped_experts` of at most MAX_EXPERT_ROWS rows."""
        if rows.shape[0] == 0:
            return rows
        if isinstance(gate_up, Int8Experts) and gate_up.swiglu_scales is not None and isinstance(down, Int8Experts):
            if row_scales is None:
                rows, row_scales = quantize_rows(rows)
            rows, row_scales = multiply_swiglu(rows, row_scales, gate_up, tokens_per_expert)
        else:
            rows = self.silu_and_mul(self.grouped_linear(rows, gate_up, tokens_per_expert, row_scales))
            row_scales = None
        return self.grouped_linear(rows, down, tokens_per_expert, row_scales)

    def grouped_linear(
        self, rows: Tensor, weight: Weight, tokens_per_expert: Tensor, row_scales: Tensor | None = None
    ) -> Tensor:
        """As in the reference; row_scales: [R] of int8 rows, which only `Int8Experts` take."""
        scale = token_scale = antiquant_scale = antiquant_offset = output_dtype = None
        match weight:
            case DenseWeight():
                data = weight.data.transpose(1, 2)  # [E, K, N]
            case TransposedWeight():
                data = weight.data
            case Int8Experts():
                if row_scales is None:
                    rows, row_scales = quantize_rows(rows)
                data, scale, token_scale, output_dtype = weight.data, [weight.scales], [row_scales], weight.dtype
            case Int4Matrix():
                data, antiquant_scale, antiquant_offset = weight.qweight, [weight.scales], [weight.offsets]
            case _:
                raise unknown_weight(weight)
        return npu.npu_grouped_matmul(
            [rows],
            [data],
            scale=scale,
            antiquant_scale=antiquant_scale,
            antiquant_offset=antiquant_offset,
            per_token_scale=token_scale,
            group_list=tokens_per_expert,
            split_item=3,
            group_type=0,
            # a single count is rejected; for one group the cumulative form is the same
            group_list_type=0 if tokens_per_expert.shape[0] == 1 else 1,
            output_dtype=output_dtype,
        )[0]


def cast(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts where needed: even a cast that changes nothing costs host time."""
    return weights if weights.dtype is dtype else weights.to(dtype)
