# SPDX-License-Identifier: Apache-2.0
"""Expert routing of a step: top-k ids and weights, router logits, or rows already grouped by expert.

Shape letters as in ops/__init__.py.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

NO_EXPERT = 10239  # expert id of padding rows, on no rank: the largest that the operations of every backend take


class Routing(NamedTuple):
    """Top-k expert ids and weights of each token."""

    topk_weights: torch.Tensor  # [T, K] float32, or the model's dtype where a backend's kernels want that
    topk_ids: torch.Tensor  # [T, K] int64, or int32 where a backend's kernels want that
    has_elsewhere: bool = False  # whether ids may name experts on other ranks, which are skipped
    first: int = 0  # id of the first local expert

    def chosen(self) -> "Routing":
        return self

    def of_rank(self, first: int, count: int) -> "Routing":
        """The same ids, of which `first` to `first` + `count` - 1 are local experts."""
        return self._replace(has_elsewhere=True, first=first)

    def local(self, count: int) -> "Routing":
        """Maps the ids to 0 to `count` - 1, the number of local experts, and to `count` for experts on other ranks."""
        if not self.has_elsewhere:
            return self
        ids = self.topk_ids - self.first
        return Routing(self.topk_weights, ids.masked_fill((ids < 0) | (ids >= count), count), has_elsewhere=True)


@dataclass(frozen=True)
class RouterLogits:
    """Router logits before top-k, for backends that fuse top-k into `experts`; dispatch needs `chosen()`."""

    logits: torch.Tensor  # [T, E]
    top_k: int
    renormalize: bool  # whether the top-k weights are normalised to sum to 1
    first: int = 0  # first local expert
    count: int | None = None  # number of local experts; None: all

    def chosen(self) -> Routing:
        """Computes softmax over all experts, then top-k."""
        topk_weights, topk_ids = self.logits.softmax(dim=-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        if self.renormalize:
            topk_weights = topk_weights / topk_weights.sum(dim=-1, keepdim=True)
        routing = Routing(topk_weights, topk_ids)
        return routing if self.count is None else routing.of_rank(self.first, self.count)

    def of_rank(self, first: int, count: int) -> "RouterLogits":
        """As `Routing.of_rank`, once `chosen()` is called."""
        return replace(self, first=first, count=count)


@dataclass(frozen=True)
class GroupedRows:
    """Routing of rows already grouped by expert in ascending order, one expert per row.

    The source rank of the rows applies topk_weights in combine. Rows past the sum of tokens_per_expert are undefined.
    """

    tokens_per_expert: torch.Tensor  # [E] int64
