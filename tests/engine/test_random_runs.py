# SPDX-License-Identifier: Apache-2.0
"""Requests that arrive, are cancelled, share prefixes and are preempted get the tokens that they get alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from executor import LLM
from tests.checkpoints import TINY, make_model
from tests.engine.random_runs import Scenario, alone, outcomes, random_scenario, rebuilt
from tests.parallel.ranks import run_ranks, settings_of

CONFIG = {
    "vocab_size": 212,
    "num_hidden_layers": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
}
SEEDS = range(20)
ROOM = {"cache_tokens": 40 * 128, "batch_size": 8}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Peaked attention, so that the output depends on every cached token."""
    folder = tmp_path_factory.mktemp("sharp")
    model = make_model(**CONFIG)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight *= 4
            layer.self_attn.v_proj.weight *= 4
    model.save_pretrained(folder)
    return folder


def build(folder: Path | str, **settings: Any) -> LLM:
    return LLM(folder, device="cpu", dtype="float32", **ROOM, **settings)


def check(found: dict[str, Any], expected: list[list[int]], scenario: Scenario) -> None:
    for number, case in enumerate(scenario.cases):
        tokens, reason = found["tokens"][number], found["finish_reasons"][number]
        whole = expected[number]
        assert reason == "length" or (case.cancelled is not None and reason == "cancelled")
        assert tokens == whole if reason == "length" else tokens == whole[: len(tokens)], (number, scenario)
    assert found["references"] == 0 and all(found["free"]) and found["idle"]


def test_random_runs_give_each_request_its_own_tokens(checkpoint: Path) -> None:
    llm, steps, cached, preempted = build(checkpoint), 0, 0, 0
    roomy = build(checkpoint, prefix_cache=False)
    for seed in SEEDS:
        scenario = random_scenario(seed, TINY["vocab_size"], num_requests=14)
        rebuilt(llm, scenario)
        [scheduler] = llm.engine.schedulers
        preempt = scheduler._preempt

        def counting(sequence: Any, preempt: Any = preempt) -> None:
            nonlocal preempted
            preempted += 1
            preempt(sequence)

        scheduler._preempt = counting  # type: ignore[method-assign]
        found = outcomes(llm, scenario)
        check(found, alone(roomy, scenario), scenario)
        steps += found["steps"]
        cached += found["cached"]
    assert steps > 2000 and cached > 2000 and preempted > 3, (steps, cached, preempted)  # what is tested did happen


def outcomes_of_seeds(folder: str, settings: dict[str, Any], seeds: list[int]) -> list[dict[str, Any]]:
    llm = build(folder, **settings)
    scenarios = [random_scenario(seed, TINY["vocab_size"], num_requests=10) for seed in seeds]
    return [outcomes(rebuilt(llm, scenario), scenario) for scenario in scenarios]


@pytest.mark.parametrize(
    ("world_size", "layout"), [(2, (2, 2, 1, 1)), (2, (1, 1, 1, 1)), (4, (2, 1, 2, 4))], ids=["tp", "dp", "tp and dp"]
)
def test_random_runs_on_several_ranks(
    world_size: int, layout: tuple[int, int, int, int], checkpoint: Path, tmp_path: Path
) -> None:
    seeds = [100 + world_size, 101 + world_size]
    config = {**settings_of(layout, world_size)}
    ranks = run_ranks(world_size, outcomes_of_seeds, tmp_path, str(checkpoint), config, seeds)
    roomy = build(checkpoint, prefix_cache=False)
    for number, seed in enumerate(seeds):
        scenario = random_scenario(seed, TINY["vocab_size"], num_requests=10)
        expected = alone(roomy, scenario)
        for found in ranks:
            check(found[number], expected, scenario)
