# SPDX-License-Identifier: Apache-2.0
"""Causal attention of new tokens over the paged cache: chunks of prompts, tokens to verify, decode tokens among them.

The new keys and values are in the cache already. A tile holds some new tokens of one sequence for all query heads of a
kv head, so that each cached key and value is loaded once for the whole group. Sequences with few new tokens get small
tiles and many KV splits, the others large tiles; each kind is a launch of its own.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ops import StepMetadata
from ops.cuda.attention import LOG2_E, add_tile
from ops.cuda.launch import BoundKernel, pdl_trigger, pdl_wait
from ops.cuda.prefill_attention import LOWEST
from ops.cuda.tiles import extend_block

FEW_ROWS, MANY_ROWS, ROWS_OF_WARP = 64, 128, 16  # rows per tile and per warp
STAGES = 3
PROGRAMS = 132  # that run at a time: multiprocessors of a large GPU
MAX_SPLITS = 64
MAX_PARTS = 512  # programs of a launch with several splits, which bounds the memory of their partial outputs
MIN_SPLIT = 128  # cached tokens of a split, a multiple of every BLOCK
START_TOKENS = 256  # cached tokens that a program could attend to in the time that it takes to start and be combined
SEQUENCES = tl.constexpr(128)  # sequences searched at a time


@triton.jit
def find_tile(
    query_starts, seq_lens, num_sequences, tile, TOKENS: tl.constexpr, FEW: tl.constexpr, IS_FEW: tl.constexpr
):
    """Finds the sequence of a tile of TOKENS tokens, among the sequences with (IS_FEW) at most FEW new tokens or more.

    Returns the sequence, the row along T of the tile's first token, the number of its tokens, and the position of the
    first.
    """
    sequence = 0
    earlier = 0  # tiles of the sequences before it
    count = 0
    for first in range(0, num_sequences, SEQUENCES):
        s = first + tl.arange(0, SEQUENCES)
        is_sequence = s < num_sequences
        starts = tl.load(query_starts + s, mask=is_sequence, other=0)
        lens = (tl.load(query_starts + s + 1, mask=is_sequence, other=0) - starts).to(tl.int32)
        tiles = tl.where((lens <= FEW) == IS_FEW, tl.cdiv(lens, TOKENS), 0)
        is_earlier = count + tl.cumsum(tiles, axis=0) <= tile
        sequence += tl.sum(is_earlier.to(tl.int32), axis=0)
        earlier += tl.sum(tl.where(is_earlier, tiles, 0), axis=0)
        count += tl.sum(tiles, axis=0)
    first_row = tl.load(query_starts + sequence).to(tl.int32)
    query_len = tl.load(query_starts + sequence + 1).to(tl.int32) - first_row
    first_token = (tile - earlier) * TOKENS
    position = tl.load(seq_lens + sequence).to(tl.int32) - query_len + first_token
    return sequence, first_row + first_token, tl.minimum(query_len - first_token, TOKENS), position


@triton.jit(do_not_specialize=["num_sequences", "table_stride", "per_split"])
def extend_attention_kernel(
    query_key,  # [T, H + G, C], only the queries are read
    key_cache,  # [L, S, G, C]
    value_cache,  # [L, S, G, C]
    block_table,  # [B, max_blocks] int32
    query_starts,  # [B + 1] int64
    seq_lens,  # [B] int64
    partial_output,  # [tiles, G, splits, ROWS, C] float32
    log_sums,  # [tiles, G, splits, ROWS] float32: log2-sum-exp2 of a split
    output,  # [T, H * C]
    num_sequences,
    table_stride,
    per_split,  # cached tokens per split, a multiple of BLOCK
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
    ROWS: tl.constexpr,  # rows per tile: tokens times query heads of a kv head
    BLOCK: tl.constexpr,  # cached tokens per iteration; divides S
    STAGES: tl.constexpr,
    FEW: tl.constexpr,
    IS_FEW: tl.constexpr,
    PDL: tl.constexpr,
):
    """Flash attention (Dao et al. 2022) of a tile of new tokens over a KV split. Grid (G, tiles, splits).

    The last tiles of a sequence, which attend to most tokens, start first. Splits past a tile's last token exit.
    """
    kv_head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    split = tl.program_id(2)
    GROUP: tl.constexpr = H // G
    pdl_trigger(PDL)
    sequence, first_row, num_tokens, position = find_tile(
        query_starts, seq_lens, num_sequences, tile, ROWS // GROUP, FEW, IS_FEW
    )
    seen = position + num_tokens  # cached tokens that the tile's last token attends to
    start = split * per_split
    pdl_wait(PDL)
    if start < seen:
        r = tl.arange(0, ROWS)
        c = tl.arange(0, C)
        j = tl.arange(0, BLOCK)
        token = r // GROUP
        head = kv_head * GROUP + r % GROUP
        is_row = (token < num_tokens)[:, None]
        rows = (first_row + token).to(tl.int64)
        query = tl.load(query_key + ((rows * (H + G) + head) * C)[:, None] + c[None, :], mask=is_row, other=0.0)
        end = tl.minimum(start + per_split, seen)
        seen_by_all = tl.maximum(start, tl.minimum((position + 1) // BLOCK * BLOCK, end))
        table = block_table + sequence * table_stride
        maximum = tl.full([ROWS], LOWEST, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        accumulated = tl.zeros([ROWS, C], tl.float32)
        scale = LOG2_E / tl.sqrt(C * 1.0)
        for MASKED in tl.static_range(2):  # first the cached tokens that all rows attend to
            first_of_loop = seen_by_all if MASKED else start
            end_of_loop = end if MASKED else seen_by_all
            block = tl.load(table + first_of_loop // S, mask=first_of_loop < end_of_loop, other=0)
            for first in tl.range(first_of_loop, end_of_loop, BLOCK, num_stages=STAGES):
                cached = ((block * S + first % S + j) * G + kv_head) * C
                following = first + BLOCK  # its block is loaded an iteration early, as key and value wait for it
                block = tl.load(table + following // S, mask=following < end_of_loop, other=0)
                if MASKED:
                    is_cached = (first + j < end)[:, None]  # the rest of the block may hold NaN
                    key = tl.load(key_cache + cached[:, None] + c[None, :], mask=is_cached, other=0.0)
                    value = tl.load(value_cache + cached[:, None] + c[None, :], mask=is_cached, other=0.0)
                else:
                    key = tl.load(key_cache + cached[:, None] + c[None, :])
                    value = tl.load(value_cache + cached[:, None] + c[None, :])
                scores = tl.dot(query, tl.trans(key))
                if MASKED:
                    is_seen = (first + j)[None, :] <= (position + token)[:, None]
                    scores = tl.where(is_seen, scores, float("-inf"))
                maximum, total, accumulated = add_tile(scores, value, maximum, total, accumulated, scale)
        attended = accumulated / tl.where(total == 0.0, 1.0, total)[:, None]  # 0: a row that precedes the whole split
        if seen <= per_split:
            target = output + ((rows * H + head) * C)[:, None] + c[None, :]
            tl.store(target, attended.to(output.dtype.element_ty), mask=is_row)
        else:
            part = ((tile * G + kv_head) * tl.num_programs(2) + split).to(tl.int64) * ROWS + r
            tl.store(partial_output + part[:, None] * C + c[None, :], attended, mask=is_row)
            tl.store(log_sums + part, maximum + tl.log2(total))


@triton.jit(do_not_specialize=["num_sequences", "per_split", "splits"])
def combine_extend_splits_kernel(
    query_starts,  # [B + 1] int64
    seq_lens,  # [B] int64
    partial_output,  # [tiles, G, splits, ROWS, C] float32
    log_sums,  # [tiles, G, splits, ROWS] float32
    output,  # [T, H * C]
    num_sequences,
    per_split,
    splits,
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    FEW: tl.constexpr,
    IS_FEW: tl.constexpr,
    PDL: tl.constexpr,
):
    """Combines the KV splits of a row by their log-sum-exp, if there are several. Grid (ROWS, G, tiles)."""
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    tile = tl.program_id(2)
    GROUP: tl.constexpr = H // G
    pdl_trigger(PDL)
    _, first_row, num_tokens, position = find_tile(
        query_starts, seq_lens, num_sequences, tile, ROWS // GROUP, FEW, IS_FEW
    )
    token = row // GROUP
    seen = position + num_tokens
    pdl_wait(PDL)
    if (token < num_tokens) & (seen > per_split):
        s = tl.arange(0, MAX_SPLITS)
        c = tl.arange(0, C)
        is_part = s < tl.cdiv(seen, per_split)
        parts = ((tile * G + kv_head) * splits + s).to(tl.int64) * ROWS + row
        sums = tl.load(log_sums + parts, mask=is_part, other=float("-inf"))
        outputs = tl.load(partial_output + parts[:, None] * C + c[None, :], mask=is_part[:, None], other=0.0)
        weights = tl.exp2(sums - tl.max(sums, axis=0))
        combined = tl.sum(outputs * weights[:, None], axis=0) / tl.sum(weights, axis=0)
        head = kv_head * GROUP + row % GROUP
        target = output + ((first_row + token).to(tl.int64) * H + head) * C + c
        tl.store(target, combined.to(output.dtype.element_ty))


@dataclass(frozen=True)
class ExtendPlan:
    """Grid of a launch: tiles, KV splits of the longest sequence, cached tokens per split."""

    tiles: int
    splits: int
    per_split: int


def plan_extend(sequences: list[tuple[int, int]], tile_tokens: int, num_kv_heads: int) -> ExtendPlan:
    """Plans a launch for sequences of (new tokens, all tokens), so that waves of programs end soonest."""
    tiles_of = [triton.cdiv(query_len, tile_tokens) for query_len, _ in sequences]
    longest = max(seq_len for _, seq_len in sequences)
    work = num_kv_heads * sum(tiles * seq_len for tiles, (_, seq_len) in zip(tiles_of, sequences, strict=True))

    def duration(splits: int) -> float:
        """In cached tokens: those of the longest split, and what its start takes, in every wave."""
        waves = triton.cdiv(work * splits, longest * PROGRAMS)
        return waves * (longest / splits + START_TOKENS)

    max_splits = min(MAX_SPLITS, longest // MIN_SPLIT, MAX_PARTS // (num_kv_heads * sum(tiles_of)))
    splits = min(range(1, max(1, max_splits) + 1), key=duration)
    per_split = triton.cdiv(triton.cdiv(longest, splits), MIN_SPLIT) * MIN_SPLIT
    return ExtendPlan(sum(tiles_of), triton.cdiv(longest, per_split), per_split)


class ExtendLaunch:
    """Kernels for the sequences with at most `few` new tokens (is_few), or for those with more."""

    def __init__(
        self, num_heads: int, num_kv_heads: int, key_cache: torch.Tensor, rows: int, few: int, is_few: bool, pdl: bool
    ):
        block_size, _, head_dim = key_cache.shape[1:]
        self.num_kv_heads, self.head_dim, self.rows = num_kv_heads, head_dim, rows
        self.tile_tokens = rows // (num_heads // num_kv_heads)
        self.few, self.is_few = few, is_few
        block = {"S": block_size, "BLOCK": extend_block(key_cache.device, head_dim, is_few), "STAGES": STAGES}
        sizes = {"H": num_heads, "G": num_kv_heads, "C": head_dim, "ROWS": rows, "FEW": few, "IS_FEW": is_few}
        warps = rows // ROWS_OF_WARP
        self.attend = BoundKernel(extend_attention_kernel, (1,), warps, pdl, (), **block, **sizes, PDL=pdl)
        sizes |= {"MAX_SPLITS": MAX_SPLITS}
        self.combine = BoundKernel(combine_extend_splits_kernel, (1,), 4, pdl, (), **sizes, PDL=pdl)

    def plan(self, step: StepMetadata) -> ExtendPlan | None:
        """Plans the launch for the sequences of a step that it takes; None if there are none."""
        sequences = [
            (query_len, seq_len)
            for query_len, seq_len in zip(step.query_lens_list, step.seq_lens_list, strict=True)
            if query_len > 0 and (query_len <= self.few) == self.is_few
        ]
        return plan_extend(sequences, self.tile_tokens, self.num_kv_heads) if sequences else None

    def __call__(
        self,
        plan: ExtendPlan,
        query_key: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        step: StepMetadata,
        output: torch.Tensor,
    ) -> None:
        """Writes the rows of `output` that belong to its sequences; shapes as in ExtendAttentionCall."""
        parts = (plan.tiles, self.num_kv_heads, plan.splits, self.rows) if plan.splits > 1 else (0,)
        partial_output = query_key.new_empty(*parts, self.head_dim, dtype=torch.float32)
        log_sums = query_key.new_empty(parts, dtype=torch.float32)
        lens, results = (step.query_starts, step.seq_lens), (partial_output, log_sums, output)
        num_sequences, table_stride = len(step.query_lens_list), step.block_table.stride(0)
        self.attend.grid = (self.num_kv_heads, plan.tiles, plan.splits)
        caches = (key_cache, value_cache, step.block_table)
        self.attend(query_key, *caches, *lens, *results, num_sequences, table_stride, plan.per_split)
        if plan.splits > 1:
            self.combine.grid = (self.rows, self.num_kv_heads, plan.tiles)
            self.combine(*lens, *results, num_sequences, plan.per_split, plan.splits)


class ExtendAttentionCall:
    """Attention of new tokens over the paged cache, for all layers of a shape."""

    def __init__(self, num_heads: int, num_kv_heads: int, key_cache: torch.Tensor, pdl: bool):
        group = num_heads // num_kv_heads
        few_rows = FEW_ROWS if 8 * group <= FEW_ROWS else MANY_ROWS
        kinds = ((few_rows, few_rows // group, True), (MANY_ROWS, few_rows // group, False))
        self.launches = [ExtendLaunch(num_heads, num_kv_heads, key_cache, *kind, pdl) for kind in kinds]
        self.width = num_heads * key_cache.shape[3]
        self.step: StepMetadata | None = None  # that the plans are for
        self.plans: list[ExtendPlan | None] = []

    def __call__(
        self, query_key: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, step: StepMetadata
    ) -> torch.Tensor:
        """Queries and keys [T, H + G, C], caches [L, S, G, C] that hold the new tokens -> [T, H * C]."""
        if step is not self.step:
            self.step, self.plans = step, [launch.plan(step) for launch in self.launches]
        output = query_key.new_empty(step.num_tokens, self.width)
        for launch, plan in zip(self.launches, self.plans, strict=True):
            if plan is not None:
                launch(plan, query_key, key_cache, value_cache, step, output)
        return output
