# SPDX-License-Identifier: Apache-2.0
"""Final norm and vocabulary-parallel lm_head; logits stay sharded."""

from dataclasses import dataclass

import torch

from models.layers.padding import pad_rows
from ops import Ops, Weight
from ops.comm import Group


@dataclass(frozen=True)
class ShardedLogits:
    """Logits [R, V] sharded over the vocabulary; R counts the rows of all ranks of the group if these differ.

    Each rank then holds its vocabulary shard for the rows of all; its own rows start at `first_row`.
    """

    local: torch.Tensor  # [R, V / size] float32
    group: Group
    first_row: int  # of this rank's rows among the R
    num_rows: int  # of this rank
    same_rows: bool = True  # whether the ranks of the group hold the same rows

    @property
    def part_size(self) -> int:
        """Size of a rank's vocabulary shard."""
        return self.local.shape[1]

    @property
    def first_id(self) -> int:
        """First token id of this rank's vocabulary shard."""
        return self.group.index * self.part_size

    def own(self, part: torch.Tensor) -> torch.Tensor:
        """All-gathers [R, N] of each rank along dimension 1, and keeps this rank's rows: [num_rows, size * N]."""
        gathered = self.group.all_gather(part).view(self.group.size, *part.shape)
        return gathered[:, self.first_row : self.first_row + self.num_rows].transpose(0, 1).flatten(1)

    def all_rows(self, own: torch.Tensor) -> torch.Tensor:
        """Values [num_rows] of this rank's rows -> [R], those of all ranks; padding rows have 0."""
        num_rows = self.local.shape[0] // (1 if self.same_rows else self.group.size)
        padded = pad_rows(own, num_rows)
        return padded if self.same_rows else self.group.all_gather(padded)

    def topk(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The `count` largest logits of each row and their token ids: [num_rows, count], in descending order.

        Only each rank's top-k candidates are all-gathered. For count 1, ties go to the lower token id.
        """
        values, ids = (
            self.local.topk(min(count, self.part_size), dim=-1) if count > 1 else self.local.max(-1, keepdim=True)
        )
        if self.group.size == 1:
            return values[: self.num_rows], ids[: self.num_rows]
        values, ids = self.own(values), self.own(ids + self.first_id)
        if count == 1:
            values, order = values.max(-1, keepdim=True)  # the first index on ties: the lowest rank, so the lowest id
        else:
            values, order = values.sort(dim=-1, descending=True, stable=True)
        return values[:, :count], ids.gather(1, order)[:, :count]

    def whole(self) -> torch.Tensor:
        """All-gathers the logits of this rank's rows [num_rows, V]."""
        return self.own(self.local)


class LmHead:
    """Final norm and vocabulary-parallel lm_head. `same_tokens`: whether the ranks of the group hold the same rows."""

    def __init__(
        self, norm_weight: torch.Tensor, eps: float, weight: Weight, group: Group, same_tokens: bool, ops: Ops
    ):
        self.norm_weight = norm_weight
        self.eps = eps
        self.weight = weight
        self.ops = ops
        self.group = group
        self.same_tokens = same_tokens

    def __call__(self, hidden_states: torch.Tensor, residual: torch.Tensor, max_rows: int) -> ShardedLogits:
        """Computes logits of hidden_states and residual [R, D]; max_rows: the largest R of any rank."""
        num_rows, first_row = hidden_states.shape[0], 0
        same_rows = self.same_tokens or self.group.size == 1
        if not same_rows:
            hidden_states = self.group.all_gather(pad_rows(hidden_states, max_rows))
            residual = self.group.all_gather(pad_rows(residual, max_rows))
            first_row = self.group.index * max_rows
        logits, _ = self.ops.norm_linear(hidden_states, residual, self.norm_weight, self.eps, self.weight)
        return ShardedLogits(logits.float(), self.group, first_row, num_rows, same_rows)
