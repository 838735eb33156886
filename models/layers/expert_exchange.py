# SPDX-License-Identifier: Apache-2.0
"""Dispatch of tokens to experts on other ranks, and combine of the experts' outputs.

`dispatch` maps a rank's tokens and routing to the input rows of its local experts and a routing over these; `combine`
maps the experts' output back to the rank's tokens. Shape letters as in ops/__init__.py; EL local experts, R rows on
this rank.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from models.layers.padding import pad_rows, share_of
from ops import GroupedRows, Ops, RouterLogits, Routing, StepMetadata
from ops.comm import Group, ParallelContext
from ops.routing import NO_EXPERT
from ops.step import BLOCK_SIZE, NULL_BLOCK


@dataclass(frozen=True)
class Dispatched:
    """Input of the local experts, and the dispatch state that `combine` needs."""

    rows: torch.Tensor  # [R, D]
    routing: Routing | RouterLogits | GroupedRows  # over the EL local experts
    handle: Any = None


class ExpertExchange(Protocol):
    def begin(self, step: StepMetadata) -> None:
        """Prepares what all layers of a step share; called once in a forward pass, before the layers."""

    def dispatch(self, hidden_states: torch.Tensor, routing: Routing | RouterLogits, step: StepMetadata) -> Dispatched:
        """Sends tokens to their experts; [T, D]: all tokens of the attn_tp group, or its shard if sequence-parallel."""

    def combine(self, output: torch.Tensor, dispatched: Dispatched, step: StepMetadata) -> torch.Tensor:
        """Expert output of the dispatched rows [R, D] -> output of this rank's tokens [T, D]."""


class GatherExchange:
    """All-gathers the tokens, runs the local experts (or their shards) on all of them, and reduce-scatters the sums.

    Shapes do not depend on the routing, so that a step with this exchange can be captured in a graph. With
    attn_dp_size 1 nothing is gathered: local experts and an all_reduce.
    """

    def __init__(self, parallel: ParallelContext, num_local_experts: int):
        self.parallel = parallel
        self.num_local_experts = num_local_experts
        self.has_all = parallel.attn_dp.size == parallel.moe_ep.size == 1  # all tokens and all experts

    def begin(self, step: StepMetadata) -> None:
        pass

    def dispatch(self, hidden_states: torch.Tensor, routing: Routing | RouterLogits, step: StepMetadata) -> Dispatched:
        if self.has_all and not step.sequence_parallel:
            return Dispatched(hidden_states, routing)
        group, count = self.parallel.attn_dp, step.max_dp_tokens
        if step.sequence_parallel:
            group, count = self.parallel.world, share_of(step.max_dp_tokens, self.parallel.attn_tp.size)
        if group.size > 1:
            routing = routing.chosen()
            hidden_states = group.all_gather(pad_rows(hidden_states, count))
            weights = group.all_gather(pad_rows(routing.topk_weights, count))
            ids = group.all_gather(pad_rows(routing.topk_ids.int(), count, value=NO_EXPERT)).to(routing.topk_ids.dtype)
            routing = Routing(weights, ids)
        first = self.parallel.moe_ep.index * self.num_local_experts
        return Dispatched(hidden_states, routing.of_rank(first, self.num_local_experts))

    def combine(self, output: torch.Tensor, dispatched: Dispatched, step: StepMetadata) -> torch.Tensor:
        if step.sequence_parallel:
            own = self.parallel.world.reduce_scatter(output)
            return own[: share_of(step.num_tokens, self.parallel.attn_tp.size)]
        if self.parallel.attn_dp.size > 1:
            output = self.parallel.attn_dp.reduce_scatter(output)[: step.num_tokens]
        return self.parallel.attn_tp.all_reduce(output)


class AllToAllExchange:
    """All-to-all: sends each row only to the ranks that hold its expert, where rows are regrouped by expert.

    Rows are sent in expert order ("double routing"), so that row counts are the only metadata to exchange. The ranks of
    an attn_tp group hold the same tokens: each sends its shard of them, and the results are all-gathered. Reading the
    row counts needs a host sync.
    """

    def __init__(self, parallel: ParallelContext, num_local_experts: int, ops: Ops):
        self.parallel = parallel
        self.num_local_experts = num_local_experts
        self.ops = ops

    def begin(self, step: StepMetadata) -> None:
        pass

    def dispatch(self, hidden_states: torch.Tensor, routing: Routing | RouterLogits, step: StepMetadata) -> Dispatched:
        world, moe_tp = self.parallel.world, self.parallel.moe_tp
        routing = routing.chosen()
        hidden_states, ids, weights = own_share(
            (hidden_states, routing.topk_ids, routing.topk_weights), self.parallel.attn_tp, step
        )
        num_experts = self.num_local_experts * self.parallel.moe_ep.size
        rows, row_index, counts = self.ops.sort_by_expert(hidden_states, ids, num_experts)
        # world rank = moe_ep index * moe_tp size + moe_tp index; a row is sent to all moe_tp ranks of its expert
        sent = counts.view(-1, 1, self.num_local_experts).expand(-1, moe_tp.size, -1).flatten(0, 1)  # [ranks, EL]
        received = world.all_to_all(sent, *([[1] * world.size] * 2))
        counts = self.read_counts(sent, received)
        if moe_tp.size > 1:
            parts = rows.split(counts[0][:: moe_tp.size])
            rows = torch.cat([part for part in parts for _ in range(moe_tp.size)])
        rows, order, tokens_per_expert = self.ops.regroup(world.all_to_all(rows, *counts), received)
        return Dispatched(rows, GroupedRows(tokens_per_expert), (row_index, weights, counts, order))

    def read_counts(self, sent: torch.Tensor, received: torch.Tensor) -> tuple[list[int], list[int]]:
        """All-to-all split sizes, rows sent to and received from each rank, from counts [ranks, EL]; one host sync."""
        send, receive = torch.stack([sent.sum(1), received.sum(1)]).tolist()
        return send, receive

    def combine(self, output: torch.Tensor, dispatched: Dispatched, step: StepMetadata) -> torch.Tensor:
        row_index, weights, (send, receive), order = dispatched.handle
        back = torch.empty_like(output)
        back[order.long()] = output
        rows = self.parallel.world.all_to_all(back, receive, send)
        size = self.parallel.moe_tp.size
        if size > 1:  # the moe_tp ranks of an expert return partial sums
            parts = rows.split(send)
            rows = torch.cat([torch.stack(parts[i : i + size]).sum(0) for i in range(0, len(parts), size)])
        return gather_shares(self.ops.weighted_sum(rows, row_index, weights), self.parallel.attn_tp, step)


class FusedPair(Protocol):
    """Fused dispatch and combine operations of a backend, without host syncs."""

    name: str

    def dispatch(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, is_token: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Sends tokens: [T, D], [T, K], [T, K] -> rows [R, D] in expert order, tokens_per_expert [EL] int64, a handle.

        is_token: [N] bool, N at least the T of every rank: which rows are tokens. The others reach no expert.
        """

    def combine(self, output: torch.Tensor, handle: Any) -> torch.Tensor:
        """Expert output [R, D] and the handle of the dispatch -> sums [T, D] weighted by topk_weights."""


class FusedExchange:
    """Low-latency exchange for decode steps: dispatch and combine are fused operations of the backend.

    Each rank of an attn_tp group sends its shard of the tokens, but no padding rows of a graph: they would make other
    ranks read the weights of more experts. Without a host sync the row counts are not known on the host, so the
    recorded traffic is its expected value under uniform routing.
    """

    def __init__(self, parallel: ParallelContext, pair: FusedPair):
        self.parallel = parallel
        self.pair = pair

    def begin(self, step: StepMetadata) -> None:
        """Sets which rows of this rank's shard are tokens: not those that write to the null block, or are missing."""
        attn_tp = self.parallel.attn_tp
        (slots,) = own_share((step.slot_mapping,), attn_tp, step)
        padded = pad_rows(slots, share_of(step.max_dp_tokens, attn_tp.size), value=NULL_BLOCK * BLOCK_SIZE)
        self.is_token = padded >= (NULL_BLOCK + 1) * BLOCK_SIZE

    def dispatch(self, hidden_states: torch.Tensor, routing: Routing | RouterLogits, step: StepMetadata) -> Dispatched:
        routing = routing.chosen()
        attn_tp, world = self.parallel.attn_tp, self.parallel.world
        hidden_states, ids, weights = own_share((hidden_states, routing.topk_ids, routing.topk_weights), attn_tp, step)
        rows, tokens_per_expert, handle = self.pair.dispatch(hidden_states, ids, weights, self.is_token)
        elsewhere = ids.shape[1] * (world.size - 1) / world.size
        world.traffic.add("dispatch", 2 * hidden_states.nbytes * elsewhere)
        return Dispatched(rows, GroupedRows(tokens_per_expert), handle)

    def combine(self, output: torch.Tensor, dispatched: Dispatched, step: StepMetadata) -> torch.Tensor:
        return gather_shares(self.pair.combine(output, dispatched.handle), self.parallel.attn_tp, step)


def own_share(tensors: tuple[torch.Tensor, ...], attn_tp: Group, step: StepMetadata) -> tuple[torch.Tensor, ...]:
    """Slices this rank's shard from tensors [T, ...] replicated over its attn_tp group; last shards may be empty."""
    if attn_tp.size == 1 or step.sequence_parallel:  # already sharded
        return tensors
    share = share_of(step.num_tokens, attn_tp.size)
    mine = slice(attn_tp.index * share, (attn_tp.index + 1) * share)
    return tuple(tensor[mine] for tensor in tensors)


def gather_shares(tokens: torch.Tensor, attn_tp: Group, step: StepMetadata) -> torch.Tensor:
    """All-gathers the shards of `own_share`: [T, ...] of the whole attn_tp group."""
    if attn_tp.size == 1 or step.sequence_parallel:
        return tokens
    return attn_tp.all_gather(pad_rows(tokens, share_of(step.num_tokens, attn_tp.size)))[: step.num_tokens]


def sent_bytes_per_token(
    parallel: ParallelContext, top_k: int, hidden_size: int, element_bytes: int
) -> dict[str, float]:
    """Communication volume of each exchange: bytes that a rank sends per MoE layer and per token of its attn_tp group.

    Assumes equal token counts of all groups and uniform routing; docs/parallelism.md derives the formulas.
    """
    row = hidden_size * element_bytes
    attn_tp, attn_dp, world = parallel.attn_tp.size, parallel.attn_dp.size, parallel.world.size
    gather = (attn_dp - 1) * (2 * row + top_k * 8) + 2 * (attn_tp - 1) / attn_tp * row
    copies = top_k * parallel.moe_tp.size / attn_tp * (world - 1) / world
    return {"gather": gather, "all_to_all": copies * 2 * row + (attn_tp - 1) / attn_tp * row}
