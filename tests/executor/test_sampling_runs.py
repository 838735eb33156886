# SPDX-License-Identifier: Apache-2.0
"""Sampling parameters on their way from settings, checkpoint or user to generated texts."""

import json
import random
import shutil
from pathlib import Path

import pytest

from executor import LLM, SamplingParams
from tests.checkpoints import make_checkpoint


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


# Names of other engines


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
