# SPDX-License-Identifier: Apache-2.0
"""Decode attention over the paged cache, fused with q/k norm, rotary embedding and cache write."""

import torch
import triton
import triton.language as tl

from ops import StepMetadata
from ops.cuda.launch import BoundKernel, fits, is_power_of_two, pdl_trigger, pdl_wait
from ops.cuda.tiles import ATTENTION_BLOCK, ATTENTION_MAX_ROUNDS, attention_split

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def splitting(
    seq_lens, b, BLOCK: tl.constexpr, SPLITS: tl.constexpr, MAX_SPLITS: tl.constexpr, MAX_ROUNDS: tl.constexpr
):
    """KV split of a sequence: number of cached tokens, tokens per split, and index of the new token's split.

    Depends on the sequence length only, not on the grid. The new token gets its own split if one is left, else it joins
    the last one. A single tile is not split.
    """
    num_cached = (tl.load(seq_lens + b) - 1).to(tl.int32)
    tiles = tl.cdiv(num_cached, BLOCK)
    rounds = tl.maximum(tl.minimum(tl.cdiv(tiles, SPLITS), MAX_ROUNDS), tl.cdiv(tiles, MAX_SPLITS))
    per_split = tl.maximum(rounds, 1) * BLOCK
    newest = tl.minimum(tl.where(tiles > 1, tl.cdiv(num_cached, per_split), 0), MAX_SPLITS - 1)
    return num_cached, per_split, newest


@triton.jit
def cached_tile(
    key_cache,
    value_cache,
    table,
    start,
    end,
    kv_head,
    G: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loads cached tokens [start, start + BLOCK), zero from `end` on: the two halves of the keys, and the values."""
    half = tl.arange(0, C // 2)
    c = tl.arange(0, C)
    j = tl.arange(0, BLOCK)
    block = tl.load(table + start // S, mask=start < end, other=0)
    rows = ((block * S + start % S + j) * G + kv_head) * C
    inside = (start + j) < end
    key_1 = tl.load(key_cache + rows[:, None] + half[None, :], mask=inside[:, None], other=0.0)
    key_2 = tl.load(key_cache + rows[:, None] + C // 2 + half[None, :], mask=inside[:, None], other=0.0)
    value = tl.load(value_cache + rows[:, None] + c[None, :], mask=inside[:, None], other=0.0)
    return key_1, key_2, value


@triton.jit
def add_tile(scores, value, maximum, total, accumulated, scale=1.0):
    """Online softmax update (Dao et al. 2022) with one tile: scores [Q, BLOCK], value [BLOCK, C].

    Scores times `scale` are in log2 units; here the multiplication costs nothing, as it fuses with the subtraction.
    State: running maximum [Q], sum of exponentials total [Q], accumulated values [Q, C].
    """
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1) * scale)
    weights = tl.exp2(scores * scale - new_maximum[:, None])
    decay = tl.exp2(maximum - new_maximum)
    total = total * decay + tl.sum(weights, axis=1)
    accumulated = tl.dot(weights.to(value.dtype), value, accumulated * decay[:, None])
    return new_maximum, total, accumulated


@triton.jit(do_not_specialize=["table_stride"])
def decode_attention_kernel(
    qkv,  # [B, (H + 2G) * C]
    cos,  # [B, C] float32; the second half repeats the first
    sin,  # [B, C] float32
    key_cache,  # [L, S, G, C]
    value_cache,  # [L, S, G, C]
    slot_mapping,  # [B] int64
    block_table,  # [B, max_blocks] int32
    seq_lens,  # [B] int64
    table_stride,  # elements between the table's rows
    q_norm_weight,  # [C]
    k_norm_weight,  # [C]
    partial_output,  # [B, H, MAX_SPLITS, C] float32
    log_sums,  # [B, H, MAX_SPLITS] float32: log2-sum-exp2 of a split
    output,  # [B, H * C]
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
    HEADS: tl.constexpr,  # query heads per program, all of one kv head
    PADDED_HEADS: tl.constexpr,  # at least 16, for tensor cores
    SPLITS: tl.constexpr,  # splits of a sequence, until each has MAX_ROUNDS tiles
    MAX_SPLITS: tl.constexpr,  # splits of a longer sequence; then tiles per split grow
    MAX_ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,  # cached tokens per tile; divides S
    EPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Flash decoding with split KV (Dao et al. 2023); `combine_splits_kernel` reduces. Grid (H / HEADS, splits, B).

    The grid must cover all splits of the longest sequence; programs without work exit early. The new token's key and
    value come from `qkv`.

    o_proj prefetches its weights when it starts, and later loads of this kernel queue behind them. So with one split
    `pdl_trigger` comes after the cache loads; with several splits it comes first, since the combine kernel runs before
    o_proj.
    """
    group = tl.program_id(0)
    split = tl.program_id(1)
    b = tl.program_id(2)
    kv_head = group * HEADS // (H // G)
    half = tl.arange(0, C // 2)
    c = tl.arange(0, C)
    j = tl.arange(0, BLOCK)
    num_cached, per_split, newest = splitting(seq_lens, b, BLOCK, SPLITS, MAX_SPLITS, MAX_ROUNDS)
    if split <= newest:
        if newest > 0:
            pdl_trigger(PDL)
        start = split * per_split
        end = tl.minimum(start + per_split, num_cached)
        table = block_table + b * table_stride
        # load the first tile before waiting for the query
        key_1, key_2, value = cached_tile(key_cache, value_cache, table, start, end, kv_head, G, C, S, BLOCK)
        cos_half = tl.load(cos + b * C + half)
        sin_half = tl.load(sin + b * C + half)
        q_gain_1 = tl.load(q_norm_weight + half).to(tl.float32)
        q_gain_2 = tl.load(q_norm_weight + C // 2 + half).to(tl.float32)
        k_gain_1 = tl.load(k_norm_weight + half).to(tl.float32)
        k_gain_2 = tl.load(k_norm_weight + C // 2 + half).to(tl.float32)
        new_row = (tl.load(slot_mapping + b) * G + kv_head) * C
        if newest == 0:
            pdl_trigger(PDL)
        pdl_wait(PDL)

        # issue all loads of qkv before the first use, so that their latencies overlap
        token_qkv = qkv + b * ((H + 2 * G) * C)
        h = tl.arange(0, PADDED_HEADS)
        is_head = h < HEADS
        q_address = token_qkv + (group * HEADS + h)[:, None] * C + half[None, :]
        q_1 = tl.load(q_address, mask=is_head[:, None], other=0.0).to(tl.float32)
        q_2 = tl.load(q_address + C // 2, mask=is_head[:, None], other=0.0).to(tl.float32)
        has_newest = split == newest
        new_key = token_qkv + (H + kv_head) * C + half
        k_1 = tl.load(new_key, mask=has_newest & (half >= 0), other=0.0).to(tl.float32)
        k_2 = tl.load(new_key + C // 2, mask=has_newest & (half >= 0), other=0.0).to(tl.float32)
        new_value = tl.load(token_qkv + (H + G + kv_head) * C + c, mask=has_newest & (c >= 0), other=0.0)
        q_scale = tl.rsqrt(tl.sum(q_1 * q_1 + q_2 * q_2, axis=1) / C + EPS)[:, None]
        q_1 = q_1 * q_scale * q_gain_1[None, :]
        q_2 = q_2 * q_scale * q_gain_2[None, :]
        softmax_scale = LOG2_E / tl.sqrt(C * 1.0)
        rotated_1 = (q_1 * cos_half[None, :] - q_2 * sin_half[None, :]) * softmax_scale
        rotated_2 = (q_2 * cos_half[None, :] + q_1 * sin_half[None, :]) * softmax_scale
        query_1 = rotated_1.to(key_cache.dtype.element_ty)
        query_2 = rotated_2.to(key_cache.dtype.element_ty)

        maximum = tl.full([PADDED_HEADS], float("-inf"), tl.float32)
        total = tl.zeros([PADDED_HEADS], tl.float32)
        accumulated = tl.zeros([PADDED_HEADS, C], tl.float32)
        if has_newest:
            k_scale = tl.rsqrt(tl.sum(k_1 * k_1 + k_2 * k_2, axis=0) / C + EPS)
            k_1 = k_1 * k_scale * k_gain_1
            k_2 = k_2 * k_scale * k_gain_2
            stored_1 = (k_1 * cos_half - k_2 * sin_half).to(key_cache.dtype.element_ty)
            stored_2 = (k_2 * cos_half + k_1 * sin_half).to(key_cache.dtype.element_ty)
            if group * HEADS % (H // G) == 0:
                tl.store(key_cache + new_row + half, stored_1)
                tl.store(key_cache + new_row + C // 2 + half, stored_2)
                tl.store(value_cache + new_row + c, new_value)
            products = rotated_1 * stored_1.to(tl.float32)[None, :] + rotated_2 * stored_2.to(tl.float32)[None, :]
            maximum = tl.sum(products, axis=1)
            total += 1.0
            accumulated += new_value.to(tl.float32)[None, :]

        for position in range(start, end, BLOCK):
            scores = tl.dot(query_1, tl.trans(key_1))
            scores = tl.dot(query_2, tl.trans(key_2), scores)
            scores = tl.where(((position + j) < end)[None, :], scores, float("-inf"))
            maximum, total, accumulated = add_tile(scores, value, maximum, total, accumulated)
            following = position + BLOCK
            key_1, key_2, value = cached_tile(key_cache, value_cache, table, following, end, kv_head, G, C, S, BLOCK)

        first_head = b * H + group * HEADS
        attended = accumulated / total[:, None]
        if newest == 0:
            addresses = output + (first_head + h)[:, None] * C + c[None, :]
            tl.store(addresses, attended.to(output.dtype.element_ty), mask=is_head[:, None])
        else:
            part = ((first_head + h) * MAX_SPLITS + split).to(tl.int64)
            tl.store(partial_output + part[:, None] * C + c[None, :], attended, mask=is_head[:, None])
            tl.store(log_sums + part, maximum + tl.log2(total), mask=is_head)


@triton.jit
def combine_splits_kernel(
    seq_lens,  # [B] int64
    partial_output,  # [B, H, MAX_SPLITS, C] float32
    log_sums,  # [B, H, MAX_SPLITS] float32
    output,  # [B, H * C]
    C: tl.constexpr,
    SPLITS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    MAX_ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Combines the partial outputs of a head's KV splits by their log-sum-exp, if there are several. Grid (H, B)."""
    b = tl.program_id(1)
    head = b * tl.num_programs(0) + tl.program_id(0)
    pdl_trigger(PDL)
    _, _, newest = splitting(seq_lens, b, BLOCK, SPLITS, MAX_SPLITS, MAX_ROUNDS)
    pdl_wait(PDL)
    if newest > 0:
        c = tl.arange(0, C)
        s = tl.arange(0, MAX_SPLITS)
        parts = head.to(tl.int64) * MAX_SPLITS + s
        is_part = s <= newest
        sums = tl.load(log_sums + parts, mask=is_part, other=float("-inf"))
        addresses = partial_output + parts[:, None] * C + c[None, :]
        outputs = tl.load(addresses, mask=is_part[:, None], other=0.0)
        weights = tl.exp2(sums - tl.max(sums, axis=0))
        combined = tl.sum(outputs * weights[:, None], axis=0) / tl.sum(weights, axis=0)
        tl.store(output + head * C + c, combined.to(output.dtype.element_ty))


def attention_supports(qkv: torch.Tensor, cos_sin: tuple[torch.Tensor, ...], key_cache: torch.Tensor) -> bool:
    """Returns whether the kernels of this file and of prefill_attention.py support these tensors."""
    cos, sin = cos_sin
    block_size, _, head_dim = key_cache.shape[1:]
    sizes_fit = is_power_of_two(head_dim) and 32 <= head_dim <= 256 and block_size % ATTENTION_BLOCK == 0
    return (
        sizes_fit
        and qkv.dtype == key_cache.dtype
        and cos.dtype == torch.float32
        and fits(qkv, cos, sin, key_cache)
        and key_cache.numel() < 2**31  # 32-bit offsets
    )


def head_sizes(qkv: torch.Tensor, key_cache: torch.Tensor) -> tuple[int, int, int]:
    """Head counts and size (H, G, C) of qkv [T, (H + 2G) * C] and a cache [L, S, G, C]."""
    num_kv_heads, head_dim = key_cache.shape[2:]
    return qkv.shape[1] // head_dim - 2 * num_kv_heads, num_kv_heads, head_dim


class DecodeAttentionCall:
    """Decode attention (`Ops.attention`), bound to the q/k norm weights of a layer."""

    def __init__(
        self,
        qkv: torch.Tensor,
        q_norm_weight: torch.Tensor,
        k_norm_weight: torch.Tensor,
        eps: float,
        key_cache: torch.Tensor,
        pdl: bool,
    ):
        num_sequences = qkv.shape[0]
        block_size = key_cache.shape[1]
        num_heads, num_kv_heads, head_dim = head_sizes(qkv, key_cache)
        heads, splits, warps = attention_split(num_sequences, num_heads // num_kv_heads)
        max_splits = triton.next_power_of_2(splits + 1)
        self.block_size, self.splits, self.max_splits = block_size, splits, max_splits
        self.table_width = -1
        self.output = qkv.new_empty(num_sequences, num_heads * head_dim)
        partial_output = qkv.new_empty(num_sequences, num_heads, max_splits, head_dim, dtype=torch.float32)
        log_sums = qkv.new_empty(num_sequences, num_heads, max_splits, dtype=torch.float32)
        results = (partial_output, log_sums, self.output)
        sizes = {"C": head_dim, "SPLITS": splits, "MAX_SPLITS": max_splits, "MAX_ROUNDS": ATTENTION_MAX_ROUNDS}
        sizes |= {"BLOCK": ATTENTION_BLOCK}
        self.kernel = BoundKernel(
            decode_attention_kernel,
            (num_heads // heads, splits, num_sequences),
            warps,
            pdl,
            (q_norm_weight, k_norm_weight, *results),
            H=num_heads,
            G=num_kv_heads,
            S=block_size,
            HEADS=heads,
            PADDED_HEADS=max(16, triton.next_power_of_2(heads)),
            EPS=eps,
            **sizes,
            PDL=pdl,
        )
        grid = (num_heads, num_sequences)
        self.combine = BoundKernel(combine_splits_kernel, grid, 1, pdl, results, **sizes, PDL=pdl)

    def __call__(
        self,
        qkv: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        step: StepMetadata,
    ) -> torch.Tensor:
        table = step.block_table
        if table.shape[1] != self.table_width:
            if self.table_width < 0:
                self.combine(step.seq_lens)  # compile before generation starts; its output is overwritten
            self.table_width = table.shape[1]
            groups, _, num_sequences = self.kernel.grid
            self.kernel.grid = (groups, self.splits_of(table.shape[1] * self.block_size), num_sequences)
        caches = (key_cache, value_cache)
        self.kernel(qkv, *cos_sin, *caches, step.slot_mapping, table, step.seq_lens, table.stride(0))
        if self.kernel.grid[1] > 1:
            self.combine(step.seq_lens)
        return self.output

    def splits_of(self, num_tokens: int) -> int:
        """Maximum number of splits for sequences of up to `num_tokens` tokens."""
        tiles = triton.cdiv(num_tokens, ATTENTION_BLOCK)
        if tiles <= 1:
            return 1
        return min(self.max_splits, max(min(tiles, self.splits), triton.cdiv(tiles, ATTENTION_MAX_ROUNDS)) + 1)
