# SPDX-License-Identifier: Apache-2.0
"""Interchangeable variants of vendor calls, in order of preference, and the probe calls that test whether one works.

All variants of a family share one signature. Shape letters as in ops/__init__.py; R = T * K routed rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ops.npu.calls import npu
from ops.reference import ReferenceOps

HEAD_DIM = 128  # the only head_dim of fused attention in the TND layout without separate rope inputs

Variant = Callable[..., Any]


def rotate_tnd(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates query [T, H, C] and key [T, G, C] by cos and sin [T, 1, C]; in place, contrary to its schema."""
    return npu.npu_apply_rotary_pos_emb(query, key, cos, sin, layout="TND", rotary_mode="half")


def rotate_bsnd(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    parts = (query[None], key[None], cos[None], sin[None])
    query, key = npu.npu_apply_rotary_pos_emb(*parts, layout="BSND", rotary_mode="half")
    return query[0], key[0]


def rotate_each(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    query, key = (npu.npu_rotary_mul(part[None], cos[None], sin[None])[0] for part in (query, key))
    return query, key


def write_cache_pa(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """Writes key and value [T, G, C] into caches [L, S, G, C] at slots [T]; "Norm": caches in ND format."""
    npu.npu_scatter_pa_kv_cache(key, value, key_cache, value_cache, slots, cache_mode="Norm")


def write_cache_nd(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    npu.npu_scatter_nd_update_(key_cache.flatten(0, 1), slots[:, None], key)
    npu.npu_scatter_nd_update_(value_cache.flatten(0, 1), slots[:, None], value)


def attend_v2(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_kv_heads: int,
    mask: Tensor,
    query_ends: list[int],
    kv_lengths: list[int],
    block_table: Tensor | None,
    block_size: int,
) -> Tensor:
    """Causal attention aligned to the end of each sequence (sparse_mode 3): query [T, H, C] -> [T, H, C].

    key and value are [T, G, C] and kv_lengths cumulative, or [L, S, G * C] with a block_table [B, max_blocks] int32 and
    the length of each sequence. Lengths are host lists: a device tensor would cost a host sync.
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


def attend_v1(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_kv_heads: int,
    mask: Tensor,
    query_ends: list[int],
    kv_lengths: list[int],
    block_table: Tensor | None,
    block_size: int,
) -> Tensor:
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


def gating_v2(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Softmax and top-k: [T, E] -> weights [T, K] in the logits' dtype, ids [T, K] int32; renorm=1: top-k first."""
    weights, ids, _ = npu.npu_moe_gating_top_k_softmax_v2(logits, k=top_k, renorm=int(renormalize))
    return weights, ids


def gating_v1(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    weights, ids, _ = npu.npu_moe_gating_top_k_softmax(logits, None, top_k)
    return (weights / weights.sum(dim=-1, keepdim=True) if renormalize else weights), ids


def combine_finalize(rows: Tensor, row_index: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of each token's rows: rows [R, D], row_index [R] int32, weights [T, K] -> [T, D].

    row_index is token-major (t * K + k), as drop_pad_mode 2 reads it; the default, 0, expects k * T + t.
    """
    return npu.npu_moe_finalize_routing(rows, None, None, None, weights, row_index, None, drop_pad_mode=2)


def combine_local(rows: Tensor, row_index: Tensor, weights: Tensor) -> Tensor:
    """`combine_finalize` for a row_index that is -1 for experts on other ranks, whose rows are not read.

    That takes drop_pad_mode 3 and rows in three dimensions, of which the first, in name the number of experts, is K.
    """
    rows = rows.view(weights.shape[1], *weights.shape[:1], -1)
    return npu.npu_moe_finalize_routing(rows, None, None, None, weights, row_index, None, drop_pad_mode=3)


def combine_unpermute(rows: Tensor, row_index: Tensor, weights: Tensor) -> Tensor:
    return npu.npu_moe_token_unpermute(rows, row_index, weights)


def regroup_re_routing(rows: Tensor, tokens_per_rank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reorders rows from rank-major to expert-major; returns source rows [R] int32, tokens_per_expert [E] int64 too."""
    rows, _, order, counts = npu.npu_moe_re_routing(rows, tokens_per_rank)
    return rows, order, counts


def regroup_sorted(rows: Tensor, tokens_per_rank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return ReferenceOps().regroup(rows, tokens_per_rank)


ROTARY = {
    "npu_apply_rotary_pos_emb TND": rotate_tnd,
    "npu_apply_rotary_pos_emb BSND": rotate_bsnd,
    "npu_rotary_mul": rotate_each,
}
CACHE_WRITE = {"npu_scatter_pa_kv_cache": write_cache_pa, "npu_scatter_nd_update_": write_cache_nd}
ATTENTION = {"npu_fused_infer_attention_score_v2": attend_v2, "npu_fused_infer_attention_score": attend_v1}
LENGTHS_ARGUMENT = {attend_v2: "actual_seq_kvlen", attend_v1: "actual_seq_lengths_kv"}  # keyword of the KV lengths
GATING = {"npu_moe_gating_top_k_softmax_v2": gating_v2, "npu_moe_gating_top_k_softmax": gating_v1}
REGROUP = {"npu_moe_re_routing": regroup_re_routing, "sort": regroup_sorted}
COMBINE = {"npu_moe_finalize_routing": combine_finalize, "npu_moe_token_unpermute": combine_unpermute}
# None: experts on other ranks are sorted last, as one more expert, and their rows are zeroed
LOCAL_EXPERTS = {"npu_moe_finalize_routing, index -1": combine_local, "one more expert": None}


def zeros(device: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def probe_rotary(variant: Variant, device: str) -> None:
    variant(zeros(device, 2, 4, HEAD_DIM), zeros(device, 2, 1, HEAD_DIM), *zeros(device, 2, 2, 1, HEAD_DIM))


def probe_cache_write(variant: Variant, device: str) -> None:
    slots = torch.arange(2, device=device)
    variant(*zeros(device, 2, 2, 1, HEAD_DIM), *zeros(device, 2, 2, 128, 1, HEAD_DIM), slots)


def probe_attention(variant: Variant, device: str) -> None:
    mask, query = torch.ones(2048, 2048, dtype=torch.int8).triu(1).to(device), zeros(device, 2, 4, HEAD_DIM)
    variant(query, *zeros(device, 2, 2, 1, HEAD_DIM), 1, mask, [2], [2], None, 0)
    cache, table = zeros(device, 2, 2, 128, HEAD_DIM), zeros(device, 2, 1, dtype=torch.int32)
    variant(query, *cache, 1, mask, [1, 2], [1, 1], table, 128)
    variant(query, *cache, 1, mask, [2], [3], table[:1], 128)


def probe_gating(variant: Variant, device: str) -> None:
    variant(zeros(device, 2, 128), 8, True)


def probe_combine(variant: Variant, device: str) -> None:
    variant(zeros(device, 4, 128), torch.arange(4, dtype=torch.int32, device=device), zeros(device, 2, 2))


def probe_local_experts(variant: Variant | None, device: str) -> None:
    if variant is not None:
        row_index = torch.tensor([-1, 1, 0, -1], dtype=torch.int32, device=device)
        variant(zeros(device, 4, 128), row_index, zeros(device, 2, 2))


def probe_regroup(variant: Variant, device: str) -> None:
    variant(zeros(device, 4, 128), torch.tensor([[1, 0], [0, 3]], device=device))


PROBES = {
    "rotary": probe_rotary,
    "cache write": probe_cache_write,
    "attention": probe_attention,
    "gating": probe_gating,
    "combine": probe_combine,
    "local experts": probe_local_experts,
    "regroup": probe_regroup,
}
