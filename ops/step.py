# SPDX-License-Identifier: Apache-2.0
"""Metadata of one forward step, and the builder of its device tensors.

A step computes some tokens of some sequences. Each sequence has `num_computed` tokens in the paged KV cache and brings
`num_new` more: a whole prompt, a chunk of one, what follows a cached prefix, one decode token, or tokens to verify.
Shape letters as in ops/__init__.py.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from ops.transfer import to_device

BLOCK_SIZE = 128  # tokens per cache block; suits the paged attention of every backend
NULL_BLOCK = 0  # reserved padding block, to which padding rows write


def blocks_for(num_tokens: int) -> int:
    """Number of cache blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // BLOCK_SIZE)


@dataclass(frozen=True, kw_only=True)
class StepMetadata:
    """Tokens of one step, packed sequence by sequence along T.

    Tensors are on the device; the lists hold the same numbers on the host, for kernels that take plain integers. Before
    a captured decode step is replayed, the tensors are rewritten in place; lists passed to kernels are updated by the
    replay.
    """

    is_decode: bool  # one new token per sequence on every rank: the step that graphs capture
    starts_fresh: bool  # no sequence of this rank has cached tokens: attention needs no cache read
    positions: torch.Tensor  # [T] int64, position of each token in its sequence
    slot_mapping: torch.Tensor  # [T] int64, cache slot of each token: block * S + offset
    block_table: torch.Tensor  # [B, max_blocks] int32, contiguous in a row; unused entries are any block's
    query_starts: torch.Tensor  # [B + 1] int64, first row of each sequence along T; the last is T
    seq_lens: torch.Tensor  # [B] int64, tokens of each sequence including those of this step
    query_lens_list: list[int]  # [B], new tokens of each sequence
    seq_lens_list: list[int]  # [B], the same as seq_lens
    prompt_lens_list: list[int]  # [B], prompt tokens of each sequence, for length-dependent rotary embeddings
    dp_num_tokens: list[int]  # tokens of this step in every attention DP group, including this one
    sequence_parallel: bool = False  # whether, outside attention, the ranks of an attn_tp group shard its tokens

    @property
    def num_tokens(self) -> int:
        return self.positions.shape[0]

    @property
    def max_dp_tokens(self) -> int:
        return max(self.dp_num_tokens)


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of one sequence in a step: positions num_computed to num_computed + num_new - 1."""

    num_computed: int  # tokens already in the cache
    num_new: int
    blocks: list[int]  # cache blocks of the sequence, at least up to its last token of this step
    prompt_len: int

    @property
    def end(self) -> int:
        return self.num_computed + self.num_new


def step_inputs(
    spans: Sequence[Span],
    token_ids: Sequence[Sequence[int]],
    device: torch.device | str,
    *,
    block_table: torch.Tensor | None = None,
    dp_num_tokens: list[int] | None = None,
    is_decode: bool | None = None,
    sequence_parallel: bool = False,
) -> tuple[torch.Tensor, StepMetadata]:
    """Builds token ids [T] int64 and the metadata of a step; one copy to the device, two without `block_table`.

    spans, token_ids: the sequences, and their new tokens ([] for tokens that are already on the device and will be
    written there). block_table [B, max_blocks]: made from the spans if None. dp_num_tokens: the step's tokens in every
    attention DP group; None if there is one. is_decode: whether the step is a decode step on every rank; None derives
    it from the spans.
    """
    query_lens = [span.num_new for span in spans]
    seq_lens = [span.end for span in spans]
    num_tokens, num_rows = sum(query_lens), len(spans)
    if is_decode is None:
        is_decode = all(span.num_new == 1 and span.num_computed > 0 and span.end >= span.prompt_len for span in spans)
    layout = StepLayout(num_tokens, num_rows)
    tensors = layout.split(to_device(layout.pack(spans, token_ids), device))
    return tensors.token_ids, StepMetadata(
        is_decode=is_decode,
        starts_fresh=not any(span.num_computed for span in spans),
        positions=tensors.positions,
        slot_mapping=tensors.slot_mapping,
        block_table=block_table_of(spans, device) if block_table is None else block_table,
        query_starts=tensors.query_starts,
        seq_lens=tensors.seq_lens,
        query_lens_list=query_lens,
        seq_lens_list=seq_lens,
        prompt_lens_list=[span.prompt_len for span in spans],
        dp_num_tokens=[num_tokens] if dp_num_tokens is None else dp_num_tokens,
        sequence_parallel=sequence_parallel,
    )


@dataclass(frozen=True, slots=True)
class StepTensors:
    """Views of the packed integers of a step; shapes as in StepMetadata."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    seq_lens: torch.Tensor
    query_starts: torch.Tensor


class StepLayout:
    """Packing of a step's integers into one int64 tensor, so that they reach the device in one copy.

    Every part starts at a multiple of 16 bytes, as kernels assume.
    """

    def __init__(self, num_tokens: int, num_rows: int):
        self.sizes = [num_tokens, num_tokens, num_tokens, num_rows, num_rows + 1]
        self.padded = [size + size % 2 for size in self.sizes]

    def pack(self, spans: Sequence[Span], token_ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """Packs token ids, positions, slots, sequence lengths and query starts; int64 on the CPU."""
        tokens, positions, slot_mapping = array("q"), array("q"), array("q")
        for span, ids in zip(spans, token_ids, strict=True):
            tokens.extend(ids if len(ids) else [0] * span.num_new)
            positions.extend(range(span.num_computed, span.end))
            slot_mapping.extend(slots(span))
        seq_lens = [span.end for span in spans]
        query_starts = [0, *accumulate(span.num_new for span in spans)]
        parts = (tokens, positions, slot_mapping, seq_lens, query_starts)
        packed = array("q")
        for part, size, padded in zip(parts, self.sizes, self.padded, strict=True):
            assert len(part) == size, "token ids and spans disagree"
            packed.extend(part)
            packed.extend([0] * (padded - size))
        return torch.frombuffer(packed, dtype=torch.int64)

    def split(self, packed: torch.Tensor) -> StepTensors:
        """Views of a packed tensor."""
        parts = packed.split(self.padded)
        return StepTensors(*(part[:size] for part, size in zip(parts, self.sizes, strict=True)))

    @property
    def length(self) -> int:
        """Elements of the packed tensor."""
        return sum(self.padded)


def slots(span: Span) -> list[int]:
    """Cache slots of a span's tokens."""
    found: list[int] = []
    position = span.num_computed
    while position < span.end:
        offset = position % BLOCK_SIZE
        count = min(BLOCK_SIZE - offset, span.end - position)
        first = span.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + offset
        found.extend(range(first, first + count))
        position += count
    return found


def block_table_of(spans: Sequence[Span], device: torch.device | str) -> torch.Tensor:
    """Builds a block table [B, max_blocks] int32 of exactly the blocks that the step uses."""
    width = max((blocks_for(span.end) for span in spans), default=0)
    rows = [span.blocks[: blocks_for(span.end)] for span in spans]
    table = [row + [NULL_BLOCK] * (width - len(row)) for row in rows]
    return to_device(torch.tensor(table, dtype=torch.int32).reshape(len(spans), width), device)
