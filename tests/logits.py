# SPDX-License-Identifier: Apache-2.0
"""Decode logits of a generation, for comparison with a reference."""

import torch

from executor.llm import LLM
from executor.sampling_params import SamplingParams


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected|; `actual` must be finite."""
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def decode_logits(llm: LLM, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Sequences (prompt and output), and for each the logits [new_tokens - 1, V] of its decode steps."""
    kept = []
    choose = llm.engine.choose
    llm.engine.choose = lambda logits, batches: kept.append(logits.whole().cpu()) or choose(logits, batches)
    try:
        outputs = llm.generate(prompts, SamplingParams(max_new_tokens=new_tokens, ignore_eos=True))
    finally:
        llm.engine.choose = choose
    assert len(kept) == new_tokens  # the first of them is from the prefill
    sequences = [prompt + output.token_ids for prompt, output in zip(prompts, outputs, strict=True)]
    return sequences, list(torch.stack(kept[1:], dim=1))
