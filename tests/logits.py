# SPDX-License-Identifier: Apache-2.0
"""Decode logits of a generation, for comparison with a reference."""

from collections.abc import Sequence

import torch

from executor.engine.sampler import Sampled, SamplingRow
from executor.llm import LLM
from executor.sampling_params import SamplingParams
from models.layers.lm_head import ShardedLogits


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected|; `actual` must be finite."""
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def decode_logits(llm: LLM, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Sequences (prompt and output), and for each the logits [new_tokens - 1, V] of its decode steps."""
    kept: list[torch.Tensor] = []
    sampler = llm.engine.sampler
    sample = sampler.sample

    def keeping(logits: ShardedLogits, rows: Sequence[SamplingRow | None]) -> Sampled:
        kept.append(logits.whole().cpu())
        return sample(logits, rows)

    sampler.sample = keeping  # type: ignore[method-assign]
    try:
        outputs = llm.generate(prompts, SamplingParams(max_new_tokens=new_tokens, ignore_eos=True))
    finally:
        del sampler.sample
    assert len(kept) == new_tokens  # the first of them is from the prompts' step
    sequences = [prompt + output.token_ids for prompt, output in zip(prompts, outputs, strict=True)]
    return sequences, list(torch.stack(kept[1:], dim=1))
