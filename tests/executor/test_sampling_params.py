# SPDX-License-Identifier: Apache-2.0
"""Invalid sampling parameters, and hints for parameter names of other engines."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch

from executor import LLM, SamplingParams
from executor.config import SECTIONS, Settings
from executor.utils.known_names import HINTS, VALUES, hint, known_value

KEYS = {field.name for kind in (Settings, *SECTIONS.values()) for field in dataclasses.fields(kind)}
NUMBERS = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


@pytest.mark.parametrize("key", NUMBERS, ids=str)
@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), -float("inf"), 10**400, -(10**400), 10**5000, "1", [1], True, 1j, np.array([1, 2])]
    + [torch.tensor(1), np.bool_(True), -1, 2**63],
    ids=lambda value: type(value).__name__,
)
def test_invalid_numbers(key, value):
    if key == "temperature" and isinstance(value, int) and value == 2**63:
        return  # close to uniform, but valid
    with pytest.raises(ValueError) as raised:
        SamplingParams(**{key: value})
    assert str(raised.value).startswith(f"{key}: ") and len(str(raised.value)) < 200 and str(raised.value).isprintable()


@pytest.mark.parametrize("stop", ["abc", None, 3, [3], [""], ["a", "\ud83d"], [b"a"], ["a\ude00b"], {"a"}])
def test_invalid_stop_strings(stop):
    with pytest.raises(ValueError, match="^stop: "):
        SamplingParams(stop=stop)


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_invalid_ignore_eos(value):
    with pytest.raises(ValueError, match="^ignore_eos: expected True or False"):
        SamplingParams(ignore_eos=value)


def test_numbers_become_plain_python_types():
    sampling = SamplingParams(temperature=np.float64(0.5), top_p=1, stop=["a"])
    assert {type(getattr(sampling, key)) for key in ("temperature", "top_p", "min_p")} == {float}
    assert sampling == pickle.loads(pickle.dumps(sampling)) == copy.deepcopy(sampling) == dataclasses.replace(sampling)
    assert dataclasses.replace(sampling, top_k=3).top_k == 3


@pytest.mark.parametrize(
    ("key", "advice"),
    [("max_tokens", "did you mean max_new_tokens?"), ("n", "one completion per prompt"), ("do_sample", "temperature 0")]
    + [("max_new_token", "possible are max_new_tokens, temperature"), ("x" * 10**6, "possible are ")],
)
def test_foreign_names_in_sampling_params(key, advice):
    with pytest.raises(TypeError) as raised:
        SamplingParams(**{key: 1})
    line = str(raised.value)
    assert line.startswith("SamplingParams: ") and advice in line and "data_config" not in line and len(line) < 400


def test_hints_refer_to_existing_settings():
    words = {word.strip(".,:;?") for text in HINTS.values() for word in text.split() if "_" in word}
    named = {word.rpartition(".")[2] for word in words - {"generation_config.json"}}
    assert named <= KEYS, named - KEYS
    for word in words:
        section, _, key = word.rpartition(".")
        if section in SECTIONS:
            assert key in {field.name for field in dataclasses.fields(SECTIONS[section])}, word
    assert not KEYS & set(HINTS) and not {"cuda", "npu", "cpu", "bfloat16"} & set(VALUES)
    assert hint("gpu-memory-utilization") == hint("gpu_memory_utilization") and hint("batch_size") is None
    assert known_value("gpu") == known_value("GPU") == "cuda" and known_value("torch.half") == "float16"
    assert known_value("tpu") is None


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_model_len": 4096}, ("data_config.input_max_len", "data_config.max_new_tokens")),
        ({"tensor_parallel_size": 2}, ("attn_tp_size", "moe_tp_size", "world_size")),
        ({"gpu_memory_utilization": 0.9}, ("model_config.cache_memory_fraction",)),
        ({"trust_remote_code": True}, ("never run",)),
        ({"torch_dtype": "auto"}, ("model_config.dtype",)),
        ({"device": "gpu"}, ("did you mean cuda?",)),
        ({"dtype": "bf16"}, ("did you mean bfloat16?",)),
        ({"dtype": "half"}, ("did you mean float16?",)),
        ({"x" * 10**6: 1}, ("unknown setting",)),
    ],
)
def test_foreign_names_in_settings(settings, named):
    with pytest.raises(ValueError) as raised:
        LLM("models/qwen3_moe/demo", **settings)
    line = str(raised.value)
    assert line.startswith("LLM: ") and all(name in line for name in named) and len(line) < 500
