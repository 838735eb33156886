# SPDX-License-Identifier: Apache-2.0
"""How tokens reach their experts on other ranks, and how the results come back.

`dispatch` turns a rank's tokens and their routing into rows and a routing over the experts this rank holds; `combine`
turns the experts' output of these rows into the output of the rank's tokens. Letters as in ops/__init__.py; EL experts
on this rank; an id of EL means "elsewhere".
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from models.layers.padding import pad_rows, share_of
from ops import RouterLogits, Routing, StepMetadata
from ops.comm import ParallelContext

NO_EXPERT = -(2**31)  # stands for a padding row's experts: elsewhere on every rank


@dataclass(frozen=True)
class Dispatched:
    """What the experts of this rank work on, and what `combine` needs to remember."""

    rows: torch.Tensor  # [R, D]
    routing: Routing | RouterLogits  # over the EL experts of this rank
    memory: Any = None


class ExpertExchange(Protocol):
    """A vendor's fused pair of operations fits behind these two as well."""

    def dispatch(self, hidden_states: torch.Tensor, routing: Routing | RouterLogits, step: StepMetadata) -> Dispatched:
        """[T, D] tokens of this rank: those of its attn_tp group or, in a sequence-parallel step, its share of them."""

    def combine(self, output: torch.Tensor, dispatched: Dispatched, step: StepMetadata) -> torch.Tensor:
        """[R, D] output of the dispatched rows -> [T, D]."""


class GatherExchange:
    """Every rank sees all tokens, runs its own experts (or its columns of them), and the ranks' results are summed.

    All ranks send the same number of rows and the host need not know where a token goes, so that a step with this
    exchange can be captured. With one group of attention ranks, nothing is gathered: local experts and an all_reduce.
    """

    def __init__(self, parallel: ParallelContext, num_local_experts: int):
        self.parallel = parallel
        self.num_local_experts = num_local_experts

    def dispatch(self, hidden_states: torch.Tensor, routing: Routing | RouterLogits, step: StepMetadata) -> Dispatched:
        group, count = self.parallel.attn_dp, step.max_dp_tokens
        if step.sequence_parallel:
            group, count = self.parallel.world, share_of(step.max_dp_tokens, self.parallel.attn_tp.size)
        if group.size == 1 and self.parallel.moe_ep.size == 1:
            return Dispatched(hidden_states, routing)
        routing = routing.chosen()
        weights, ids = routing.topk_weights, routing.topk_ids
        if group.size > 1:
            hidden_states = group.all_gather(pad_rows(hidden_states, count))
            weights = group.all_gather(pad_rows(weights, count))
            ids = group.all_gather(pad_rows(ids.int(), count, value=NO_EXPERT)).to(ids.dtype)
        ids = ids - self.parallel.moe_ep.index * self.num_local_experts
        ids = ids.masked_fill((ids < 0) | (ids >= self.num_local_experts), self.num_local_experts)
        return Dispatched(hidden_states, Routing(weights, ids, has_elsewhere=True))

    def combine(self, output: torch.Tensor, dispatched: Dispatched, step: StepMetadata) -> torch.Tensor:
        if step.sequence_parallel:
            own = self.parallel.world.reduce_scatter(output)
            return own[: share_of(step.num_tokens, self.parallel.attn_tp.size)]
        own = self.parallel.attn_dp.reduce_scatter(output)
        return self.parallel.attn_tp.all_reduce(own[: step.num_tokens])


class AllToAllExchange:
    """Every row travels only to the ranks that hold its expert ("double routing": sorted by rank, then by expert).

    The ranks of an attn_tp group hold the same tokens, so that each sends its share of them and they gather the
    results. How many rows go where is read by the host.
    """

    def __init__(self, parallel: ParallelContext, num_local_experts: int):
        self.parallel = parallel
        self.num_local_experts = num_local_experts

    def dispatch(self, hidden_states: torch.Tensor, routing: Routing | RouterLogits, step: StepMetadata) -> Dispatched:
        attn_tp, moe_tp = self.parallel.attn_tp, self.parallel.moe_tp
        routing = routing.chosen()
        ids, weights = routing.topk_ids, routing.topk_weights
        share = share_of(step.num_tokens, attn_tp.size)
        if not step.sequence_parallel:
            mine = slice(attn_tp.index * share, (attn_tp.index + 1) * share)
            hidden_states, ids, weights = hidden_states[mine], ids[mine], weights[mine]
        top_k = ids.shape[1]
        # rank of the world: ep index * moe_tp size + moe_tp index; each of the moe_tp ranks gets the row
        ep_index = (ids // self.num_local_experts).flatten()
        ranks = (ep_index[:, None] * moe_tp.size + torch.arange(moe_tp.size, device=ids.device)).flatten()
        order = ranks.argsort(stable=True)
        send = torch.bincount(ranks, minlength=self.parallel.world.size)
        receive = self.parallel.world.all_to_all(send, *([[1] * self.parallel.world.size] * 2))
        counts = (send.tolist(), receive.tolist())
        choices = order // moe_tp.size  # row of ids.flatten()
        rows = self.parallel.world.all_to_all(hidden_states[choices // top_k], *counts)
        local_ids = self.parallel.world.all_to_all((ids.flatten() % self.num_local_experts)[choices].int(), *counts)
        ones = torch.ones(len(rows), 1, dtype=torch.float32, device=rows.device)
        return Dispatched(rows, Routing(ones, local_ids.to(ids.dtype)[:, None]), (choices, weights, counts, share))

    def combine(self, output: torch.Tensor, dispatched: Dispatched, step: StepMetadata) -> torch.Tensor:
        choices, weights, (send, receive), share = dispatched.memory
        returned = self.parallel.world.all_to_all(output, receive, send)
        top_k = weights.shape[1]
        tokens = output.new_zeros(weights.shape[0], output.shape[1], dtype=torch.float32)
        tokens.index_add_(0, choices // top_k, returned * weights.flatten()[choices, None].float())
        tokens = tokens.to(output.dtype)
        if step.sequence_parallel:
            return tokens
        return self.parallel.attn_tp.all_gather(pad_rows(tokens, share))[: step.num_tokens]


def sent_bytes_per_token(
    parallel: ParallelContext, top_k: int, hidden_size: int, element_bytes: int
) -> dict[str, float]:
    """Bytes a rank sends for one layer's experts, divided by the tokens of its attention group, for each exchange.

    Assumes equally busy groups and routing spread evenly; docs/parallelism.md derives the formulas.
    """
    row = hidden_size * element_bytes
    attn_tp, attn_dp, world = parallel.attn_tp.size, parallel.attn_dp.size, parallel.world.size
    gather = (attn_dp - 1) * (2 * row + top_k * 8) + 2 * (attn_tp - 1) / attn_tp * row
    copies = top_k * parallel.moe_tp.size / attn_tp * (world - 1) / world
    return {"gather": gather, "all_to_all": copies * (2 * row + 4) + (attn_tp - 1) / attn_tp * row}
