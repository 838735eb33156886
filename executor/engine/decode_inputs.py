# SPDX-License-Identifier: Apache-2.0
"""Input tensors of decode steps, at fixed addresses as captured graphs need them."""

from dataclasses import dataclass, replace

import torch

from executor.engine.block_table import BlockTable
from executor.engine.scheduler import Batch
from ops import StepMetadata
from ops.step import BLOCK_SIZE, NULL_BLOCK, Span, StepLayout
from ops.transfer import to_device

EMPTY_BATCH_PADDING = [Span(0, 1, [NULL_BLOCK], 1)]  # where there is no first sequence to repeat


@dataclass(frozen=True)
class Unread:
    """Sampled tokens [R] of the previous step, integers on the device, which the host has not read."""

    token_ids: torch.Tensor
    rows: dict[int, int]  # id of a sequence -> row

    def copy_to(
        self,
        token_ids: torch.Tensor,
        batch: Batch,
        known: list[list[int]],
        query_starts: torch.Tensor | None = None,
    ) -> None:
        """Copies the tokens of the sequences that have none in `known` to their rows of `token_ids` [T].

        query_starts [B + 1]: first rows of the sequences; None for one row each. Device to device.
        """
        rows = [row for row, ids in enumerate(known) if not ids]
        sources = [self.rows[id(batch[row].sequence)] for row in rows]
        if query_starts is None and rows == sources == list(range(len(batch))):
            token_ids[: len(batch)] = self.token_ids[: len(batch)]
        elif rows:
            targets, index = to_device(torch.tensor([rows, sources]), token_ids.device)
            targets = targets if query_starts is None else query_starts[targets]
            token_ids[targets] = self.token_ids[index].long()


class DecodeInputs:
    """Token ids and metadata of decode steps of `num_rows` rows, written by one host-to-device copy a step.

    dp_num_tokens: rows in every attention DP group.
    """

    def __init__(self, num_rows: int, dp_num_tokens: list[int], device: torch.device):
        self.shape = (num_rows, dp_num_tokens)
        self.num_rows = num_rows
        self.layout = StepLayout(num_rows, num_rows)
        self.data = torch.zeros(self.layout.length, dtype=torch.int64, device=device)
        tensors = self.layout.split(self.data)
        self.token_ids = tensors.token_ids
        self.step = StepMetadata(
            is_decode=True,
            starts_fresh=False,
            positions=tensors.positions,
            slot_mapping=tensors.slot_mapping,
            block_table=torch.empty(num_rows, 0, dtype=torch.int32, device=device),
            query_starts=tensors.query_starts,
            seq_lens=tensors.seq_lens,
            query_lens_list=[1] * num_rows,
            seq_lens_list=[1] * num_rows,
            prompt_lens_list=[1] * num_rows,
            dp_num_tokens=dp_num_tokens,
        )

    def fill(
        self, batch: Batch, unread: Unread | None, block_table: BlockTable, width: int
    ) -> tuple[torch.Tensor, StepMetadata]:
        """Writes a row for each sequence of a batch, then padding rows; returns token ids [num_rows] and metadata.

        width: blocks of a block table row. Padding rows repeat the first sequence, so that they route to no further
        experts, and write to the null block, each to a slot of its own as long as there are enough.
        """
        spans = [work.span for work in batch]
        known = [work.sequence.tokens(work.num_computed, work.end) for work in batch]
        num_padding = self.num_rows - len(batch)
        spans += (spans[:1] or EMPTY_BATCH_PADDING) * num_padding
        packed = self.layout.pack(spans, known + (known[:1] or [[0]]) * num_padding)
        if num_padding:
            slots = self.layout.split(packed).slot_mapping
            slots[len(batch) :] = NULL_BLOCK * BLOCK_SIZE + torch.arange(len(batch), self.num_rows) % BLOCK_SIZE
        # CUDA copies a small pageable tensor before the call returns, so nothing has to wait for the device
        self.data.copy_(packed, non_blocking=self.data.is_cuda)
        if unread is not None:
            unread.copy_to(self.token_ids, batch, known)
            if num_padding and known and not known[0]:
                self.token_ids[len(batch) :] = self.token_ids[:1]
        self.step.seq_lens_list[:] = [span.end for span in spans]
        table = block_table.update(spans, width)
        if table.shape != self.step.block_table.shape or table.data_ptr() != self.step.block_table.data_ptr():
            self.step = replace(self.step, block_table=table)
        return self.token_ids, self.step
