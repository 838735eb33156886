# SPDX-License-Identifier: Apache-2.0
"""Block table on the device, updated incrementally."""

import torch

from ops.step import NULL_BLOCK, Span, blocks_for
from ops.transfer import to_device


class BlockTable:
    """Block table [max_rows, max_blocks] int32 on the device; row i belongs to the i-th sequence of a step.

    A sequence's list of blocks only grows (a preempted sequence gets a new list), so a row that holds the same list
    needs only its new entries: most decode steps write nothing.
    """

    def __init__(self, max_rows: int, max_blocks: int, device: torch.device):
        self.table = torch.full((max_rows, max_blocks), NULL_BLOCK, dtype=torch.int32, device=device)
        self.written: list[tuple[list[int], int]] = [([], 0) for _ in range(max_rows)]  # blocks, entries written

    def update(self, spans: list[Span], width: int | None = None) -> torch.Tensor:
        """Writes the rows of a step; returns the view [B, width] of the table.

        width: blocks of the longest sequence by default.
        """
        width = max((blocks_for(span.end) for span in spans), default=0) if width is None else width
        indices: list[int] = []
        entries: list[int] = []
        for row, span in enumerate(spans):
            needed = blocks_for(span.end)
            blocks, count = self.written[row]
            if blocks is not span.blocks:
                count = 0
            if count < needed:
                first = row * self.table.shape[1]
                indices.extend(range(first + count, first + needed))
                entries.extend(span.blocks[count:needed])
                self.written[row] = span.blocks, needed
        if indices:
            changes = to_device(torch.tensor([indices, entries]), self.table.device)
            self.table.view(-1)[changes[0]] = changes[1].int()
        return self.table[: len(spans), :width]
