# SPDX-License-Identifier: Apache-2.0
"""Sampling by ranks that share the vocabulary: the same tokens as one rank, and how much they exchange."""

import random
from random import Random

import pytest
import torch

from executor import SamplingParams
from executor.engine.sampler import TIED, Sampled, Sampler
from models.layers.lm_head import ShardedLogits
from tests.executor.sampling_rows import Row, ThreadGroup, ThreadRank, make_row, on_ranks, random_logits, sample


def rows_of_a_step() -> list[Row | None]:
    """Rows with all kinds of settings; they can be sampled several times."""
    ban = {"bad_words": ("x",), "mask": lambda ids: torch.arange(48) % 5 != len(ids) % 5}
    extras = [{}, {"presence_penalty": 1.0, "frequency_penalty": 0.5}, {"logit_bias": {3: 50.0, 40: 3.0}}, ban]
    extras += [{"min_tokens": 9, "stop_token_ids": (30, 31)}, {"logprobs": 5}, {"repetition_penalty": 3.0}]
    filters = [{}, {"temperature": 1.0}, {"temperature": 1.5, "top_k": 5}, {"temperature": 1.5, "top_p": 0.8}]
    rows: list[Row | None] = [
        make_row(
            random.random(), random.choices(range(48), k=9), **{"temperature": 0.0, **random.choice(filters), **extra}
        )
        for extra in extras
    ]
    for row in rows:
        row.token_ids, row.bad_word_ids = random.choices(range(48), k=3), [[7], [row.prompt_token_ids[0], 8]]
    return rows


@pytest.mark.parametrize("same_rows", [True, False])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("needs_all", [True, False])
def test_ranks_that_share_the_vocabulary_agree_with_one(needs_all, size, same_rows):
    """Each has its own rows, or all have the same; with padding rows."""
    rows = rows_of_a_step()
    if not needs_all:  # candidates are enough
        rows = [row for row in rows if row.sampling.greedy or row.sampling.top_k]
    per_rank = len(rows) + 2 if same_rows else -(-len(rows) // size)
    padded = rows + [None] * (per_rank * (1 if same_rows else size) - len(rows))
    logits = random_logits(len(padded), 48)
    starts = [0 if same_rows else per_rank * rank for rank in range(size)]
    counts = [max(0, min(per_rank, len(rows) - start)) for start in starts]

    def run(rank: ThreadRank) -> Sampled:
        local = logits.chunk(size, 1)[rank.index].clone()
        shard = ShardedLogits(local, rank, starts[rank.index], counts[rank.index], same_rows)
        return Sampler(frozenset([2, 33])).sample(shard, padded)

    expected = sample(logits, padded, frozenset([2, 33]))
    for start, count, found in zip(starts, counts, on_ranks(ThreadGroup(size), run), strict=True):
        own = slice(start, start + count)
        assert found.token_ids.tolist() == expected.token_ids[own].tolist()
        assert found.largest.tolist() == expected.largest[own].tolist()
        assert (found.logprobs is None) == (expected.logprobs is None)
        if expected.logprobs is not None:
            torch.testing.assert_close(found.logprobs, expected.logprobs[own])
            assert found.top_ids.tolist() == expected.top_ids[own].tolist()


@pytest.mark.parametrize(
    ("settings", "columns"),
    [([{}, {}], 1), ([{}, {"temperature": 1.0, "top_k": 3}], 3 + TIED), ([{"top_k": 3}, {"temperature": 1.0}], None)],
)
def test_only_candidates_are_exchanged(settings, columns):
    group = ThreadGroup(2)
    rows = [Row(SamplingParams(**sampling), random=Random(1)) for sampling in settings]
    logits = random_logits(2, 1000)

    def run(rank: ThreadRank) -> Sampled:
        shard = ShardedLogits(logits.chunk(2, 1)[rank.index].clone(), rank, 0, 2)
        return Sampler(frozenset()).sample(shard, rows)

    on_ranks(group, run)
    expected = 2 * 500 * 4 if columns is None else 2 * columns * (4 + 8)  # values, and ids of candidates
    assert group.sent_bytes == [expected, expected]
