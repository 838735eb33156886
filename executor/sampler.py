# SPDX-License-Identifier: Apache-2.0
"""Logits to the next token, in the order of transformers' logits processors."""

import torch

from executor.sampling_params import SamplingParams
from executor.scheduler import Sequence


def sample(logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    """The next token of each sequence from logits [B, V] float32."""
    if all(sequence.sampling.greedy and sequence.sampling.repetition_penalty == 1 for sequence in sequences):
        return logits.argmax(dim=-1).tolist()
    return [sample_one(row, sequence) for row, sequence in zip(logits, sequences, strict=True)]


def sample_one(logits: torch.Tensor, sequence: Sequence) -> int:
    """The next token of one sequence from logits [V] float32."""
    sampling = sequence.sampling
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*sequence.prompt_token_ids, *sequence.token_ids}), device=logits.device)
        logits = penalize(logits, seen, sampling.repetition_penalty)
    if sampling.greedy:
        return int(logits.argmax())
    probabilities = filter_logits(logits / sampling.temperature, sampling).softmax(dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=sequence.generator))


def penalize(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Makes the tokens `seen` less likely (Keskar et al. 2019, CTRL)."""
    scores = logits[seen]
    return logits.index_copy(0, seen, torch.where(scores < 0, scores * penalty, scores / penalty))


def filter_logits(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Logits [V] with -inf for what top_k, then top_p, then min_p drop; the most likely token always stays."""
    if 0 < sampling.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(stable=True)
        dropped = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        dropped[-1] = False
        logits = logits.masked_fill(torch.zeros_like(dropped).index_copy(0, order, dropped), -torch.inf)
    if sampling.min_p > 0:
        probabilities = logits.softmax(dim=-1)
        logits = logits.masked_fill(probabilities < sampling.min_p * probabilities.max(), -torch.inf)
    return logits
