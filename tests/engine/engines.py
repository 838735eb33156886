# SPDX-License-Identifier: Apache-2.0
"""Small models whose output depends on every cached token, and engines that are emptied between tests."""

import dataclasses
import random
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeForCausalLM

from executor import LLM
from executor.engine.block_pool import BlockPool
from executor.engine.scheduler import Scheduler
from tests.checkpoints import TINY, make_model

SMALL = {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2}


def sharp_model(folder: Path, **config: Any) -> Qwen3MoeForCausalLM:
    """Saves a random model with peaked attention."""
    model = make_model(**{**SMALL, **config})
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight *= 4
            layer.self_attn.v_proj.weight *= 4
    model.save_pretrained(folder)
    return model


def generated(model: Qwen3MoeForCausalLM, prompt: list[int], max_new_tokens: int) -> list[int]:
    """Greedy tokens by transformers."""
    token_ids = torch.tensor([prompt])
    mask = torch.ones_like(token_ids)
    output = model.generate(token_ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
    return output[0, len(prompt) :].tolist()


def random_prompt(num_tokens: int) -> list[int]:
    return random.choices(range(TINY["vocab_size"]), k=num_tokens)


def reset(
    llm: LLM,
    *,
    batch_size: int = 8,
    num_blocks: int | None = None,
    max_step_tokens: int = 8192,
    chunk_tokens: int = 2048,
    prefix_cache: bool = True,
    runs_ahead: bool = False,
) -> LLM:
    """Empties the engine and gives it other limits, up to those it was built with; the cache's memory stays as it is.

    runs_ahead: as on devices that run asynchronously.
    """
    engine = llm.engine
    engine.abort()
    engine.runs_ahead = runs_ahead
    llm.num_blocks = len(llm.kv_caches[0][0]) - 1 if num_blocks is None else num_blocks
    llm.limits = dataclasses.replace(llm.limits, num_blocks=llm.num_blocks)
    limits = (max_step_tokens, chunk_tokens, prefix_cache)
    engine.schedulers = [
        Scheduler(BlockPool(llm.num_blocks), -(-batch_size // len(engine.schedulers)), *limits)
        for _ in engine.schedulers
    ]
    return llm


def assert_all_free(llm: LLM) -> None:
    """Asserts that nothing is left of the requests, once the step in flight is read."""
    with torch.inference_mode():
        while llm.engine.has_work:
            assert llm.engine.in_flight or llm.engine.events
            llm.engine.step()
    for scheduler in llm.engine.schedulers:
        assert not scheduler.running and not scheduler.waiting
        assert not any(scheduler.pool.references)
        assert sorted(scheduler.pool.free) == list(range(1, llm.num_blocks + 1))
