# SPDX-License-Identifier: Apache-2.0
"""Sorting tokens by expert and back, and from (rank, expert) to (expert, rank) order (op-plugin docs).

T tokens, H hidden, K experts per token, R = T * K, EL experts of this rank, A rows received from all ranks.
"""

import torch

from tests.npu.emulator.registry import kernel, poison, require, require_dtype, require_shape


@kernel("npu_moe_token_permute")
def npu_moe_token_permute(
    tokens: torch.Tensor, indices: torch.Tensor, num_out_tokens: int | None, padded_mode: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows by expert [R, H], the row of (t, k) at t * K + k int32); num_out_tokens keeps the first rows only."""
    require_dtype("tokens", tokens, (torch.bfloat16,))
    require_dtype("indices", indices, (torch.int32, torch.int64))
    require(not padded_mode, "padded_mode: only False")
    fits = tokens.dim() == 2 and indices.dim() in (1, 2) and len(indices) == len(tokens)
    require(fits, f"tokens {list(tokens.shape)}, indices {list(indices.shape)}")
    k = indices.shape[1] if indices.dim() == 2 else 1
    require(k <= 512 and indices.numel() < 16777215, f"indices {list(indices.shape)}: K at most 512")
    require(bool(((indices >= 0) & (indices < 16777215)).all()), "indices leave [0, 16777215)")
    order = indices.flatten().argsort(stable=True)
    kept = num_out_tokens or None  # 0 and None keep all; a negative number counts from the end
    return tokens[(order // k)[:kept]], order.argsort().to(torch.int32)


@kernel("npu_moe_token_unpermute")
def npu_moe_token_unpermute(
    permuted_tokens: torch.Tensor, sorted_indices: torch.Tensor, probs: torch.Tensor | None, padded_mode: bool
) -> torch.Tensor:
    """out[t] = sum_k probs[t, k] * permuted_tokens[sorted_indices[t * K + k]] (K = 1 without probs), rounded once."""
    require_dtype("permuted_tokens", permuted_tokens, (torch.bfloat16,))
    require_dtype("sorted_indices", sorted_indices, (torch.int32,))
    require(not padded_mode, "padded_mode: only False")
    fits = permuted_tokens.dim() == 2 and sorted_indices.dim() == 1
    require(fits, f"permuted_tokens {list(permuted_tokens.shape)}, sorted_indices {list(sorted_indices.shape)}")
    k = 1
    if probs is not None:
        # the page's table has bf16, its example passes fp32
        require_dtype("probs", probs, (torch.bfloat16, torch.float32))
        require(probs.dim() == 2 and probs.numel() == len(sorted_indices), f"probs {list(probs.shape)}")
        k = probs.shape[1]
    in_range = bool(((sorted_indices >= 0) & (sorted_indices < len(permuted_tokens))).all())
    require(in_range, f"sorted_indices leave [0, {len(permuted_tokens)})")
    terms = permuted_tokens.float()[sorted_indices.long()].unflatten(0, (-1, k))
    if probs is not None:
        terms = terms * probs.float()[..., None]
    return terms.sum(1).to(permuted_tokens.dtype)


@kernel("npu_moe_re_routing")
def npu_moe_re_routing(
    tokens: torch.Tensor,
    expert_token_num_per_rank: torch.Tensor,
    per_token_scales: torch.Tensor | None,
    expert_token_num_type: int,
    idx_type: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows in (rank, expert) order to (expert, rank) order: (tokens, scales fp32, index int32, rows of each expert).

    out[i] = tokens[index[i]]. expert_token_num_per_rank [ranks, EL] counts the rows; the scales are undefined
    unless given.
    """
    counts = expert_token_num_per_rank
    require_dtype("tokens", tokens, (torch.float16, torch.bfloat16, torch.int8))
    require_dtype("expert_token_num_per_rank", counts, (torch.int32, torch.int64))
    require(expert_token_num_type == 1 and idx_type == 0, "only counts (type 1) and idx_type 0")
    require(tokens.dim() == 2 and tokens.shape[1] < 16384, f"tokens {list(tokens.shape)}: H under 16384")
    require(len(tokens) > 0, "no tokens")
    require(counts.dim() == 2, f"expert_token_num_per_rank {list(counts.shape)}: [ranks, EL]")
    require(bool((counts >= 0).all()), "expert_token_num_per_rank has a negative count")
    total = int(counts.sum())
    require(total == len(tokens), f"expert_token_num_per_rank sums to {total}, not to the {len(tokens)} rows")
    ranks, experts = counts.shape
    expert_of_row = torch.arange(experts).repeat(ranks).repeat_interleave(counts.flatten().long())
    index = expert_of_row.argsort(stable=True)
    scales = poison((len(tokens),), torch.float32)
    if per_token_scales is not None:
        require_dtype("per_token_scales", per_token_scales, (torch.float32,))
        require_shape("per_token_scales", per_token_scales, len(tokens))
        scales = per_token_scales[index]
    return tokens[index], scales, index.to(torch.int32), counts.sum(0).to(counts.dtype)
