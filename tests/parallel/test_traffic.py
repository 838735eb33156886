# SPDX-License-Identifier: Apache-2.0
"""Tests that traffic matches the formulas and that each rank computes only its own tokens."""

import pytest
import torch

import executor.loading.exchanges
from executor import LLM, SamplingParams
from executor.bench.traffic import expected_run_bytes
from models.layers.expert_exchange import AllToAllExchange
from tests.checkpoints import make_checkpoint
from tests.parallel.ranks import run_ranks

CONFIG = {
    "vocab_size": 208,
    "num_attention_heads": 8,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "mlp_only_layers": [1],
}
# attn_tp, moe_tp, embed_tp, lmhead_tp, sequence_parallel
LAYOUTS = [
    (4, 4, 4, 4, False),
    (4, 4, 1, 1, True),
    (1, 1, 4, 4, False),
    (2, 1, 2, 4, False),
    (2, 1, 1, 1, True),
    (1, 4, 1, 1, False),
]
EVEN = CONFIG | {"num_experts": 8, "num_experts_per_tok": 8}  # every token is routed to every expert
EVEN_LAYOUTS = [(1, 1, 1, 1, False), (2, 1, 1, 1, False), (2, 1, 1, 1, True), (1, 2, 1, 1, False), (2, 4, 1, 1, False)]
PROMPT_TOKENS = [200, 300, 40]  # the group with the least load is always the next one
NEW_TOKENS = 4


def measure(folder: str, prompts: list[list[int]], layouts: list[tuple], all_to_all: bool) -> list[dict[str, float]]:
    """Runs every layout and returns its counters. all_to_all: force this exchange whatever its traffic."""
    if all_to_all:
        executor.loading.exchanges.sent_bytes_per_token = lambda *_: {"gather": 1, "all_to_all": 0}
    results = []
    for attn_tp, moe_tp, embed_tp, lmhead_tp, sequence_parallel in layouts:
        llm = LLM(
            folder,
            device="cpu",
            dtype="float32",
            world_size=4,
            attn_tp_size=attn_tp,
            moe_tp_size=moe_tp,
            embed_tp_size=embed_tp,
            lmhead_tp_size=lmhead_tp,
            sequence_parallel=sequence_parallel,
            batch_size=len(prompts),
            cache_tokens=2048,
        )
        llm.parallel.traffic.sent_bytes.clear()
        llm.generate(prompts, SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True))
        sent = llm.parallel.traffic.sent_bytes
        results.append(
            {
                "sent": sum(count for name, count in sent.items() if name != "control"),
                "expected": expected_run_bytes(llm, [len(prompt) for prompt in prompts], NEW_TOKENS),
                "tokens": llm.runner.tokens_run,
                "dp_index": llm.parallel.attn_dp.index,
                "all_to_all": isinstance(llm.exchange(is_prefill=True), AllToAllExchange),
            }
        )
    return results


def test_counted_bytes_and_tokens_follow_the_formulas(tmp_path):
    make_checkpoint(tmp_path, **CONFIG)
    prompts = [torch.randint(0, 208, (length,)).tolist() for length in PROMPT_TOKENS]
    ranks = run_ranks(4, measure, tmp_path, str(tmp_path), prompts, LAYOUTS, False)
    used_all_to_all = False
    for results in ranks:
        for (attn_tp, *_), found in zip(LAYOUTS, results, strict=True):
            used_all_to_all |= found["all_to_all"]
            tolerance = 0.25 if found["all_to_all"] else 1e-9  # routing is not spread evenly
            assert found["sent"] == pytest.approx(found["expected"], rel=tolerance)
            own = PROMPT_TOKENS[found["dp_index"] :: 4 // attn_tp]
            assert found["tokens"] == sum(own) + len(own) * (NEW_TOKENS - 1)
    assert used_all_to_all


def test_all_to_all_sends_exactly_the_bytes_of_its_formula(tmp_path):
    make_checkpoint(tmp_path, **EVEN)
    prompts = [torch.randint(0, 208, (length,)).tolist() for length in PROMPT_TOKENS]
    for results in run_ranks(4, measure, tmp_path, str(tmp_path), prompts, EVEN_LAYOUTS, True):
        for found in results:
            assert found["all_to_all"] and found["sent"] == pytest.approx(found["expected"], rel=1e-9)
