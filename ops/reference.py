# SPDX-License-Identifier: Apache-2.0
"""Plain torch reference: the oracle for all other backends, and the CPU backend.

The residual is float32: rounding it to bfloat16 in every layer would change greedy next tokens. Shape letters as in
`ops/__init__.py`.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch.nn import functional as F

from ops import OPERATIONS, GroupedRows, Ops, RouterLogits, Routing, StepMetadata
from ops.quantized_matmul import quantized_matmul, unknown_weight
from ops.weight import DenseWeight, Fp8Weight, Int4Weight, Int8StaticWeight, Int8Weight, Weight, dequantize

# torch 2.8 and 2.9 have only the private one
grouped_mm: Any = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
MAX_GATHERED_ROWS = 1024  # larger steps are prefill, which is not captured in a graph
GATHER_CHUNK = 32  # rows per chunk of gathered weights
DEQUANTIZED_CHUNK = 8  # the same for quantised ones, which are dequantised


class ReferenceOps(Ops):
    """Reference implementation of every operation, device-independent and written for clarity.

    `grouped_mm`: use torch's grouped matmul, which needs no host sync for tokens_per_expert, so that decode steps can
    be captured in graphs. On a CPU a loop over the active experts is as fast.
    """

    name = "reference"
    dequantizes: tuple[type[Weight], ...] = (Fp8Weight,)

    def __init__(self, grouped_mm: bool = False):
        self.grouped_mm = self.can_record = grouped_mm

    def fallbacks(self, dtype: torch.dtype, formats: Collection[str] = ()) -> list[str]:
        """Names all operations on an accelerator, none on a CPU, where this is the backend."""
        stands_in = type(self) is ReferenceOps and self.grouped_mm
        return OPERATIONS if stands_in else super().fallbacks(dtype, formats)

    def prepare_weight(self, weight: Weight, dtype: torch.dtype) -> Weight:
        if not isinstance(weight, self.dequantizes):
            return weight
        if len(weight.shape) == 2:
            return DenseWeight(dequantize(weight, dtype))
        output = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        for expert in range(weight.shape[0]):  # one at a time, to limit memory
            output[expert] = dequantize(weight[expert], dtype)
        return DenseWeight(output)

    def embedding(self, token_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.embedding(token_ids, weight)

    def add_norm(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None, norm_weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual = hidden_states.float() if residual is None else residual + hidden_states
        return rms_norm(residual, norm_weight, eps).to(hidden_states.dtype), residual

    def linear(self, hidden_states: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        match weight:
            case DenseWeight():
                return F.linear(hidden_states, weight.data, bias)
            case Int4Weight() | Fp8Weight() | Int8Weight() | Int8StaticWeight():
                output = quantized_matmul(hidden_states, weight)
                return output if bias is None else output + bias
        raise unknown_weight(weight)

    def norm_linear(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        norm_weight: torch.Tensor,
        eps: float,
        weight: Weight,
        bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, residual = self.add_norm(hidden_states, residual, norm_weight, eps)
        return self.linear(normed, weight, bias), residual

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def attention(
        self,
        qkv: torch.Tensor,
        q_norm_weight: torch.Tensor,
        k_norm_weight: torch.Tensor,
        eps: float,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        step: StepMetadata,
    ) -> torch.Tensor:
        num_kv_heads, head_dim = key_cache.shape[-2:]
        heads = qkv.unflatten(-1, (-1, head_dim))  # [T, H + 2G, C]
        query, key, value = heads.split([heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
        if step.num_tokens == 0:
            return query.flatten(1)
        query = apply_rotary(rms_norm(query, q_norm_weight, eps), *cos_sin).to(qkv.dtype)
        key = apply_rotary(rms_norm(key, k_norm_weight, eps), *cos_sin).to(qkv.dtype)
        key_cache.flatten(0, 1).index_copy_(0, step.slot_mapping, key)
        value_cache.flatten(0, 1).index_copy_(0, step.slot_mapping, value)
        if step.is_decode:
            output = self.decode_attention(query, key_cache, value_cache, step)
        elif step.starts_fresh:
            output = self.prefill_attention(query, key, value, step)
        else:
            output = self.extend_attention(query, key_cache, value_cache, step)
        return output.flatten(1)

    def prefill_attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: StepMetadata
    ) -> torch.Tensor:
        """Causal self-attention of packed sequences: [T, H, C], [T, G, C], [T, G, C] -> [T, H, C]."""
        outputs = []
        for sequence in zip(*(packed.split(step.query_lens_list) for packed in (query, key, value)), strict=True):
            q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in sequence)
            output = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            outputs.append(output[0].transpose(0, 1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def extend_attention(
        self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, step: StepMetadata
    ) -> torch.Tensor:
        """Causal attention of each sequence's new tokens and its cached ones: [T, H, C] -> [T, H, C]."""
        outputs = []
        block_size = key_cache.shape[1]
        for row, (q, seq_len) in enumerate(zip(query.split(step.query_lens_list), step.seq_lens_list, strict=True)):
            blocks = step.block_table[row, : -(-seq_len // block_size)]
            k, v = (cache[blocks].flatten(0, 1)[:seq_len] for cache in (key_cache, value_cache))
            seen = torch.ones(q.shape[0], seq_len, dtype=torch.bool, device=q.device).tril(seq_len - q.shape[0])
            q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (q, k, v))
            output = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
            outputs.append(output[0].transpose(0, 1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def decode_attention(
        self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, step: StepMetadata
    ) -> torch.Tensor:
        """Paged attention of one query token per sequence: [B, H, C] -> [B, H, C]."""
        num_kv_heads = key_cache.shape[2]
        query = query.unflatten(1, (num_kv_heads, -1))  # GQA: the query heads of a kv head become query rows
        table, block_size = step.block_table, key_cache.shape[1]
        cached = torch.arange(table.shape[1] * block_size, device=table.device) < step.seq_lens[:, None]
        # unused entries point to the padding block, where NaN would propagate in spite of a weight of 0
        table = torch.where(cached[:, ::block_size], table, table[:, :1]).long()  # int32 indexing is slower
        key = key_cache[table].flatten(1, 2).transpose(1, 2)  # [B, G, max_blocks * S, C]
        value = value_cache[table].flatten(1, 2).transpose(1, 2)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=cached[:, None, None])
        return output.flatten(1, 2)

    def route(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        norm_weight: torch.Tensor,
        eps: float,
        router_weight: torch.Tensor,
        top_k: int,
        renormalize: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, Routing | RouterLogits]:
        normed, residual = self.add_norm(hidden_states, residual, norm_weight, eps)
        return normed, residual, RouterLogits(F.linear(normed, router_weight), top_k, renormalize).chosen()

    def experts(
        self, hidden_states: torch.Tensor, routing: Routing | RouterLogits | GroupedRows, gate_up: Weight, down: Weight
    ) -> torch.Tensor:
        if isinstance(routing, GroupedRows):
            return self.grouped_experts(hidden_states, routing.tokens_per_expert, gate_up, down)
        num_experts = gate_up.shape[0]
        routing = routing.chosen().local(num_experts)
        num_groups = num_experts + routing.has_elsewhere  # the last group: experts on other ranks, not computed
        rows, row_index, counts = self.sort_by_expert(hidden_states, routing.topk_ids, num_groups)
        if routing.has_elsewhere:
            counts = counts[:num_experts]
        output = self.grouped_experts(rows, counts, gate_up, down)
        if routing.has_elsewhere:  # undefined rows may hold NaN, which a weight of 0 does not remove
            undefined = torch.arange(output.shape[0], device=output.device) >= counts.sum()
            output.masked_fill_(undefined[:, None], 0)
        return self.weighted_sum(output, row_index, routing.topk_weights)

    def sort_by_expert(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, num_experts: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        expert_ids = topk_ids.flatten()
        order = expert_ids.argsort(stable=True)
        row_index = torch.empty_like(order)
        row_index[order] = torch.arange(order.shape[0], device=order.device)
        counts = torch.zeros(num_experts, dtype=torch.int64, device=order.device)
        counts.index_add_(0, expert_ids, torch.ones_like(expert_ids, dtype=torch.int64))
        return hidden_states[order // topk_ids.shape[1]], row_index, counts

    def weighted_sum(self, rows: torch.Tensor, row_index: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        choices = rows[row_index].unflatten(0, topk_weights.shape).float()  # [T, K, D]
        return torch.bmm(topk_weights[:, None].float(), choices)[:, 0].to(rows.dtype)

    def regroup(
        self, rows: torch.Tensor, tokens_per_rank: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ranks, num_experts = tokens_per_rank.shape
        experts = torch.arange(num_experts, device=rows.device).repeat(ranks)
        experts = experts.repeat_interleave(tokens_per_rank.flatten(), output_size=rows.shape[0])
        order = experts.argsort(stable=True)
        return rows[order], order, tokens_per_rank.sum(0)

    def grouped_experts(
        self, rows: torch.Tensor, tokens_per_expert: torch.Tensor, gate_up: Weight, down: Weight
    ) -> torch.Tensor:
        """Expert MLPs of rows in expert order: [R, D], tokens_per_expert [E] -> [R, D], undefined past their sum."""
        if rows.shape[0] == 0:
            return rows
        activated = self.silu_and_mul(self.grouped_linear(rows, gate_up, tokens_per_expert))
        return self.grouped_linear(activated, down, tokens_per_expert)

    def grouped_linear(self, rows: torch.Tensor, weight: Weight, tokens_per_expert: torch.Tensor) -> torch.Tensor:
        """Grouped matmul: rows [R, K] in expert order, weight [E, N, K], tokens_per_expert [E] int64 -> [R, N].

        Rows past the sum of tokens_per_expert are undefined.
        """
        if isinstance(weight, DenseWeight) and self.grouped_mm:
            if rows.dtype is torch.bfloat16 or rows.shape[0] > MAX_GATHERED_ROWS:
                ends = tokens_per_expert.cumsum(0, dtype=torch.int32)
                return grouped_mm(rows, weight.data.transpose(1, 2), offs=ends)
        elif not isinstance(weight, DenseWeight | Int4Weight | Fp8Weight | Int8Weight):
            raise unknown_weight(weight)
        if self.grouped_mm and rows.shape[0] <= MAX_GATHERED_ROWS:
            return gathered_linear(rows, weight, tokens_per_expert)
        return looped_linear(rows, weight, tokens_per_expert)


def looped_linear(rows: torch.Tensor, weight: Weight, tokens_per_expert: torch.Tensor) -> torch.Tensor:
    """Grouped matmul (`grouped_linear`) as a loop with one matmul per active expert."""
    output = rows.new_empty(rows.shape[0], weight.shape[1])
    start = 0
    for expert, count in enumerate(tokens_per_expert.tolist()):
        if count:
            part = slice(start, start + count)
            if isinstance(weight, DenseWeight):
                torch.mm(rows[part], weight.data[expert].t(), out=output[part])
            else:
                output[part] = quantized_matmul(rows[part], weight[expert])
            start += count
    return output


def gathered_linear(rows: torch.Tensor, weight: Weight, tokens_per_expert: torch.Tensor) -> torch.Tensor:
    """Grouped matmul (`grouped_linear`) that gathers each row's weight, and has no host sync.

    For dtypes other than bfloat16, for which torch's grouped_mm cannot be captured in a CUDA graph, and for quantised
    weights, of which just what the rows use is dequantised.
    """
    ends = tokens_per_expert.cumsum(0, dtype=torch.int32)
    places = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
    experts = torch.searchsorted(ends, places, right=True).clamp(max=weight.shape[0] - 1)
    is_dense = isinstance(weight, DenseWeight)
    chunk = GATHER_CHUNK if is_dense else DEQUANTIZED_CHUNK
    outputs = []
    for part, chosen in zip(rows.split(chunk), experts.split(chunk), strict=True):
        gathered = weight[chosen]
        if isinstance(gathered, DenseWeight):
            outputs.append(torch.bmm(gathered.data, part[..., None])[..., 0])
        else:
            outputs.append(quantized_matmul(part[:, None], gathered)[:, 0])
    return torch.cat(outputs)


def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension, computed and returned in float32."""
    return F.rms_norm(hidden_states.float(), weight.shape, weight.float(), eps)


def apply_rotary(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021) in its half-split form: [T, H, C], cos and sin [T, C] -> [T, H, C]."""
    first, second = heads.chunk(2, dim=-1)
    sin = sin[:, None, : first.shape[-1]]
    rotated = heads * cos[:, None]
    rotated_first, rotated_second = rotated.chunk(2, dim=-1)
    rotated_first.addcmul_(second, sin, value=-1)
    rotated_second.addcmul_(first, sin)
    return rotated
