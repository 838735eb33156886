# SPDX-License-Identifier: Apache-2.0
"""Sorts (token, expert) pairs by expert: a deterministic counting sort in two kernels without atomics.

The index of a pair is token * K + choice. The first kernel computes a histogram of experts per block of pairs; the
second derives output positions by prefix sums over the histograms and splits the rows of each expert into tiles, each
described by a slot.
"""

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from ops.cuda.launch import BoundKernel

CHUNK = 128  # pairs or slots that a program handles at a time
MAX_BLOCKS = 128
PREFIX = 64  # histograms loaded at a time
SLOT_FIELDS = tl.constexpr(5)


@triton.jit(do_not_specialize=["num_pairs", "per_block"])
def count_kernel(
    expert_ids,  # [P]; >= E: expert on another rank
    counts,  # [blocks, BLOCK_E] int32
    num_pairs,
    per_block,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Histogram of expert ids. One program per block of `per_block` pairs."""
    block = tl.program_id(0)
    total = tl.zeros([BLOCK_E], tl.int32)
    end = tl.minimum((block + 1) * per_block, num_pairs)
    for first in range(block * per_block, end, CHUNK):
        pair = first + tl.arange(0, CHUNK)
        ids = tl.load(expert_ids + pair, mask=pair < end, other=E).to(tl.int32)
        total += tl.histogram(ids, BLOCK_E, mask=ids < E)
    tl.store(counts + block * BLOCK_E + tl.arange(0, BLOCK_E), total)


@triton.jit(do_not_specialize=["num_pairs", "per_block", "num_blocks", "num_slots"])
def scatter_kernel(
    expert_ids,  # [P]
    counts,  # [blocks, BLOCK_E] int32
    order,  # [P] int32: pair of each sorted row; undefined past the rows of local experts
    slots,  # [num_slots, SLOT_FIELDS] int32: expert (-1: unused), its start and end row, first slot, number of slots
    num_pairs,
    per_block,
    num_blocks,
    num_slots,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    PREFIX: tl.constexpr,  # histograms loaded per iteration
    ROWS: tl.constexpr,  # rows per tile
):
    """Scatters pairs to sorted rows (one program per block) and writes tiles (one further program per CHUNK slots)."""
    block = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], tl.int32)
    before = tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, num_blocks, PREFIX):
        other = first + tl.arange(0, PREFIX)
        part = tl.load(counts + other[:, None] * BLOCK_E + e[None, :], mask=(other < num_blocks)[:, None], other=0)
        total += tl.sum(part, axis=0)
        before += tl.sum(tl.where((other < block)[:, None], part, 0), axis=0)
    start = tl.cumsum(total, axis=0) - total
    if block < num_blocks:
        following = start + before
        end = tl.minimum((block + 1) * per_block, num_pairs)
        for first in range(block * per_block, end, CHUNK):
            pair = first + tl.arange(0, CHUNK)
            ids = tl.load(expert_ids + pair, mask=pair < end, other=E).to(tl.int32)
            is_earlier_one = (ids[:, None] == ids[None, :]) & (pair[:, None] > pair[None, :])
            row = tl.gather(following, tl.minimum(ids, BLOCK_E - 1), axis=0) + tl.sum(
                is_earlier_one.to(tl.int32), axis=1
            )
            tl.store(order + row, pair, mask=ids < E)
            following += tl.histogram(ids, BLOCK_E, mask=ids < E)
    else:
        tiles = (total + ROWS - 1) // ROWS
        tile_end = tl.cumsum(tiles, axis=0)
        slot = (block - num_blocks) * CHUNK + tl.arange(0, CHUNK)
        expert = tl.sum((tile_end[None, :] <= slot[:, None]).to(tl.int32), axis=1)
        used = slot < num_slots
        fields = slots + slot * SLOT_FIELDS
        tl.store(fields, tl.where(expert < BLOCK_E, expert, -1), mask=used)
        expert = tl.minimum(expert, BLOCK_E - 1)
        tl.store(fields + 1, tl.gather(start, expert, axis=0), mask=used)
        tl.store(fields + 2, tl.gather(start + total, expert, axis=0), mask=used)
        tl.store(fields + 3, tl.gather(tile_end - tiles, expert, axis=0), mask=used)
        tl.store(fields + 4, tl.gather(tiles, expert, axis=0), mask=used)


class ExpertOrder:
    """Sort by expert, bound to a number of experts and rows per tile."""

    def __init__(self, num_experts: int, tile_rows: int):
        self.num_experts = num_experts
        self.tile_rows = tile_rows
        self.block_e = triton.next_power_of_2(num_experts)
        sizes = {"E": num_experts, "BLOCK_E": self.block_e, "CHUNK": CHUNK}
        self.count = BoundKernel(count_kernel, (1,), 4, **sizes)
        self.place = BoundKernel(scatter_kernel, (1,), 4, **sizes, PREFIX=PREFIX, ROWS=tile_rows)

    def __call__(self, expert_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sorts expert ids [P] int64 -> order [P] int32 and slots [S, 5] int32 (see `scatter_kernel`); S depends on P
        only, which avoids a host sync."""
        num_pairs = expert_ids.numel()
        per_block = triton.cdiv(triton.cdiv(num_pairs, MAX_BLOCKS), CHUNK) * CHUNK
        num_blocks = triton.cdiv(num_pairs, per_block)
        counts = expert_ids.new_empty(num_blocks, self.block_e, dtype=torch.int32)
        order = expert_ids.new_empty(num_pairs, dtype=torch.int32)
        slots = self.new_slots(expert_ids, num_pairs)
        self.count.grid = (num_blocks, 1, 1)
        self.count(expert_ids, counts, num_pairs, per_block)
        self.place.grid = (num_blocks + triton.cdiv(slots.shape[0], CHUNK), 1, 1)
        self.place(expert_ids, counts, order, slots, num_pairs, per_block, num_blocks, slots.shape[0])
        return order, slots

    def slots_of(self, tokens_per_expert: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Slots for up to `num_rows` rows already in expert order: tokens_per_expert [E] int64 -> [S, 5] int32."""
        slots = self.new_slots(tokens_per_expert, num_rows)
        counts = F.pad(tokens_per_expert.int(), (0, self.block_e - self.num_experts))  # one block's histogram
        self.place.grid = (1 + triton.cdiv(slots.shape[0], CHUNK), 1, 1)
        self.place(tokens_per_expert, counts, slots, slots, 0, CHUNK, 1, slots.shape[0])
        return slots

    def new_slots(self, like: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Allocates slots for the worst-case distribution of `num_rows` rows over the experts."""
        num_slots = num_rows // self.tile_rows + min(num_rows, self.num_experts)
        return like.new_empty(num_slots, SLOT_FIELDS.value, dtype=torch.int32)
