# SPDX-License-Identifier: Apache-2.0
"""Forward pass of a step: builds its inputs and runs the model.

A step's `batches` are those of every attention DP group, this rank's own at `dp_index`. All ranks run every step
together: one whose group has an empty batch takes part in the collectives.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch

from executor.engine.block_table import BlockTable
from executor.engine.decode_inputs import DecodeInputs, Unread
from executor.engine.scheduler import Batch, Scheduled
from models.layers.attention import KVCache
from models.layers.lm_head import ShardedLogits
from models.qwen3_moe.model import Qwen3Moe
from ops import StepMetadata
from ops.comm import ParallelContext
from ops.step import blocks_for, step_inputs
from ops.transfer import to_device

Batches = list[Batch]
PROMPT_ROWS = 256  # prompt positions whose logits are computed at a time: bounds their memory


@dataclass(frozen=True)
class Output:
    """Hidden states and residual [T, D] of a step, and the logits of the rows that are sampled, in batch order."""

    logits: ShardedLogits
    hidden_states: torch.Tensor | None = None  # None for decode steps
    residual: torch.Tensor | None = None


@dataclass(frozen=True)
class PromptSlice:
    """Consecutive prompt positions of one sequence in a step."""

    group: int  # attention DP group
    work: Scheduled
    first: int  # index of the first position among the sequence's new tokens
    start: int  # row of the sequence's first new token in the step
    num_rows: int

    @property
    def rows(self) -> slice:
        return slice(self.start + self.first, self.start + self.first + self.num_rows)

    @property
    def position(self) -> int:
        """Position of the slice's first token in the sequence."""
        return self.work.num_computed + self.first


class ModelRunner:
    """Runs steps eagerly, all but decode steps with sequence parallelism if that is on."""

    def __init__(
        self,
        model: Qwen3Moe,
        kv_caches: list[KVCache],
        parallel: ParallelContext,
        sequence_parallel: bool,
        device: torch.device,
        max_sequences: int,
        max_len: int,
    ):
        """max_sequences: largest batch of one group. max_len: most cached tokens of a sequence."""
        self.model = model
        self.kv_caches = kv_caches
        self.parallel = parallel
        self.dp_index = parallel.attn_dp.index
        self.sequence_parallel = sequence_parallel
        self.device = device
        self.block_table = BlockTable(max_sequences, blocks_for(max_len), device)
        self.tokens_run = 0  # by this rank's group, since the start
        self.inputs: DecodeInputs | None = None  # of the last decode step, for the next one of the same size

    def run(self, batches: Batches, unread: Unread | None = None) -> Output:
        """Runs one step."""
        batch = batches[self.dp_index]
        self.tokens_run += sum(work.num_new for work in batch)
        if is_decode(batches):
            return Output(self.decode(batches, unread))
        token_ids, step = self.mixed_inputs(batches, unread)
        hidden_states, residual = self.model.forward(token_ids, step, self.kv_caches)
        if all(work.samples for work in batch):
            last = step.query_starts[1:] - 1
        else:
            ends = accumulate(step.query_lens_list)
            rows = [end - 1 for end, work in zip(ends, batch, strict=True) if work.samples]
            last = to_device(torch.tensor(rows, dtype=torch.int64), self.device)
        most = max(sum(work.samples for work in other) for other in batches)
        logits = self.model.logits(hidden_states[last], residual[last], most)
        return Output(logits, hidden_states, residual)

    def mixed_inputs(self, batches: Batches, unread: Unread | None) -> tuple[torch.Tensor, StepMetadata]:
        """Token ids [T] and metadata of a step that is not a decode step."""
        batch = batches[self.dp_index]
        spans = [work.span for work in batch]
        known = [work.sequence.tokens(work.num_computed, work.end) for work in batch]
        token_ids, step = step_inputs(
            spans,
            known,
            self.device,
            block_table=self.block_table.update(spans),
            dp_num_tokens=[sum(work.num_new for work in other) for other in batches],
            is_decode=False,
            sequence_parallel=self.sequence_parallel,
        )
        if unread is not None:
            unread.copy_to(token_ids, batch, known, step.query_starts)
        return token_ids, step

    def decode(self, batches: Batches, unread: Unread | None) -> ShardedLogits:
        """Runs a decode step; logits of every sequence."""
        batch = batches[self.dp_index]
        shape = (len(batch), [len(other) for other in batches])
        if self.inputs is None or self.inputs.shape != shape:
            self.inputs = DecodeInputs(*shape, self.device)
        width = max((blocks_for(work.end) for work in batch), default=0)
        token_ids, step = self.inputs.fill(batch, unread, self.block_table, width)
        return self.decode_step(token_ids, step)

    def decode_step(self, token_ids: torch.Tensor, step: StepMetadata) -> ShardedLogits:
        """token_ids [B] -> logits [B, V]."""
        return self.model.logits(*self.model.forward(token_ids, step, self.kv_caches), step.max_dp_tokens)

    def prompt_logits(self, output: Output, batches: Batches) -> Iterator[tuple[list[PromptSlice], ShardedLogits]]:
        """Yields the logits of the prompt positions that want them, in slices of at most PROMPT_ROWS per group.

        With them come the slices of all groups: ranks that share the vocabulary run the collectives of as many slices
        as the group with the most.
        """
        slices = [prompt_slices(batch, group) for group, batch in enumerate(batches)]
        assert output.hidden_states is not None and output.residual is not None
        for number in range(max(map(len, slices))):
            pieces = [group[number] for group in slices if number < len(group)]
            own = [piece.rows for piece in pieces if piece.group == self.dp_index] or [slice(0, 0)]
            most = max(piece.num_rows for piece in pieces)
            yield pieces, self.model.logits(output.hidden_states[own[0]], output.residual[own[0]], most)


def prompt_slices(batch: Batch, group: int) -> list[PromptSlice]:
    """Slices of a group's step that cover the prompt positions whose logits are wanted."""
    slices, start = [], 0
    for work in batch:
        if work.wants_prompt_rows:
            for first in range(0, work.num_new, PROMPT_ROWS):
                slices.append(PromptSlice(group, work, first, start, min(PROMPT_ROWS, work.num_new - first)))
        start += work.num_new
    return slices


def is_decode(batches: Batches) -> bool:
    """Whether a step is a decode step on every rank."""
    return all(work.is_decode for batch in batches for work in batch)
