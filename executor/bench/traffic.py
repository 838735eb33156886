# SPDX-License-Identifier: Apache-2.0
"""Analytical communication volume per rank, derived in docs/parallelism.md, for comparison with the measured one."""

from dataclasses import dataclass

from transformers import Qwen3MoeConfig

from executor.llm import LLM
from models.layers.expert_exchange import AllToAllExchange, ExpertExchange, FusedExchange
from models.layers.padding import share_of
from models.qwen3_moe.weights import is_sparse_layer
from ops.comm import ParallelContext

CANDIDATE_BYTES = 4 + 8  # a logit and its token id


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """Tokens and logit rows of a step in every attention DP group, which determine its traffic."""

    dp_index: int
    dp_tokens: list[int]
    dp_rows: list[int]
    sequence_parallel: bool = False

    @property
    def tokens(self) -> int:
        return self.dp_tokens[self.dp_index]

    @property
    def max_tokens(self) -> int:
        return max(self.dp_tokens)

    def exchanged(self, rank: int, attn_tp_size: int) -> int:
        """Tokens that a rank contributes to an all_to_all: its share of its attention DP group's."""
        tokens = self.dp_tokens[rank // attn_tp_size]
        share = share_of(tokens, attn_tp_size)
        if self.sequence_parallel:
            return share
        return max(0, min(share, tokens - rank % attn_tp_size * share))


def expected_sent_bytes(
    config: Qwen3MoeConfig, parallel: ParallelContext, exchange: ExpertExchange, element_bytes: int, step: StepSize
) -> float:
    """Bytes this rank sends in one step. Exact, except for all_to_all: its mean under uniform routing."""
    row = config.hidden_size * element_bytes
    reduced = 2 * (parallel.attn_tp.size - 1) / parallel.attn_tp.size * step.tokens * row
    if step.sequence_parallel:
        share = share_of(step.tokens, parallel.attn_tp.size)
        reduced = 2 * (parallel.attn_tp.size - 1) * share * row
    experts = expert_bytes(config, parallel, exchange, row, step)
    sparse = sum(is_sparse_layer(config, layer_id) for layer_id in range(config.num_hidden_layers))
    dense = config.num_hidden_layers - sparse
    layers = config.num_hidden_layers * reduced + dense * reduced + sparse * experts
    last = (parallel.attn_tp.size - 1) * share * (row + config.hidden_size * 4) if step.sequence_parallel else 0
    return layers + last + embedding_bytes(parallel, row, step) + lm_head_bytes(config, parallel, row, step)


def expert_bytes(
    config: Qwen3MoeConfig, parallel: ParallelContext, exchange: ExpertExchange, row: int, step: StepSize
) -> float:
    """Bytes of one layer's dispatch and combine."""
    attn_tp, world = parallel.attn_tp.size, parallel.world.size
    share = share_of(step.tokens, attn_tp)
    gathered = 0 if step.sequence_parallel else (attn_tp - 1) * share * row
    brought = [step.exchanged(rank, attn_tp) for rank in range(world)]
    mine = brought[parallel.world.index]
    if isinstance(exchange, FusedExchange):
        return 2 * mine * config.num_experts_per_tok * (world - 1) / world * row + gathered
    if isinstance(exchange, AllToAllExchange):
        copies = config.num_experts_per_tok * parallel.moe_tp.size
        there = mine * copies * (world - 1) / world * row
        back = (sum(brought) - mine) * copies / world * row
        counts = (world - 1) * config.num_experts // parallel.moe_ep.size * 8
        return there + back + counts + gathered
    routing = config.num_experts_per_tok * 8
    if step.sequence_parallel:
        return (world - 1) * share_of(step.max_tokens, attn_tp) * (2 * row + routing)
    gathered = (parallel.attn_dp.size - 1) * step.max_tokens * (2 * row + routing)
    return gathered + 2 * (attn_tp - 1) / attn_tp * step.tokens * row


def embedding_bytes(parallel: ParallelContext, row: int, step: StepSize) -> float:
    size = parallel.embed_tp.size
    if parallel.holds_same_tokens(parallel.embed_tp):
        return 2 * (size - 1) / size * step.tokens * row
    return (size - 1) * step.max_tokens * (8 + row)


def lm_head_bytes(config: Qwen3MoeConfig, parallel: ParallelContext, row: int, step: StepSize) -> float:
    """Bytes of the lm_head in greedy decoding: one candidate per row."""
    size = parallel.lmhead_tp.size
    if parallel.holds_same_tokens(parallel.lmhead_tp):
        return (size - 1) * step.dp_rows[step.dp_index] * CANDIDATE_BYTES
    residual = config.hidden_size * 4
    return (size - 1) * max(step.dp_rows) * (row + residual + size * CANDIDATE_BYTES)


def expected_run_bytes(llm: LLM, prompt_tokens: list[int], new_tokens: int) -> float:
    """Bytes this rank sends to generate `new_tokens` greedy tokens for each of one batch of prompts."""
    index, dp_size = llm.parallel.attn_dp.index, llm.parallel.attn_dp.size
    groups = [prompt_tokens[group::dp_size] for group in range(dp_size)]
    tokens, rows = [sum(group) for group in groups], [len(group) for group in groups]
    sharded = llm.runner.sequence_parallel
    prefill = StepSize(dp_index=index, dp_tokens=tokens, dp_rows=rows, sequence_parallel=sharded)
    decode = StepSize(dp_index=index, dp_tokens=rows, dp_rows=rows)
    return sum(
        count * expected_sent_bytes(llm.config, llm.parallel, llm.exchange(is_prefill), llm.dtype.itemsize, step)
        for count, step, is_prefill in ((1, prefill, True), (new_tokens - 1, decode, False))
    )
