# SPDX-License-Identifier: Apache-2.0
"""Compares every layout with a single process, over Gloo, and its traffic with the formula."""

from typing import Any

import pytest
import torch

from executor import LLM, SamplingParams
from models.layers.lm_head import ShardedLogits
from tests.checkpoints import make_checkpoint
from tests.parallel.ranks import run_ranks, settings_of

# attn_tp, moe_tp, embed_tp, lmhead_tp
LAYOUTS = {
    2: [(2, 2, 2, 2), (2, 1, 1, 1), (1, 1, 2, 2), (1, 2, 1, 1)],
    4: [(4, 4, 4, 4), (4, 1, 2, 1), (2, 2, 4, 2), (2, 1, 2, 4), (1, 1, 1, 1), (1, 4, 4, 4), (1, 2, 2, 4), (2, 4, 1, 1)],
    8: [(2, 4, 2, 8)],
}
# fewer kv heads than most tp sizes, experts that get no token in short prompts, a dense layer, biases
CONFIG = {
    "vocab_size": 208,
    "num_attention_heads": 8,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [1],
    "attention_bias": True,
}
PROMPT_LENGTHS = [5, 1, 130, 17, 3]
SAMPLED = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 3, "repetition_penalty": 1.2}


def results_of(folder: str, token_ids: list[int], prompts: list[list[int]], settings: dict[str, Any]) -> dict[str, Any]:
    """Returns logits of one sequence, greedy and sampled tokens of several.

    With batch size 1 in whole prompts, with 3 in chunks beside tokens that are decoded; the second time with prefixes.
    """
    results = {}
    for batch_size in (1, 3):
        chunks = {"max_step_tokens": 60, "chunk_tokens": 37} if batch_size == 3 else {}
        llm = LLM(folder, device="cpu", dtype="float32", batch_size=batch_size, cache_tokens=2048, **chunks, **settings)
        llm.engine.runs_ahead = batch_size == 3
        for name, sampling in (("greedy", {}), ("sampled", SAMPLED)):
            outputs = llm.generate(prompts, SamplingParams(max_new_tokens=6, ignore_eos=True, **sampling))
            results[name, batch_size] = [output.token_ids for output in outputs]
    results["logits"] = llm.logits(token_ids)
    head = llm.parallel.lmhead_tp
    equal_logits = ShardedLogits(torch.zeros(1, CONFIG["vocab_size"] // head.size), head, 0, 1)
    results["lowest of equal"] = equal_logits.topk(1)[1].tolist()
    return results


def results_of_layouts(folder: str, token_ids: list[int], prompts: list[list[int]], all_settings: list) -> list:
    return [results_of(folder, token_ids, prompts, settings) for settings in all_settings]


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_layouts_equal_one_process(world_size, tmp_path):
    make_checkpoint(tmp_path, **CONFIG)
    token_ids = torch.randint(0, 208, (150,)).tolist()
    prompts = [torch.randint(0, 208, (length,)).tolist() for length in PROMPT_LENGTHS]
    expected = results_of(str(tmp_path), token_ids, prompts, {})
    assert all(expected[name, 1] == expected[name, 3] for name in ("greedy", "sampled"))
    all_settings = [settings_of(layout, world_size) for layout in LAYOUTS[world_size]]
    for settings in all_settings[::2]:
        settings["sequence_parallel"] = True
    ranks = run_ranks(world_size, results_of_layouts, tmp_path, str(tmp_path), token_ids, prompts, all_settings)
    for rank, results in enumerate(ranks):
        for layout, found in zip(LAYOUTS[world_size], results, strict=True):
            torch.testing.assert_close(
                found.pop("logits"), expected["logits"], atol=1e-4, rtol=0, msg=f"rank {rank} of layout {layout}"
            )
            assert found == {key: expected[key] for key in found}, f"rank {rank} of layout {layout}"
