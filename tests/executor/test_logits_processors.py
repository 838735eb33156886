# SPDX-License-Identifier: Apache-2.0
"""Bias, penalties, bad words, minimum length and masks: what they make of logits."""

import random
import re
from collections.abc import Sequence

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from executor import SamplingParams
from executor.engine.logits_processors import LogitsProcessors, Penalties, needs_host_tokens
from executor.engine.sampler import Sampler
from tests.executor.sampling_rows import Row, sample, single

VOCAB = 40
END = frozenset([3, 17])


def random_ids(count: int) -> list[int]:
    return random.choices(range(VOCAB), k=count)


def processed(rows: list[Row | None], logits: torch.Tensor) -> torch.Tensor:
    found = single(logits)
    LogitsProcessors(rows, found, END).apply(found.local)
    return found.local


def reference(row: Row, logits: torch.Tensor) -> torch.Tensor:
    """Logits [V] by transformers' processors and the formulas of OpenAI's and vLLM's documentation."""
    sampling, logits = row.sampling, logits[None].clone()
    input_ids = torch.tensor([row.prompt_token_ids + row.token_ids])
    first = LogitsProcessorList()
    if sampling.logit_bias:
        first.append(SequenceBiasLogitsProcessor({(token_id,): bias for token_id, bias in sampling.logit_bias.items()}))
    first.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    logits = first(input_ids, logits)
    for token_id in range(VOCAB):
        count = row.token_ids.count(token_id)
        logits[0, token_id] -= sampling.frequency_penalty * count + sampling.presence_penalty * (count > 0)
    if row.bad_word_ids:
        logits = NoBadWordsLogitsProcessor(row.bad_word_ids)(input_ids, logits)
    for token_id in (*END, *sampling.stop_token_ids):
        minimum = MinNewTokensLengthLogitsProcessor(len(row.prompt_token_ids), sampling.min_tokens, token_id, "cpu")
        logits = minimum(input_ids, logits)
    return logits[0]


def random_row() -> Row:
    prompt, token_ids = random_ids(random.randint(4, 12)), random_ids(random.randint(0, 9))
    tail = (prompt + token_ids)[-3:]
    words = [[5], tail + [6], tail[-1:] + [7], random_ids(2), [8] * 30, random_ids(1) + tail]
    sampling = {
        "repetition_penalty": random.choice((1.0, 1.6, 0.7)),
        "presence_penalty": random.choice((0.0, 1.3, -0.4)),
        "frequency_penalty": random.choice((0.0, 0.6, -2.0)),
        "logit_bias": random.choice((None, {9: 100.0, 10: -100.0, prompt[0]: 1.5, 17: 3.0})),
        "min_tokens": random.choice((0, len(token_ids), len(token_ids) + 1)),
        "stop_token_ids": random.choice(((), (20, 39))),
    }
    return Row(SamplingParams(**sampling), prompt, token_ids, random.choice(([], words)))


def test_logits_equal_the_reference():
    for _ in range(10):
        rows: list[Row | None] = [random_row() if random.random() < 0.9 else None for _ in range(8)]
        logits = torch.randn(len(rows), VOCAB) * 3
        expected = [before if row is None else reference(row, before) for row, before in zip(rows, logits, strict=True)]
        torch.testing.assert_close(processed(rows, logits), torch.stack(expected))


def test_counts_follow_the_tokens_of_changing_rows():
    """Over many steps in which rows come, go, change places, and get none, one or several tokens."""
    sampler = Sampler(END)
    pool = [random_row() for _ in range(7)]
    for row in pool:  # every kind of penalty, nothing that depends on the length
        penalties = {"repetition_penalty": 1.5, "presence_penalty": 0.7, "frequency_penalty": 0.3}
        row.sampling, row.bad_word_ids = SamplingParams(**penalties), []
    plain = Row(SamplingParams(), [1])
    for step in range(40):
        if step % 4 == 0:
            rows = random.sample(pool, k=random.randint(1, 6)) + random.choice(([], [plain], [None]))
            random.shuffle(rows)
        logits = torch.randn(len(rows), VOCAB) * 3
        found = single(logits)
        sampler.sample(found, rows)
        expected = [
            before if row in (None, plain) else reference(row, before) for row, before in zip(rows, logits, strict=True)
        ]
        torch.testing.assert_close(found.local, torch.stack(expected))
        for row in pool:
            row.token_ids += random_ids(random.choice((0, 1, 1, 1, 3)))


def test_counts_of_rows_that_stay_are_kept(monkeypatch):
    counted = []
    positions = Penalties.count_new_tokens

    def record(penalties: Penalties) -> None:
        before = list(penalties.num_counted)
        positions(penalties)
        counted.append(sum(penalties.num_counted) - sum(before))

    monkeypatch.setattr(Penalties, "count_new_tokens", record)
    sampler = Sampler(END)
    rows = [Row(SamplingParams(presence_penalty=1.0), [1], random_ids(20)) for _ in range(3)]
    for step_rows in (rows[:2], rows[:2], rows[::-1], rows[1:]):
        sampler.sample(single(torch.randn(len(step_rows), VOCAB)), step_rows)
        for row in rows:
            row.token_ids.append(4)
    assert counted == [40, 2, 2 + 22, 2]


def test_unread_tokens_count_for_the_minimum():
    row = Row(SamplingParams(min_tokens=4), [1], [5, 6], num_unread=2)
    logits = torch.randn(1, VOCAB)
    assert processed([row], logits).equal(logits)
    row.num_unread = 1
    assert processed([row], logits)[0, [*END]].eq(-torch.inf).all()


def test_minimum_and_bad_words_over_steps():
    """What is forbidden changes from step to step, with the same rows."""
    sampler = Sampler(END)
    rows = [Row(SamplingParams(min_tokens=2), [1]), Row(SamplingParams(), [1], bad_word_ids=[[4, 5, 6], [7]])]
    for token_ids, forbidden in zip([4, 5, 4, 5, 9], [{7}, {7}, {7, 6}, {7}, {7, 6}], strict=True):
        found = single(torch.zeros(2, VOCAB))
        sampler.sample(found, rows)
        banned = [set(row.isneginf().nonzero()[:, 0].tolist()) for row in found.local]
        assert banned == [set(END) if len(rows[0].token_ids) < 2 else set(), forbidden]
        for row in rows:
            row.token_ids.append(token_ids)


# Masks


def test_mask_sees_the_tokens_and_limits_the_choice():
    seen = []

    def mask(token_ids: list[int]) -> torch.Tensor | None:
        seen.append(list(token_ids))
        return None if len(token_ids) == 1 else torch.arange(VOCAB) == 10 + len(token_ids)

    row, free = Row(SamplingParams(mask=mask), [1]), Row(SamplingParams(mask=lambda ids: None), [1])
    sampler, logits = Sampler(END), torch.randn(3, VOCAB)
    for expected in (10, int(logits[1].argmax()), 12):
        token_ids = sampler.sample(single(logits), [free, row, None]).token_ids.tolist()
        assert token_ids == [logits[0].argmax(), expected, logits[2].argmax()]
        row.token_ids.append(token_ids[1])
    assert seen == [row.token_ids[:count] for count in range(3)]


def failing(token_ids: Sequence[int]) -> torch.Tensor:
    raise KeyError


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (lambda ids: torch.ones(VOCAB), "expected a bool tensor of 40 values or None .*, got torch.float32 \\[40\\]"),
        (lambda ids: torch.ones(VOCAB - 1) > 0, "expected a bool tensor .*, got torch.bool \\[39\\]"),
        (lambda ids: torch.ones(1, VOCAB) > 0, "expected a bool tensor .*, got torch.bool \\[1, 40\\]"),
        (lambda ids: [True] * VOCAB, "expected a bool tensor .*, got a list"),
        (lambda ids: torch.zeros(VOCAB) > 0, "it allows no token"),
        (failing, "KeyError"),
    ],
)
def test_failing_mask_ends_its_row_only(mask, error):
    logits = torch.randn(3, VOCAB)
    rows = [Row(SamplingParams(mask=chosen), [1]) for chosen in (lambda ids: None, mask, None)]
    sampled = sample(logits, rows)
    assert re.fullmatch(f"mask: {error}", rows[1].mask_error) and sampled.largest[1] == -torch.inf
    assert rows[0].mask_error is rows[2].mask_error is None
    assert sampled.token_ids[[0, 2]].tolist() == logits[[0, 2]].argmax(-1).tolist()
    assert sampled.largest[[0, 2]].tolist() == logits[[0, 2]].amax(-1).tolist()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, False),
        ({"temperature": 1.0, "logit_bias": {1: 2.0}, "min_tokens": 3, "stop_token_ids": (1,), "logprobs": 3}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": 0.1}, True),
        ({"frequency_penalty": -0.1}, True),
        ({"bad_words": ("a",)}, True),
        ({"mask": lambda ids: None}, True),
    ],
)
def test_what_needs_tokens_on_the_host(settings, expected):
    assert needs_host_tokens(SamplingParams(**settings)) is expected
