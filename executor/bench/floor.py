# SPDX-License-Identifier: Apache-2.0
"""Bytes that a decode step reads from memory; divided by the read bandwidth they are its roofline floor."""

from types import MethodType
from typing import Any

import torch

from executor.engine.model_runner import ModelRunner
from executor.llm import LLM
from executor.sampling_params import SamplingParams
from models.layers.lm_head import ShardedLogits
from ops import GroupedRows, RouterLogits, Routing, Weight
from ops.step import BLOCK_SIZE

COUNTED_STEPS = 8


def step_bytes(llm: LLM, sequences: int, cached_tokens: int, distinct_experts: float) -> dict[str, int]:
    """Bytes that this rank reads in a decode step of `sequences` sequences with `cached_tokens` each.

    All weights count once, except the embedding (unless tied to lm_head) and experts that no token selects.
    distinct_experts: mean number of selected experts per layer.
    """
    tied = llm.config.tie_word_embeddings
    sizes = {name: value.nbytes for name, value in llm.parameters.values.items()}
    experts = sum(size for name, size in sizes.items() if is_experts(name))
    others = sum(sizes.values()) - experts - (0 if tied else sizes["embed_tokens.weight"])
    key_cache = llm.kv_caches[0][0]
    return {
        "weights": others,
        "experts": round(experts * distinct_experts / max(1, held_experts(llm))),
        "cache": sequences * cached_tokens * 2 * len(llm.kv_caches) * key_cache[0].nbytes // BLOCK_SIZE,
    }


def is_experts(name: str) -> bool:
    return ".experts." in name


def held_experts(llm: LLM) -> int:
    return llm.config.num_experts // llm.parallel.moe_ep.size


def experts_read(routing: Routing | RouterLogits | GroupedRows, held: int) -> int:
    """Number of this rank's experts with at least one token."""
    if isinstance(routing, GroupedRows):
        return int((routing.tokens_per_expert > 0).sum())
    ids = routing.chosen().local(held).topk_ids.cpu()
    return ids[ids < held].unique().numel()  # larger ids are experts of other ranks


def distinct_experts(llm: LLM, prompts: list[list[int]], steps: int = COUNTED_STEPS) -> float:
    """Mean number of this rank's experts per layer that a decode step reads, over all layers and a few steps.

    steps: maximum number of steps, limited by the cache.
    """
    counts: list[int] = []

    def counting_experts(
        hidden_states: torch.Tensor, routing: Routing | RouterLogits | GroupedRows, gate_up: Weight, down: Weight
    ) -> torch.Tensor:
        counts.append(experts_read(routing, held_experts(llm)))
        return type(llm.ops).experts(llm.ops, hidden_states, routing, gate_up, down)

    def eager_decode(runner: ModelRunner, *arguments: Any) -> ShardedLogits:  # graph replay would not call it
        llm.ops.experts = counting_experts  # type: ignore[method-assign] # overrides on this instance only, deleted below
        try:
            return ModelRunner.decode(runner, *arguments)
        finally:
            del llm.ops.experts

    llm.runner.decode = MethodType(eager_decode, llm.runner)  # type: ignore[method-assign]
    try:
        sampling = SamplingParams(max_new_tokens=1 + min(COUNTED_STEPS, steps), ignore_eos=True)
        llm.generate(prompts, sampling, use_tqdm=False)
    finally:
        del llm.runner.decode
    return sum(counts) / max(1, len(counts))
