# SPDX-License-Identifier: Apache-2.0
"""Logits to the next token, in the order of transformers' logits processors."""

import torch

from executor.engine.scheduler import Sequence
from executor.sampling_params import SamplingParams
from models.layers.lm_head import ShardedLogits


def sample(logits: ShardedLogits, rows: list[Sequence | None]) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of this rank's rows, [B] int64, and the largest logit of each, [B] float32, on their device.

    NaN counts as the largest logit: it is finite where all logits are, or are -inf beside one that is. Where it is not,
    the token is some token of the vocabulary, so that the next step may be started before the host knows.

    `rows` says whose logits stand in `logits.local`; None is padding.
    All ranks that share the vocabulary see the same `rows`, so they agree on what to exchange: a few candidates where
    every text is greedy or has a top_k, all logits otherwise.
    """
    penalize_rows(logits, rows)
    sampled = [row.sampling for row in rows if row is not None and not row.sampling.greedy]
    if not sampled:
        values, ids = logits.topk(1)
        return ids[:, 0], values[:, 0]
    if all(sampling.top_k for sampling in sampled):
        values, ids = logits.topk(max(sampling.top_k for sampling in sampled))
        largest = values[:, 0]
    else:
        values = logits.whole()
        ids = torch.arange(values.shape[1], device=values.device).expand_as(values)
        largest = values.amax(-1)
    values = values.masked_fill(~largest.isfinite()[:, None], 0)  # drawing from NaN would end the other rows, too
    own = [row for row in rows[logits.first_row : logits.first_row + logits.num_rows] if row is not None]
    choices = [choose(candidates, sequence) for candidates, sequence in zip(values, own, strict=True)]
    return ids.gather(1, torch.stack(choices))[:, 0] if choices else ids.new_empty(0), largest


def choose(candidates: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """Index [1] of the next token among a sequence's candidate logits [N] float32."""
    if sequence.sampling.greedy:
        return candidates.argmax(keepdim=True)
    largest = torch.finfo(candidates.dtype).max
    scaled = (candidates / sequence.sampling.temperature).clamp(-largest, largest)  # of infinities softmax makes NaN
    probabilities = filter_logits(scaled, sequence.sampling).softmax(dim=-1)
    return torch.multinomial(probabilities, 1, generator=sequence.generator)


def penalize_rows(logits: ShardedLogits, rows: list[Sequence | None]) -> None:
    """Applies each row's repetition penalty to the part of its logits that is here."""
    part_size = logits.local.shape[1]
    first_id = logits.group.index * part_size
    for row, sequence in enumerate(rows):
        if sequence is not None and sequence.sampling.repetition_penalty != 1:
            seen = {*sequence.prompt_token_ids, *sequence.token_ids}
            local = sorted(token_id - first_id for token_id in seen if 0 <= token_id - first_id < part_size)
            seen_here = torch.tensor(local, dtype=torch.int64, device=logits.local.device)
            logits.local[row] = penalize(logits.local[row], seen_here, sequence.sampling.repetition_penalty)


def penalize(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Makes the tokens `seen` less likely (Keskar et al. 2019, CTRL)."""
    scores = logits[seen]
    return logits.index_copy(0, seen, torch.where(scores < 0, scores * penalty, scores / penalty))


def filter_logits(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Logits [N] with -inf for what top_k, then top_p, then min_p drop; the most likely token always stays."""
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


def make_generator(sampling: SamplingParams, device: torch.device) -> torch.Generator | None:
    """Every request has its own random numbers, so that its text does not depend on its neighbours."""
    if sampling.greedy:
        return None
    generator = torch.Generator(device)
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator
