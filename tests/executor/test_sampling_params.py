# SPDX-License-Identifier: Apache-2.0
"""Sampling parameters: types, ranges, defaults, and hints for parameter names of other engines."""

import copy
import dataclasses
import json
import math
import pickle
import subprocess
import sys
import typing

import numpy as np
import pytest
import torch

from executor import SamplingParams
from executor.config import SECTIONS, Settings
from executor.utils.known_names import HINTS, VALUES, hint, known_value

FIELDS = {field.name: field for field in dataclasses.fields(SamplingParams)}
KEYS = {field.name for kind in (Settings, *SECTIONS.values()) for field in dataclasses.fields(kind)}
WHOLE = ("max_new_tokens", "top_k", "seed", "n", "logprobs", "prompt_logprobs", "min_tokens")
FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def assert_invalid(key: str, value: object, line: str = "") -> None:
    with pytest.raises(ValueError) as raised:
        SamplingParams(**{key: value})
    assert str(raised.value).startswith(f"{key}: {line}")
    assert len(str(raised.value)) < 200 and str(raised.value).isprintable()


@pytest.mark.parametrize("key", WHOLE + FLOATS, ids=str)
@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, 10**400, -(10**400), 10**5000, "1", [1], True, 1j, np.array([1, 2])]
    + [torch.tensor(1), np.bool_(True), -3, 2**63],
    ids=lambda value: type(value).__name__,
)
def test_invalid_numbers(key, value):
    if key == "temperature" and isinstance(value, int) and value == 2**63:
        return  # close to uniform, but valid
    assert_invalid(key, value)


@pytest.mark.parametrize("key", WHOLE)
def test_fractions_are_no_whole_numbers(key):
    assert_invalid(key, 2.0, "expected a whole number, got 2.0")


@pytest.mark.parametrize(
    ("key", "valid", "invalid"),
    [
        ("max_new_tokens", [1, 2**31 - 1], [0, -1, 2**31]),
        ("temperature", [0, 1e-5, 1e5], [-0.1, 9e-6, 1.1e5, 1e39]),
        ("top_k", [0, 2**31 - 1], [-1, 2**31]),
        ("top_p", [1e-50, 1], [0, -0.5, 1.01]),
        ("min_p", [0, 0.99], [-0.1, 1]),
        ("repetition_penalty", [0.01, 100], [0, -1, 101]),
        ("presence_penalty", [-2, 2], [-2.01, 2.01]),
        ("frequency_penalty", [-2, 2], [-2.01, 2.01]),
        (
            "logit_bias",
            [{}, {0: -100}, {2**31 - 1: 100.0}],
            [{1: 100.5}, {1: -101}, {1: math.nan}, {-1: 0}, {2**31: 0}],
        ),
        ("seed", [0, 2**63 - 1], [-1, 2**63]),
        ("n", [1, 16384], [0, 16385]),
        ("logprobs", [0, 100], [-1, 101]),
        ("prompt_logprobs", [0, 100], [-1, 101]),
        ("min_tokens", [0, 32], [-1, 33]),
        ("stop", [[], ["a"], ("b", "c")], [[""], ("a", ""), ["a", "\ud83d"], ["a\ude00b"]]),
        ("stop_token_ids", [[], [0], (5, 2**31 - 1)], [[-1], [3, 2**31]]),
        ("bad_words", [[], ["a"], ("b", " c")], [[""], ("a", ""), ["\ud83d"]]),
    ],
)
def test_ranges(key, valid, invalid):
    for value in valid:
        SamplingParams(**{key: value})
    for value in invalid:
        assert_invalid(key, value)


def test_minimum_is_at_most_the_maximum():
    assert SamplingParams(min_tokens=7, max_new_tokens=7).min_tokens == 7
    with pytest.raises(ValueError, match=r"^min_tokens: 8 is impossible, .* at most max_new_tokens \(7\)$"):
        SamplingParams(min_tokens=8, max_new_tokens=7)


@pytest.mark.parametrize(
    ("key", "values", "expected"),
    [
        ("stop", ["abc", 3, [3], [b"a"], {"a"}], "strings in a tuple or list"),
        ("bad_words", ["abc", 3, [3], [b"a"], {"a"}], "strings in a tuple or list"),
        ("ignore_eos", [1, "yes"], "True or False"),
        ("stop_token_ids", [3, "3", {3}], "token ids in a tuple or list"),
        ("stop_token_ids", [["3"], [True], [2.0], [[1]], [None]], "token ids, which are whole numbers"),
        ("logit_bias", [3, [(1, 2.0)], "x"], "a dict of token ids and numbers"),
        ("logit_bias", [{"5": 1.0}, {True: 1.0}, {2.0: 1.0}, {None: 1.0}], "token ids, which are whole numbers"),
        ("logit_bias", [{5: "1"}, {5: True}, {5: None}], "a number"),
        ("mask", [3, "x", torch.ones(3, dtype=torch.bool)], "a function of the generated token ids"),
    ],
)
def test_wrong_types(key, values, expected):
    for value in values:
        assert_invalid(key, value, f"expected {expected}, got ")


def test_none_is_the_default():
    """Clients send null for what they leave open."""
    assert SamplingParams(**dict.fromkeys(FIELDS)) == SamplingParams()


def test_values_become_plain_and_immutable():
    given = {5: 1, 6: np.float64(0.5)}
    sampling = SamplingParams(
        temperature=np.float64(0.5), top_p=1, stop=["a"], stop_token_ids=[1], bad_words=["b"], logit_bias=given
    )
    given[7] = 3.0
    assert {type(getattr(sampling, key)) for key in ("temperature", "top_p", "min_p")} == {float}
    assert (sampling.stop, sampling.stop_token_ids, sampling.bad_words) == (("a",), (1,), ("b",))
    assert sampling.logit_bias == {5: 1.0, 6: 0.5} and {type(bias) for bias in sampling.logit_bias.values()} == {float}
    for change in ("[5] = 2.0", ".update({5: 2.0})", ".clear()", ".pop(5)", ".setdefault(9, 1.0)", ".popitem()"):
        with pytest.raises(TypeError, match="read-only"):
            exec(f"biases{change}", {"biases": sampling.logit_bias})
    with pytest.raises(TypeError, match="read-only"):
        del sampling.logit_bias[5]
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampling.top_k = 3


def test_copies_are_equal():
    sampling = SamplingParams(temperature=0.5, stop=["a"], logit_bias={5: 1.0})
    assert sampling == pickle.loads(pickle.dumps(sampling)) == copy.deepcopy(sampling) == dataclasses.replace(sampling)
    assert dataclasses.replace(sampling, top_k=3).top_k == 3
    assert SamplingParams(**json.loads(json.dumps({"stop": sampling.stop, "top_k": None}))).stop == ("a",)
    assert dataclasses.asdict(sampling)["logit_bias"] == {5: 1.0}
    assert hash(sampling) == hash(dataclasses.replace(sampling))


def test_every_parameter_is_documented():
    documented = {word.rstrip(":,") for word in (SamplingParams.__doc__ or "").split()}
    assert set(FIELDS) <= documented


def test_torch_is_not_needed():
    program = "import sys\nfrom executor.sampling_params import SamplingParams\nSamplingParams(logit_bias={1: 2.0})\n"
    program += "import typing\ntyping.get_type_hints(SamplingParams)\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert set(typing.get_type_hints(SamplingParams)) == set(FIELDS)


@pytest.mark.parametrize(
    ("key", "advice"),
    [("max_tokens", "did you mean max_new_tokens?"), ("best_of", "SamplingParams.n"), ("do_sample", "temperature 0")]
    + [("max_new_token", "possible are max_new_tokens, temperature"), ("x" * 10**6, "possible are ")],
)
def test_foreign_names_in_sampling_params(key, advice):
    with pytest.raises(TypeError) as raised:
        SamplingParams(**{key: 1})
    line = str(raised.value)
    assert line.startswith("SamplingParams: ") and advice in line and "data_config" not in line and len(line) < 400


def test_hints_refer_to_existing_settings():
    words = {word.strip(".,:;?") for text in HINTS.values() for word in text.split() if "_" in word or "." in word}
    sections = {name: {field.name for field in dataclasses.fields(kind)} for name, kind in SECTIONS.items()}
    sections["SamplingParams"] = set(FIELDS)
    for word in words - {"generation_config.json"}:
        section, _, key = word.rpartition(".")
        assert key in sections.get(section, KEYS | {""}), word
    assert not KEYS & set(HINTS) and not {"cuda", "npu", "cpu", "bfloat16"} & set(VALUES)
    assert hint("gpu-memory-utilization") == hint("gpu_memory_utilization") and hint("batch_size") is None
    assert known_value("gpu") == known_value("GPU") == "cuda" and known_value("torch.half") == "float16"
    assert known_value("tpu") is None


def test_parameters_that_are_no_settings_have_a_hint():
    for key in set(FIELDS) - KEYS - {"mask"}:
        assert hint(key) == f"only from Python: SamplingParams.{key}"
