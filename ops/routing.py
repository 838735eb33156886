# SPDX-License-Identifier: Apache-2.0
"""Which experts the tokens of a step go to: chosen, not chosen yet, or sorted by already.

Letters as in ops/__init__.py.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch


class Routing(NamedTuple):
    """Which experts each token goes to."""

    topk_weights: torch.Tensor  # [T, K] float32, or the model's dtype where a backend's kernels want that
    topk_ids: torch.Tensor  # [T, K] int64, or int32 where a backend's kernels want that
    has_elsewhere: bool = False  # whether ids may be E, for "on another rank": nothing is computed or added for these

    def chosen(self) -> "Routing":
        return self

    def of_rank(self, first: int, count: int) -> "Routing":
        """The same over `count` experts from number `first`: they become 0, 1, ..., all others "on another rank"."""
        ids = self.topk_ids - first
        ids = ids.masked_fill((ids < 0) | (ids >= count), count)
        return Routing(self.topk_weights, ids, has_elsewhere=True)


@dataclass(frozen=True)
class RouterLogits:
    """A routing not chosen yet: a backend may leave that to `experts`, an exchange between ranks needs it made."""

    logits: torch.Tensor  # [T, E]
    top_k: int
    renormalize: bool  # whether a token's weights sum to 1
    first: int = 0  # of the experts on this rank,
    count: int | None = None  # which has so many, or all

    def chosen(self) -> Routing:
        """Softmax over all experts, then the largest."""
        topk_weights, topk_ids = self.logits.softmax(dim=-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        if self.renormalize:
            topk_weights = topk_weights / topk_weights.sum(dim=-1, keepdim=True)
        routing = Routing(topk_weights, topk_ids)
        return routing if self.count is None else routing.of_rank(self.first, self.count)

    def of_rank(self, first: int, count: int) -> "RouterLogits":
        """As `Routing.of_rank`."""
        return replace(self, first=first, count=count)


@dataclass(frozen=True)
class GroupedRows:
    """Rows that stand by expert already: first those of expert 0, then of expert 1, and so on, one expert a row.

    What the rows are weighted with, and which are summed, is known where they came from. Rows beyond the sum of the
    counts hold anything.
    """

    tokens_per_expert: torch.Tensor  # [E] int64
