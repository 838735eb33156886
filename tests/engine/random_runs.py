# SPDX-License-Identifier: Apache-2.0
"""Random runs of the engine: requests arrive, are cancelled, share prefixes and are preempted."""

import random
from dataclasses import dataclass
from typing import Any

import torch

from executor import LLM, SamplingParams
from executor.engine.request import Request


@dataclass(frozen=True)
class Case:
    """A request, the step at which it arrives, and the step at which it is cancelled, if any."""

    prompt: list[int]
    sampling: SamplingParams
    arrives: int
    cancelled: int | None


@dataclass(frozen=True)
class Scenario:
    """Settings of the engine and the requests of a run, all from one seed."""

    settings: dict[str, Any]
    runs_ahead: bool
    cases: list[Case]


def random_scenario(seed: int, vocab_size: int, num_requests: int) -> Scenario:
    rng = random.Random(seed)
    chunk = rng.choice([1, 7, 60, 128, 200, 2048])
    max_len, is_crowded = 600, rng.random() < 0.4  # crowded: outputs that do not fit side by side
    settings = {
        "batch_size": 8 if is_crowded else rng.choice([1, 2, 3, 5]),
        "cache_tokens": 128 * (7 if is_crowded else rng.choice([5, 6, 8, 40])),
        "max_step_tokens": max(chunk, rng.choice([9, 100, 300, 8192])),
        "chunk_tokens": chunk,
        "prefix_cache": rng.random() < 0.8,
    }
    prefixes = [[rng.randrange(vocab_size) for _ in range(rng.choice([100, 128, 256, 300]))] for _ in range(2)]
    cases, step = [], 0
    for _ in range(num_requests):
        shared = [] if is_crowded else rng.choice([[], *prefixes])
        length = rng.randint(100, 128) if is_crowded else rng.choice([1, 2, 5, 60, 127, 128, 129])
        own = [rng.randrange(vocab_size) for _ in range(length)]
        prompt = shared[: rng.choice([len(shared), 128, 200])] + own
        most = max_len - len(prompt)
        new_tokens = rng.randint(10, 60) if is_crowded else rng.randint(1, rng.choice([1, 5, 40]))
        cases.append(Case(prompt, random_sampling(rng, min(most, new_tokens)), step, None))
        if rng.random() < 0.25:
            cases[-1] = Case(prompt, cases[-1].sampling, step, step + rng.choice([0, 1, 3, 10]))
        step += rng.choice([0, 0, 0, 1, 2, 10])
    return Scenario(settings, rng.random() < 0.5, cases)


def random_sampling(rng: random.Random, max_new_tokens: int) -> SamplingParams:
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if rng.random() < 0.5:
        settings |= {"temperature": 0.8, "seed": rng.randrange(1000), "top_k": rng.choice([0, 20])}
        settings |= {"top_p": rng.choice([1.0, 0.9])}
    if rng.random() < 0.2:
        settings["repetition_penalty"] = 1.3
    if rng.random() < 0.1:
        settings["frequency_penalty"] = 0.5
    return SamplingParams(ignore_eos=True, **settings)


@torch.inference_mode()
def run(llm: LLM, scenario: Scenario) -> tuple[list[Request], int]:
    """Runs a scenario; returns its requests and the number of steps."""
    engine = llm.engine
    engine.runs_ahead = scenario.runs_ahead
    requests = [
        llm.request("", case.prompt, case.sampling, index, request_id=str(index))
        for index, case in enumerate(scenario.cases)
    ]
    step = 0
    while engine.has_work or any(case.arrives >= step for case in scenario.cases):
        for request, case in zip(requests, scenario.cases, strict=True):
            if case.arrives == step:
                engine.add(request.samples)
            if case.cancelled == step:
                engine.cancel(request.request_id)
        engine.step()
        step += 1
    return requests, step


def outcomes(llm: LLM, scenario: Scenario) -> dict[str, Any]:
    """Tokens and finish reasons of a run, and what must be nothing afterwards: references, running sequences."""
    requests, steps = run(llm, scenario)
    pools = [scheduler.pool for scheduler in llm.engine.schedulers]
    samples = [request.samples[0] for request in requests]
    return {
        "tokens": [list(sample.token_ids) for sample in samples],
        "finish_reasons": [sample.finish_reason for sample in samples],
        "steps": steps,
        "cached": sum(sample.num_cached for sample in samples),
        "references": sum(sum(pool.references) for pool in pools),
        "free": [len(pool.free) == pool.num_blocks for pool in pools],
        "idle": not any(scheduler.running or scheduler.waiting for scheduler in llm.engine.schedulers),
    }


def rebuilt(llm: LLM, scenario: Scenario) -> LLM:
    """The same model with a scenario's engine settings: schedulers and pools anew, weights kept."""
    from executor.engine.block_pool import BlockPool
    from executor.engine.scheduler import Scheduler

    settings, groups = scenario.settings, len(llm.engine.schedulers)
    num_blocks = min(llm.num_blocks, settings["cache_tokens"] // 128)
    llm.engine.schedulers = [
        Scheduler(
            BlockPool(num_blocks),
            -(-settings["batch_size"] // groups),
            settings["max_step_tokens"],
            settings["chunk_tokens"],
            settings["prefix_cache"],
        )
        for _ in range(groups)
    ]
    return llm


def alone(llm: LLM, scenario: Scenario) -> list[list[int]]:
    """Tokens of every request run alone."""
    return [llm.generate(case.prompt, case.sampling)[0].token_ids for case in scenario.cases]
