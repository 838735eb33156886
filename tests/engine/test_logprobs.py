# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods of prompt and output against transformers, whatever the chunks, the ranks and the company."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from executor import LLM, SamplingParams
from executor.engine import model_runner
from executor.outputs import RequestOutput
from tests.checkpoints import TINY, make_checkpoint, reference_logits
from tests.parallel.ranks import run_ranks, settings_of

LENGTHS = [1, 2, 40, 130, 300]
SAMPLING = SamplingParams(max_new_tokens=4, logprobs=3, prompt_logprobs=2, temperature=0.7, seed=1, ignore_eos=True)
CONFIG = {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 212}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("tiny")
    return folder, make_checkpoint(folder, **CONFIG)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [random.choices(range(TINY["vocab_size"]), k=length) for length in LENGTHS]


def check(output: RequestOutput, model: Any) -> None:
    token_ids = output.prompt_token_ids + output.token_ids
    expected = reference_logits(model, token_ids).log_softmax(-1)
    assert output.prompt_logprobs is not None and output.logprobs is not None
    assert output.prompt_logprobs[0] is None
    found = [*output.prompt_logprobs[1:], *output.logprobs]
    assert len(found) == len(token_ids) - 1
    for position, one in enumerate(found):
        assert one is not None and one.token_id == token_ids[position + 1]
        assert one.logprob == pytest.approx(expected[position, one.token_id].item(), abs=1e-4)
        count = 2 if position + 1 < len(output.prompt_token_ids) else 3
        values = expected[position].topk(count).values
        torch.testing.assert_close(torch.tensor([value for _, value in one.top]), values, atol=1e-4, rtol=0)
        ids = [token_id for token_id, _ in one.top]
        torch.testing.assert_close(expected[position, ids], values, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk_tokens", [7, 2048])
def test_logprobs_equal_transformers(
    chunk_tokens: int, checkpoint: tuple[Path, Any], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_runner, "PROMPT_ROWS", 50)
    llm = LLM(checkpoint[0], device="cpu", dtype="float32", batch_size=3, chunk_tokens=chunk_tokens)
    for output in llm.generate(prompts, SAMPLING, use_tqdm=False):
        check(output, checkpoint[1])
    assert all(output.prompt_logprobs is None for output in llm.generate(prompts, SamplingParams(), use_tqdm=False))


def test_score_is_the_log_likelihood(checkpoint: tuple[Path, Any], prompts: list[list[int]]) -> None:
    llm = LLM(checkpoint[0], device="cpu", dtype="float32", max_step_tokens=64, chunk_tokens=64)
    llm.generate(prompts)  # fills the prefix cache, which scores must not take
    for token_ids in prompts:
        logits = reference_logits(checkpoint[1], token_ids)
        expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(token_ids)[1:, None])[:, 0]
        scores = llm.score(token_ids)
        assert scores.dtype is torch.float32 and scores.shape == (len(token_ids) - 1,)
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(llm.logits(token_ids), logits, atol=1e-4, rtol=0)


def outputs_of_layouts(folder: str, all_settings: list[dict], prompts: list[list[int]]) -> list[Any]:
    found = []
    for settings in all_settings:
        llm = LLM(folder, device="cpu", dtype="float32", batch_size=4, chunk_tokens=32, **settings)
        found.append((llm.generate(prompts, SAMPLING, use_tqdm=False), llm.score(prompts[3])))
    return found


def test_logprobs_on_several_ranks(checkpoint: tuple[Path, Any], prompts: list[list[int]], tmp_path: Path) -> None:
    folder, model = checkpoint
    layouts = [settings_of(layout, 2) for layout in [(2, 2, 1, 2), (1, 1, 1, 1), (1, 2, 2, 2)]]
    expected = LLM(folder, device="cpu", dtype="float32").score(prompts[3])
    for rank in run_ranks(2, outputs_of_layouts, tmp_path, str(folder), layouts, prompts):
        for outputs, scores in rank:
            for output in outputs:
                check(output, model)
            torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
