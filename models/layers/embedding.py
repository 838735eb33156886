# SPDX-License-Identifier: Apache-2.0
"""Vocabulary-parallel token embedding."""

import torch

from models.layers.padding import pad_rows
from ops import Ops, StepMetadata
from ops.comm import Group


class Embedding:
    """Masked lookup in this rank's vocabulary shard, all-reduced over the group: token ids [T] -> [T, D].

    `same_tokens`: whether the ranks of the group hold the same tokens; if not, token ids are all-gathered first and the
    embeddings reduce-scattered.
    """

    def __init__(self, weight: torch.Tensor, group: Group, same_tokens: bool, ops: Ops):
        self.weight = weight
        self.group = group
        self.same_tokens = same_tokens
        self.ops = ops
        self.first_row = group.index * weight.shape[0]

    def __call__(self, token_ids: torch.Tensor, step: StepMetadata) -> torch.Tensor:
        if self.group.size == 1:
            return self.ops.embedding(token_ids, self.weight)
        if self.same_tokens:
            return self.group.all_reduce(self.own_rows(token_ids))
        gathered = self.group.all_gather(pad_rows(token_ids, step.max_dp_tokens))
        return self.group.reduce_scatter(self.own_rows(gathered))[: len(token_ids)]

    def own_rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Looks up embeddings [T, D] in this rank's shard; zeros for tokens whose rows are on other ranks."""
        rows = token_ids - self.first_row
        elsewhere = (rows < 0) | (rows >= self.weight.shape[0])
        return self.ops.embedding(rows.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere[:, None], 0)
