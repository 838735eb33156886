# SPDX-License-Identifier: Apache-2.0
"""Families of vendor calls that do the same, the best first, and the small calls that tell whether one works.

Each family has one signature. Letters as in ops/__init__.py, R = T * K rows of chosen experts.
"""

from collections.abc import Callable

import torch

from ops.npu.calls import npu
from ops.reference import ReferenceOps

HEAD_DIM = 128  # all that fused attention takes in the TND layout without separate rotary parts


def rotate_tnd(query, key, cos, sin):
    """[T, H, C], [T, G, C], cos and sin [T, 1, C], in place although the schema does not say so."""
    return npu.npu_apply_rotary_pos_emb(query, key, cos, sin, layout="TND", rotary_mode="half")


def rotate_bsnd(query, key, cos, sin):
    parts = (query[None], key[None], cos[None], sin[None])
    query, key = npu.npu_apply_rotary_pos_emb(*parts, layout="BSND", rotary_mode="half")
    return query[0], key[0]


def rotate_each(query, key, cos, sin):
    return tuple(npu.npu_rotary_mul(part[None], cos[None], sin[None])[0] for part in (query, key))


def write_cache_pa(key, value, key_cache, value_cache, slots):
    """[T, G, C] each into [L, S, G, C] at slots [T]; "Norm" means caches of the plain format."""
    npu.npu_scatter_pa_kv_cache(key, value, key_cache, value_cache, slots, cache_mode="Norm")


def write_cache_nd(key, value, key_cache, value_cache, slots):
    npu.npu_scatter_nd_update_(key_cache.flatten(0, 1), slots[:, None], key)
    npu.npu_scatter_nd_update_(value_cache.flatten(0, 1), slots[:, None], value)


def attend_v2(query, key, value, num_kv_heads, mask, query_ends, kv_lengths, block_table, block_size):
    """Causal from the end of each sequence (sparse_mode 3): query [T, H, C] -> [T, H, C].

    key and value are [T, G, C], or [L, S, G * C] with a block_table [B, max_blocks] int32. Lengths are lists: a device
    tensor would be read back.
    """
    return npu.npu_fused_infer_attention_score_v2(
        query,
        key,
        value,
        atten_mask=mask,
        actual_seq_qlen=query_ends,
        actual_seq_kvlen=kv_lengths,
        block_table=block_table,
        num_query_heads=query.shape[1],
        num_key_value_heads=num_kv_heads,
        softmax_scale=query.shape[2] ** -0.5,
        input_layout="TND",
        sparse_mode=3,
        block_size=block_size,
    )[0]


def attend_v1(query, key, value, num_kv_heads, mask, query_ends, kv_lengths, block_table, block_size):
    return npu.npu_fused_infer_attention_score(
        query,
        key,
        value,
        atten_mask=mask,
        actual_seq_lengths=query_ends,
        actual_seq_lengths_kv=kv_lengths,
        block_table=block_table,
        num_heads=query.shape[1],
        num_key_value_heads=num_kv_heads,
        scale=query.shape[2] ** -0.5,
        input_layout="TND",
        sparse_mode=3,
        block_size=block_size,
    )[0]


def choose_experts_v2(logits, top_k, renormalize):
    """[T, E] -> weights [T, K] in the dtype of the logits, ids [T, K] int32. Softmax after top-k renormalises."""
    weights, ids, _ = npu.npu_moe_gating_top_k_softmax_v2(logits, k=top_k, renorm=int(renormalize))
    return weights, ids


def choose_experts_v1(logits, top_k, renormalize):
    weights, ids, _ = npu.npu_moe_gating_top_k_softmax(logits, None, top_k)
    return (weights / weights.sum(dim=-1, keepdim=True) if renormalize else weights), ids


def combine_finalize(rows, row_index, weights):
    """Weighted sum of each token's rows: [R, D], row_index [R] int32 token by token, weights [T, K] -> [T, D].

    Mode 2 reads the index token by token; the default, 0, wants it choice by choice.
    """
    return npu.npu_moe_finalize_routing(rows, None, None, None, weights, row_index, None, drop_pad_mode=2)


def combine_unpermute(rows, row_index, weights):
    return npu.npu_moe_token_unpermute(rows, row_index, weights)


def regroup_re_routing(rows, tokens_per_rank):
    """Rows by (rank, expert) -> rows by (expert, rank), which row each was [R] int32, and counts [E] int64."""
    rows, _, order, counts = npu.npu_moe_re_routing(rows, tokens_per_rank)
    return rows, order, counts


def regroup_sorted(rows, tokens_per_rank):
    return ReferenceOps().regroup(rows, tokens_per_rank)


ROTARY = {
    "npu_apply_rotary_pos_emb TND": rotate_tnd,
    "npu_apply_rotary_pos_emb BSND": rotate_bsnd,
    "npu_rotary_mul": rotate_each,
}
CACHE_WRITE = {"npu_scatter_pa_kv_cache": write_cache_pa, "npu_scatter_nd_update_": write_cache_nd}
ATTENTION = {"npu_fused_infer_attention_score_v2": attend_v2, "npu_fused_infer_attention_score": attend_v1}
LENGTHS_ARGUMENT = {attend_v2: "actual_seq_kvlen", attend_v1: "actual_seq_lengths_kv"}  # of the keys
GATING = {"npu_moe_gating_top_k_softmax_v2": choose_experts_v2, "npu_moe_gating_top_k_softmax": choose_experts_v1}
REGROUP = {"npu_moe_re_routing": regroup_re_routing, "sort": regroup_sorted}
COMBINE = {"npu_moe_finalize_routing": combine_finalize, "npu_moe_token_unpermute": combine_unpermute}


def zeros(device: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def try_rotary(variant: Callable, device: str) -> None:
    variant(zeros(device, 2, 4, HEAD_DIM), zeros(device, 2, 1, HEAD_DIM), *zeros(device, 2, 2, 1, HEAD_DIM))


def try_cache_write(variant: Callable, device: str) -> None:
    slots = torch.arange(2, device=device)
    variant(*zeros(device, 2, 2, 1, HEAD_DIM), *zeros(device, 2, 2, 128, 1, HEAD_DIM), slots)


def try_attention(variant: Callable, device: str) -> None:
    mask, query = torch.ones(2048, 2048, dtype=torch.int8).triu(1).to(device), zeros(device, 2, 4, HEAD_DIM)
    variant(query, *zeros(device, 2, 2, 1, HEAD_DIM), 1, mask, [2], [2], None, 0)
    cache, table = zeros(device, 2, 2, 128, HEAD_DIM), zeros(device, 2, 1, dtype=torch.int32)
    variant(query, *cache, 1, mask, [1, 2], [1, 1], table, 128)


def try_gating(variant: Callable, device: str) -> None:
    variant(zeros(device, 2, 128), 8, True)


def try_combine(variant: Callable, device: str) -> None:
    variant(zeros(device, 4, 128), torch.arange(4, dtype=torch.int32, device=device), zeros(device, 2, 2))


def try_regroup(variant: Callable, device: str) -> None:
    variant(zeros(device, 4, 128), torch.tensor([[1, 0], [0, 3]], device=device))


TRIALS = {
    "rotary": try_rotary,
    "cache write": try_cache_write,
    "attention": try_attention,
    "gating": try_gating,
    "combine": try_combine,
    "regroup": try_regroup,
}
