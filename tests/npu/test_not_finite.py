# SPDX-License-Identifier: Apache-2.0
"""A prompt with non-finite logits fails without changing other prompts, on the emulated NPU backend."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from executor import LLM, SamplingParams
from tests.checkpoints import make_model
from tests.npu.emulated import emulate_communicators
from tests.npu.emulator import install
from tests.npu.wheels import VERSIONS, unzipped
from tests.parallel.ranks import run_ranks

DAMAGED = 7
SHAPE = {
    "hidden_size": 64,
    "head_dim": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
}
SPLIT = {"world_size": 2, "attn_tp_size": 1, "moe_tp_size": 1}  # requests and experts


def results_of(wheel_file: str, folder: Path, prompts: list[list[int]], settings: list[dict[str, Any]]) -> list[Any]:
    """(token_ids, error) of each prompt, alone and in a batch with the others, under each of the settings."""
    install(wheel_file, "A2")
    emulate_communicators()
    from ops.npu import NpuOps

    results = []
    for one in settings:
        with (
            patch("executor.loading.assembly.load_ops", lambda device_type: NpuOps("cpu")),
            patch("executor.engine.graph_runner.UNPADDED", 0),
        ):
            llm = LLM(folder, "cpu", "float16", batch_size=4, cache_tokens=2048, input_max_len=256, **one)
        for sampling in ({}, {"temperature": 1.0, "seed": 3}):
            params = SamplingParams(max_new_tokens=5, ignore_eos=True, **sampling)
            together = llm.generate(prompts, params)
            alone = [llm.generate([prompt], params)[0] for prompt in prompts]
            results.append([[(output.token_ids, output.error) for output in part] for part in (alone, together)])
    return results


@pytest.mark.parametrize("settings", [[{}, {"exe_mode": "graph"}], [SPLIT]], ids=["one rank", "two ranks"])
def test_the_others_get_the_tokens_they_get_alone(settings, tmp_path):
    path = unzipped(VERSIONS[0])
    if path is None:
        pytest.skip(f"torch_npu {VERSIONS[0]} is neither in the cache folder nor to be had from a package index")
    model = make_model(**SHAPE)
    with torch.no_grad():
        model.model.embed_tokens.weight[DAMAGED] = float("inf")
        model.lm_head.weight[DAMAGED] = 0
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    prompts = [torch.randint(8, 211, (length,)).tolist() for length in (5, 130, 3)]
    prompts.insert(0, [1, 2, DAMAGED, 3])
    world_size = settings[0].get("world_size", 1)
    for rank in run_ranks(world_size, results_of, tmp_path, str(path), tmp_path, prompts, settings):
        for alone, together in rank:
            assert [error is not None for _, error in alone] == [True, False, False, False]
            assert together == alone
