# SPDX-License-Identifier: Apache-2.0
"""Sampling: the same distribution as transformers', reproducible draws, log-likelihoods, little work per step."""

import math
import random
from random import Random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from executor import SamplingParams
from executor.engine.sampler import Sampled, Sampler, make_random, token_logprobs
from tests.checkpoints import make_model, reference_logits
from tests.executor.sampling_rows import DRAWS, Row, distribution, make_row, random_logits, sample, single

VOCAB = 50
FILTERS = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 500},
    {"top_p": 1e-9},
    {"top_p": 0.01},
    {"top_p": 0.7},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"min_p": 0.9},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
    {"temperature": 1.9, "top_k": 9, "top_p": 0.6, "min_p": 0.3, "repetition_penalty": 1.05},
]


def random_ids(count: int) -> list[int]:
    return random.choices(range(VOCAB), k=count)


def processors(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0
) -> LogitsProcessorList:
    """transformers' logits processors for these settings."""
    chosen = [RepetitionPenaltyLogitsProcessor(repetition_penalty), TemperatureLogitsWarper(temperature)]
    chosen += [TopKLogitsWarper(top_k)] if top_k else []
    return LogitsProcessorList([*chosen, TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)])


def assert_same(drawn: torch.Tensor, expected: torch.Tensor) -> None:
    """Frequencies of draws with evenly spaced random numbers are exact to one of DRAWS."""
    torch.testing.assert_close(drawn, expected, atol=1.01 / DRAWS, rtol=0)
    assert not drawn[expected == 0].any()


@pytest.mark.parametrize("filters", FILTERS)
def test_probabilities_equal_transformers(filters):
    for scale in (0.5, 3.0, 20.0):
        logits = random_logits(VOCAB) * scale
        prompt, token_ids = random_ids(8), random_ids(4)
        expected = processors(**filters)(torch.tensor([prompt + token_ids]), logits[None])[0].softmax(dim=-1)
        row = Row(SamplingParams(**{"temperature": 1.0, **filters}), prompt, token_ids)
        assert_same(distribution(logits, row), expected)


@pytest.mark.parametrize("beside", [{}, {"temperature": 1.0, "top_k": 30}, {"temperature": 1.0}])
def test_ties_at_the_last_of_top_k_are_kept(beside):
    """As transformers does, whatever the other rows need; logits of bfloat16 tie often."""
    for top_k in (1, 3, 8):
        logits = (random_logits(VOCAB) * 2).round() / 2
        expected = processors(top_k=top_k)(torch.tensor([[1]]), logits[None])[0].softmax(dim=-1)
        other = Row(SamplingParams(**beside), random=Random())
        assert_same(distribution(logits, make_row(top_k=top_k), [other]), expected)


def test_order_of_the_filters_is_that_of_generate():
    model = make_model()
    prompt = random.choices(range(211), k=9)
    logits = reference_logits(model, prompt)[-1]
    filters, banned, end = FILTERS[-1], [prompt[-2:] + [int(logits.argmax())], [5]], int(logits.topk(2).indices[1])
    bias = {token_id: random.uniform(-2, 2) for token_id in prompt}
    row = Row(SamplingParams(**filters, logit_bias=bias, min_tokens=1), prompt, [], [*banned, prompt[-1:] + [end]])
    theirs = {"max_new_tokens": 1, "do_sample": True, "output_scores": True, "return_dict_in_generate": True}
    theirs |= {"min_new_tokens": 1, "eos_token_id": end, "pad_token_id": 0, "bad_words_ids": row.bad_word_ids}
    theirs |= {"sequence_bias": {(token_id,): value for token_id, value in bias.items()}}
    run = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 9).long(), **theirs, **filters)
    expected = run.scores[0][0].softmax(dim=-1)
    assert_same(distribution(logits, row, end_token_ids=frozenset([end])), expected)


def test_rows_do_not_depend_on_each_other():
    """All settings in one step draw the tokens that each draws alone."""
    settings = [*FILTERS, {"temperature": 0.0}, {"temperature": 0.0, "repetition_penalty": 1.4}] * 4
    random.shuffle(settings)
    logits = random_logits(len(settings), VOCAB) * 4
    rows = [make_row(random.random(), random_ids(9), **sampling) for sampling in settings]
    alone = [sample(logits[i : i + 1], [row]).token_ids.item() for i, row in enumerate(rows)]
    assert sample(logits, rows).token_ids.tolist() == alone
    some = [i for i, row in enumerate(rows) if row.sampling.greedy or row.sampling.top_k]
    assert sample(logits[some], [rows[i] for i in some]).token_ids.tolist() == [alone[i] for i in some]


@pytest.mark.parametrize("penalty", [1.0, 1.8])
def test_greedy(penalty):
    logits = random_logits(6, VOCAB)
    histories = [random_ids(10) for _ in logits]
    # No filter drops the most likely token.
    filters = {"temperature": 0.0, "top_k": 3, "top_p": 0.5, "min_p": 0.5, "repetition_penalty": penalty}
    rows = [Row(SamplingParams(**filters), history[:6], history[6:]) for history in histories]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(histories), logits.clone()).argmax(dim=-1)
    assert sample(logits, rows).token_ids.tolist() == expected.tolist()


@pytest.mark.parametrize("beside", [{}, {"temperature": 1.0, "top_k": 4}, {"temperature": 1.0}])
def test_greedy_ties_go_to_the_lower_id(beside):
    for _ in range(20):
        ties = sorted(random.sample(range(VOCAB), k=5))
        logits = random_logits(2, VOCAB).clamp(max=1)
        logits[0, ties] = 2.0
        rows = [make_row(temperature=0), Row(SamplingParams(**beside), random=Random())]
        assert sample(logits, rows).token_ids[0] == ties[0]


def test_greedy_and_sampled_requests_share_a_step():
    logits = random_logits(5, VOCAB)
    settings = [{"temperature": 0.0}, {}, {"temperature": 1e-4}, {"temperature": 5.0, "top_k": 1}]
    token_ids = sample(logits, [None, *(make_row(**sampling) for sampling in settings)]).token_ids.tolist()
    best = logits.argmax(dim=-1).tolist()
    assert [token_ids[i] for i in (1, 3, 4)] == [best[i] for i in (1, 3, 4)]


NAN, INF = math.nan, math.inf
ROWS = [  # special values in the logits, whether the row can still be sampled
    ((NAN,), False),
    ((INF,), False),
    ((NAN, INF, -INF), False),
    ((-INF,) * VOCAB, False),
    ((-INF,), True),
    ((-INF,) * (VOCAB - 1), True),
    ((3e38, -3e38), True),
    ((), True),
]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.01}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9}])
@pytest.mark.parametrize("penalty", [{}, {"repetition_penalty": 1.5}, {"presence_penalty": 0.1}])
def test_non_finite_rows(penalty, sampling):
    """They are reported with a valid token; other rows are unaffected."""
    logits = random_logits(len(ROWS), VOCAB)
    for row, (values, _) in zip(logits, ROWS, strict=True):
        row[torch.randperm(VOCAB)[: len(values)]] = torch.tensor(values)

    def run(chosen: list[int]) -> Sampled:
        rows = [make_row(0.1 * i, [1, 2], **{"temperature": 0.0, **penalty, **sampling}) for i in chosen]
        return sample(logits[chosen], rows)

    sampled = run([*range(len(ROWS))])
    assert [math.isfinite(value) for value in sampled.largest.tolist()] == [finite for _, finite in ROWS]
    assert ((sampled.token_ids >= 0) & (sampled.token_ids < VOCAB)).all()
    sound = [i for i, (_, finite) in enumerate(ROWS) if finite]
    assert sampled.token_ids[sound].tolist() == run(sound).token_ids.tolist()
    assert all(logits[i, sampled.token_ids[i]] > -INF for i in sound)
    assert sampled.largest[sound].tolist() == logits[sound].amax(-1).tolist()


@pytest.mark.parametrize("value", [NAN, INF])
def test_non_finite_logits_of_forbidden_tokens_are_reported(value):
    logits = random_logits(2, VOCAB)
    logits[0, 3] = value
    rows = [Row(SamplingParams(min_tokens=2)), Row(SamplingParams())]
    assert sample(logits, rows, frozenset([3])).largest.isfinite().tolist() == [False, True]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}])
def test_a_row_without_an_allowed_token_is_reported(sampling):
    logits = random_logits(2, VOCAB)
    rows = [Row(SamplingParams(mask=mask, **sampling), random=Random()) for mask in (lambda ids: NONE, None)]
    sampled = sample(logits, rows)
    assert sampled.largest[0] == -INF and sampled.largest[1] == logits[1].max()
    assert 0 <= sampled.token_ids[0] < VOCAB


NONE = torch.zeros(VOCAB, dtype=torch.bool)


@pytest.mark.parametrize("filters", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}])
def test_frequencies_follow_probabilities(filters):
    logits, draws = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, -1.0]), 20000
    sampling = SamplingParams(**{"temperature": 1.0, **filters}, seed=1234)
    source = make_random(sampling)
    token_ids = sample(logits.expand(draws, -1), [Row(sampling, random=source)] * draws).token_ids
    counts = torch.bincount(token_ids, minlength=6)
    expected = processors(**filters)(torch.tensor([[0]]), logits[None])[0].softmax(dim=-1) * draws
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum().item()
    assert chi_square < 25, (counts, expected)  # 5 degrees of freedom: 1 in 7000


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.5}, {"top_p": 1e-50}, {"top_k": 40}, {"min_p": 0.3}])
@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_extreme_random_numbers_draw_kept_tokens(number, filters):
    """The first and the last kept token, with a full vocabulary and impossible tokens at both ends."""
    logits = random_logits(1, 151936) * 3
    logits[0, :1000] = logits[0, -1000:] = -INF
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **filters}
    expected = processors(**settings)(torch.tensor([[0]]), logits)[0].softmax(dim=-1)
    token_id = sample(logits, [make_row(number, **filters)]).token_ids.item()
    assert expected[token_id] > 0
    likely = (expected > 2**-29).nonzero()[:, 0]
    assert token_id <= likely[0] if number == 0 else token_id >= likely[-1]


def test_random_numbers_of_seeds_and_samples():
    seeded = [SamplingParams(temperature=1.0, seed=seed) for seed in (5, 6, 51)]
    streams = [make_random(sampling, index) for sampling in seeded for index in (0, 1, 2, 12)]
    assert len({stream.random() for stream in streams}) == 12
    assert make_random(seeded[0], 3).random() == make_random(seeded[0], 3).random()
    free = SamplingParams(temperature=1.0)
    assert make_random(free).random() != make_random(free).random()
    assert make_random(SamplingParams(seed=5)) is None


def test_as_many_other_rows_have_their_own_settings():
    sampler, logits = Sampler(frozenset()), torch.zeros(2, VOCAB)
    first, second = (Row(SamplingParams(logit_bias={token_id: 1.0})) for token_id in (7, 8))
    for rows, expected in (((first, second), [7, 8]), ((second, first), [8, 7]), ((second, second), [8, 8])):
        assert sampler.sample(single(logits), rows).token_ids.tolist() == expected


def test_one_random_number_per_sampled_token():
    row, same = make_row(), Random(7)
    row.random = Random(7)
    sampler = Sampler(frozenset())
    for _ in range(3):
        sampler.sample(single(random_logits(2, VOCAB)), [Row(SamplingParams()), row])
        same.random()
    assert row.random.random() == same.random()


# Log-likelihoods


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}, {"temperature": 0.7, "top_k": 4}])
def test_logprobs_are_of_raw_logits(sampling):
    logits = random_logits(4, VOCAB)
    asked = [3, None, 7, 0]
    extra = {"presence_penalty": 1.5, "logit_bias": {4: 9.0}, "min_tokens": 3}
    rows = [Row(SamplingParams(logprobs=top_k, **extra, **sampling), [1], [2], [], Random()) for top_k in asked]
    sampled = sample(logits, rows, frozenset([1]))
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(sampled.logprobs[:, 0], expected.gather(1, sampled.token_ids[:, None])[:, 0])
    values, ids = expected.topk(7)
    torch.testing.assert_close(sampled.logprobs[:, 1:], values)
    assert sampled.top_ids.tolist() == ids.tolist()


def test_logprobs_of_the_chosen_token_only():
    logits = random_logits(2, VOCAB)
    sampled = sample(logits, [Row(SamplingParams(logprobs=0)), Row(SamplingParams())])
    assert sampled.logprobs.shape == (2, 1) and sampled.top_ids.shape == (2, 0)
    torch.testing.assert_close(sampled.logprobs, logits.log_softmax(-1).amax(-1, keepdim=True))
    assert sample(logits, [Row(SamplingParams())] * 2).logprobs is None


@pytest.mark.parametrize("num_rows", [0, 1, 200])
def test_token_logprobs(num_rows):
    logits = random_logits(num_rows, VOCAB)
    token_ids = torch.randint(VOCAB, (num_rows,))
    expected = logits.log_softmax(-1).gather(1, token_ids[:, None])
    values, ids = token_logprobs(single(logits), token_ids, 4)
    assert values.shape == (num_rows, 5) and ids.shape == (num_rows, 4)
    torch.testing.assert_close(values[:, :1], expected)
    values, ids = token_logprobs(single(logits), token_ids, None)
    torch.testing.assert_close(values, expected)
    assert ids is None


# Work per step


class CalledOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_greedy_step_is_one_operation():
    sampler, logits = Sampler(frozenset([1])), single(random_logits(3, VOCAB))
    rows = [Row(SamplingParams()) for _ in range(3)]
    sampler.sample(logits, rows)
    with CalledOperations() as called:
        sampler.sample(logits, rows)
    assert [name for name in called.names if name not in ("slice", "select", "alias")] == ["max"]


def test_tensors_of_settings_are_made_once():
    """A step whose rows stay only sends random numbers, and new tokens of rows with a penalty."""
    sampler = Sampler(frozenset([1]))
    extras = [{"top_p": 0.9}, {"logit_bias": {3: 1.0}}, {"presence_penalty": 1.0}, {"min_tokens": 9}]
    rows = [make_row(**extra) for extra in extras]
    sampler.sample(single(random_logits(4, VOCAB)), rows)
    logits = single(random_logits(4, VOCAB))
    rows[2].token_ids.append(3)
    with CalledOperations() as called:
        sampler.sample(logits, rows)
    assert called.names.count("_to_copy") <= 4, called.names  # two sent, two conversions of weights and targets
