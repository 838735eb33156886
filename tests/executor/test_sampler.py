# SPDX-License-Identifier: Apache-2.0
"""Sampling: the same distribution as transformers', and reproducible draws."""

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from executor import LLM, SamplingParams
from executor.engine import sampler
from executor.engine.sampler import sample
from executor.engine.scheduler import Sequence
from models.layers.lm_head import ShardedLogits
from ops.comm import SINGLE
from tests.checkpoints import make_checkpoint

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


def make_sequence(prompt: list[int], token_ids: list[int], seed: int = 0, **sampling) -> Sequence:
    return Sequence(
        index=0,
        prompt="",
        prompt_token_ids=prompt,
        sampling=SamplingParams(**sampling),
        generator=torch.Generator().manual_seed(seed),
        token_ids=token_ids,
    )


def sample_rows(logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    return sample(ShardedLogits(logits.clone(), SINGLE["lmhead_tp"], 0, len(sequences)), sequences)[0].tolist()


def processors(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0
) -> LogitsProcessorList:
    """transformers' logits processors for these settings."""
    chosen = [RepetitionPenaltyLogitsProcessor(repetition_penalty), TemperatureLogitsWarper(temperature)]
    chosen += [TopKLogitsWarper(top_k)] if top_k else []
    return LogitsProcessorList([*chosen, TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)])


@pytest.fixture
def drawn_from(monkeypatch) -> list[torch.Tensor]:
    """Records the probabilities of every draw."""
    seen = []
    multinomial = torch.multinomial
    monkeypatch.setattr(sampler.torch, "multinomial", lambda p, *a, **k: seen.append(p) or multinomial(p, *a, **k))
    return seen


def assert_same_distribution(drawn: torch.Tensor, expected: torch.Tensor) -> None:
    """With top_k, draws are over candidates sorted by logit."""
    drawn, expected = (part.sort(descending=True).values for part in (drawn, expected))
    torch.testing.assert_close(drawn, expected[: len(drawn)], atol=1e-5, rtol=0)
    assert not expected[len(drawn) :].any()


@pytest.mark.parametrize("filters", FILTERS)
def test_probabilities_equal_transformers(filters, drawn_from):
    for scale in (0.5, 3.0, 20.0):
        logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(random.randrange(2**32))) * scale
        prompt, token_ids = random.choices(range(VOCAB), k=8), random.choices(range(VOCAB), k=4)
        [token_id] = sample_rows(logits[None], [make_sequence(prompt, token_ids, **{"temperature": 1.0, **filters})])
        expected = processors(**filters)(torch.tensor([prompt + token_ids]), logits[None])[0].softmax(dim=-1)
        assert_same_distribution(drawn_from[-1], expected)
        assert expected[token_id] > 0


def test_order_of_the_filters_is_that_of_generate(tmp_path, drawn_from):
    filters = FILTERS[-1]
    model = make_checkpoint(tmp_path)
    prompt = random.choices(range(211), k=9)
    LLM(tmp_path, device="cpu", dtype="float32").generate([prompt], SamplingParams(max_new_tokens=1, **filters))
    [ours] = drawn_from
    theirs = {"max_new_tokens": 1, "do_sample": True, "output_scores": True, "return_dict_in_generate": True}
    run = model.generate(torch.tensor([prompt]), **theirs, **filters)
    assert_same_distribution(ours, run.scores[0][0].softmax(dim=-1))


@pytest.mark.parametrize("penalty", [1.0, 1.8])
def test_greedy(penalty):
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(random.randrange(2**32)))
    histories = [random.choices(range(VOCAB), k=10) for _ in logits]
    # No filter drops the most likely token.
    filters = {"temperature": 0.0, "top_k": 3, "top_p": 0.5, "min_p": 0.5, "repetition_penalty": penalty}
    sequences = [make_sequence(history[:6], history[6:], **filters) for history in histories]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(histories), logits.clone()).argmax(dim=-1)
    assert sample_rows(logits, sequences) == expected.tolist()


def test_greedy_and_sampled_requests_share_a_step():
    logits = torch.randn(4, VOCAB)
    settings = [{}, {"temperature": 1.0}, {"temperature": 1e-4}, {"temperature": 5.0, "top_k": 1}]
    token_ids = sample_rows(logits, [make_sequence([1], [], **sampling) for sampling in settings])
    best = logits.argmax(dim=-1).tolist()
    assert [token_ids[i] for i in (0, 2, 3)] == [best[i] for i in (0, 2, 3)]


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
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_non_finite_rows(penalty, sampling):
    """They are reported with a valid token; other rows are unaffected."""
    logits = torch.randn(len(ROWS), VOCAB)
    for row, (values, _) in zip(logits, ROWS, strict=True):
        row[torch.randperm(VOCAB)[: len(values)]] = torch.tensor(values)
    settings = {"repetition_penalty": penalty, **sampling}

    def run(chosen: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        sequences = [make_sequence([1, 2], [3], seed=i, **settings) for i in chosen]
        return sample(ShardedLogits(logits[chosen], SINGLE["lmhead_tp"], 0, len(chosen)), sequences)

    token_ids, largest = run([*range(len(ROWS))])
    assert [math.isfinite(value) for value in largest.tolist()] == [finite for _, finite in ROWS]
    assert ((token_ids >= 0) & (token_ids < VOCAB)).all()
    sound = [i for i, (_, finite) in enumerate(ROWS) if finite]
    assert token_ids[sound].tolist() == run(sound)[0].tolist()
    assert all(logits[i, token_ids[i]] > -INF for i in sound)


@pytest.mark.parametrize("filters", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.8}])
def test_frequencies_follow_probabilities(filters):
    logits = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, -1.0])
    draws = 4000
    sequence = make_sequence([0], [], seed=1234, **{"temperature": 1.0, **filters})
    counts = torch.bincount(torch.tensor([sample_rows(logits[None], [sequence])[0] for _ in range(draws)]), minlength=6)
    expected = processors(**filters)(torch.tensor([[0]]), logits[None])[0].softmax(dim=-1) * draws
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum().item()
    assert chi_square < 25, (counts, expected)  # 5 degrees of freedom: 1 in 7000


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> LLM:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder)
    return LLM(folder, device="cpu", dtype="float32", batch_size=4)


def test_seeded_sampling_does_not_depend_on_neighbours(llm):
    prompts = [random.choices(range(211), k=random.randint(1, 140)) for _ in range(4)]
    seed = random.randrange(2**62)
    params = SamplingParams(max_new_tokens=12, temperature=1.0, seed=seed)
    alone = [llm.generate([prompt], params)[0].token_ids for prompt in prompts]
    assert alone == [llm.generate([prompt], params)[0].token_ids for prompt in prompts]
    assert alone == [output.token_ids for output in llm.generate(prompts, params)]
    assert alone[::-1] == [output.token_ids for output in llm.generate(prompts[::-1], params)]
    other = SamplingParams(max_new_tokens=12, temperature=1.0, seed=seed + 1)
    assert alone != [output.token_ids for output in llm.generate(prompts, other)]


def test_unseeded_sampling_differs(llm):
    params = SamplingParams(max_new_tokens=20, temperature=1.0)
    first, second, third = (output.token_ids for output in llm.generate([[1, 2]] * 3, params))
    assert not first == second == third


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("max_new_tokens", [0, -1]),
        ("temperature", [-0.1, math.inf, math.nan]),
        ("top_k", [-1]),
        ("top_p", [0, -0.5, 1.01, math.nan]),
        ("min_p", [-0.1, 1, math.nan]),
        ("repetition_penalty", [0, -1, math.inf, math.nan]),
        ("seed", [-1, 2**63]),
        ("stop", ["text", [""], ("a", "")]),
    ],
)
def test_values_out_of_range(key, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{key}: "):
            SamplingParams(**{key: value})


@pytest.mark.parametrize(
    ("key", "values"),
    [
        *((key, [2.5, "2", True, None]) for key in ("max_new_tokens", "top_k")),
        *((key, ["0.5", None]) for key in ("temperature", "top_p", "min_p", "repetition_penalty")),
        ("seed", [1.5, "1"]),
        ("stop", [None, [3], 3]),
    ],
)
def test_wrong_types(key, values):
    for value in values:
        with pytest.raises((TypeError, ValueError), match=key):
            SamplingParams(**{key: value})


# sampling_from_checkpoint


def defaults(checkpoint: Path, folder: Path, generation: dict | str | None, **settings) -> SamplingParams:
    """Default sampling of an LLM with this generation_config.json."""
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    file = folder / "generation_config.json"
    file.unlink(missing_ok=True)
    if generation is not None:
        file.write_text(generation if isinstance(generation, str) else json.dumps(generation))
    return LLM(folder, device="cpu", dtype="float32", **settings).default_sampling


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder)
    return folder


STATED = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.05}


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"do_sample": True, **STATED}, STATED),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "top_k": None, "top_p": 0.8}, {"temperature": 1.0, "top_p": 0.8}),
        ({**STATED}, {**STATED, "temperature": 0.0}),
        ({"do_sample": False, "repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        (None, {}),
    ],
)
def test_sampling_from_checkpoint(generation, expected, checkpoint, tmp_path):
    own = {"max_new_tokens": 7, "seed": 3, "stop": ["x"], "ignore_eos": True}
    found = defaults(checkpoint, tmp_path, generation, sampling_from_checkpoint=True, **own)
    assert found == SamplingParams(**own, **expected)
    assert defaults(checkpoint, tmp_path, generation, **own) == SamplingParams(**own)


@pytest.mark.parametrize("key", ["temperature", "top_k", "top_p", "min_p", "repetition_penalty"])
def test_sampling_from_settings_and_checkpoint(key, checkpoint, tmp_path):
    with pytest.raises(ValueError, match=f"^data_config.{key}: .*sampling_from_checkpoint"):
        defaults(checkpoint, tmp_path, {}, sampling_from_checkpoint=True, **{key: STATED[key]})


@pytest.mark.parametrize(
    ("generation", "named"),
    [
        ("{", "generation_config.json: not valid JSON"),
        ("[]", "generation_config.json: "),
        ({"do_sample": True, "top_p": 7}, "top_p"),
        ({"do_sample": True, "temperature": "hot"}, "temperature"),
        ({"do_sample": True, "top_k": 2.5}, "top_k"),
    ],
)
def test_invalid_generation_config(generation, named, checkpoint, tmp_path):
    with pytest.raises(ValueError, match=named):
        defaults(checkpoint, tmp_path, generation, sampling_from_checkpoint=True)


@pytest.mark.parametrize(("key", "value"), [("temperature", -1.0), ("top_p", 0.0), ("top_k", -3), ("seed", -1)])
def test_error_names_the_setting(key, value, checkpoint, tmp_path):
    with pytest.raises(ValueError, match=f"data_config.{key}: {value} is impossible"):
        defaults(checkpoint, tmp_path, None, **{key: value})
