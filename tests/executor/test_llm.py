# SPDX-License-Identifier: Apache-2.0
"""The Python API: supported checkpoints, prompts, outputs."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from executor import LLM, SamplingParams
from executor.config import REPOSITORY
from executor.loading.before_loading import load_config
from tests.checkpoints import make_checkpoint, reference_logits

DEMO = REPOSITORY / "models/qwen3_moe/demo"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
THETA = {"rope_theta": 1e4}
LONGROPE = {**YARN, "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Checkpoint folder and its model."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, make_checkpoint(folder)


@pytest.fixture(scope="module")
def demo_tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory) -> Path:
    """A random model with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("texts")
    make_checkpoint(folder, vocab_size=2048)
    for file in DEMO.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def edited(folder: Path, copy: Path, **config) -> Path:
    """Copy of a checkpoint with changes to its config.json; None removes a key."""
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    raw = json.loads((folder / "config.json").read_text()) | config
    (copy / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    return copy


def refusal(folder: Path, **settings) -> str:
    with pytest.raises(ValueError) as error:
        LLM(folder, device="cpu", dtype="float32", **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def logits_of(folder: Path, token_ids: list[int], **settings) -> torch.Tensor:
    return LLM(folder, device="cpu", dtype="float32", **settings).logits(token_ids)


def random_tokens(num_tokens: int) -> list[int]:
    return random.choices(range(211), k=num_tokens)


# Rejected checkpoints


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "qwen3"}, "model_type 'qwen3'"),
        ({"model_type": None}, "model_type None"),
        ({"architectures": ["Qwen3MoeForTokenClassification"]}, "architectures ['Qwen3MoeForTokenClassification']"),
        ({"architectures": ["MixtralForCausalLM"]}, "architectures ['MixtralForCausalLM']"),
        ({"use_sliding_window": True, "sliding_window": 128}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quant_method 'bitsandbytes' is not supported"),
        ({"quantization_config": "int8"}, "quantization_config"),
        ({"rope_parameters": {**THETA, "rope_type": "spiral"}}, "rope type 'spiral'"),
        ({"rope_parameters": {**THETA, "rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {**THETA, "rope_type": "llama3"}}, "low_freq_factor"),
        ({"rope_parameters": {**THETA, **YARN, "factor": None}}, "factor"),
        ({"rope_parameters": {**THETA, **YARN, "factor": "four"}}, "factor"),
        ({"rope_parameters": {**THETA, **YARN, "factor": 0}}, "factor"),
        ({"rope_parameters": {**THETA, "rope_type": "linear", "factor": 0.0}}, "factor"),
        ({"rope_parameters": {**YARN, "rope_theta": 1.0}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta"),
        ({"rope_parameters": {**THETA, **YARN, "partial_rotary_factor": 0.5}}, "rotate 8 of 16"),
        ({"rope_parameters": {**THETA, **LONGROPE, "long_factor": [0.0] * 8}}, "finite"),
        ({"head_dim": 15}, "15"),
        ({"head_dim": "16"}, "head_dim"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": 5}, "num_attention_heads 5 is not a multiple of num_key_value_heads 2"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_experts_per_tok": 11}, "num_experts_per_tok 11 is more than num_experts 10"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size is 0"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ({"num_experts": -1, "num_local_experts": None}, "num_experts"),
        ({"mlp_only_layers": "all"}, "mlp_only_layers"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"moe_intermediate_size": 41}, "tensors do not fit the config"),
    ],
)
def test_unsupported_config(config, named, checkpoint, tmp_path):
    folder = edited(checkpoint[0], tmp_path, **config)
    line = refusal(folder)
    assert line.startswith(str(folder)) and named in line, line


@pytest.mark.parametrize("content", ["", "{", "[]", "3", b"\xff\xfe"])
def test_config_is_not_json(content, checkpoint, tmp_path):
    folder = edited(checkpoint[0], tmp_path)
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refusal(folder).startswith(f"{folder / 'config.json'}: ")


def test_folders_without_a_checkpoint(checkpoint, tmp_path):
    assert refusal(tmp_path / "none") == f"model_path: {tmp_path / 'none'} does not exist"
    assert refusal(tmp_path) == f"model_path: {tmp_path} has no config.json"
    shutil.copy(checkpoint[0] / "config.json", tmp_path)
    assert refusal(tmp_path).startswith(f"model_path: {tmp_path} has neither model.safetensors.index.json nor")


def test_invalid_tokenizer(with_tokenizer, tmp_path):
    folder = edited(with_tokenizer, tmp_path)
    (folder / "tokenizer.json").write_text("{")
    assert refusal(folder).startswith(f"model_path: no tokenizer could be read from {folder}: ")


# Equivalent configs


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_scaling": YARN, "rope_theta": 5e5},
        {"rope_scaling": {"type": "yarn", **{k: v for k, v in YARN.items() if k != "rope_type"}}, "rope_theta": 5e5},
        {"rope_parameters": {**YARN, "rope_theta": 5e5}},
    ],
)
def test_rope_spellings(spelling, checkpoint, tmp_path):
    token_ids = random_tokens(100)
    model = make_checkpoint(tmp_path / "new", rope_parameters={**YARN, "rope_theta": 5e5})
    expected = reference_logits(model, token_ids)
    assert not torch.allclose(expected, reference_logits(checkpoint[1], token_ids), atol=1e-2)
    folder = edited(tmp_path / "new", tmp_path / "old", **{"rope_parameters": None, **spelling})
    torch.testing.assert_close(logits_of(folder, token_ids), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("theta_in_override", [False, True])
@pytest.mark.parametrize("old_spelling", [False, True])
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_rope_override_equals_a_checkpoint_that_has_it(theta_in_override, old_spelling, key, checkpoint, tmp_path):
    token_ids = random_tokens(100)
    model = make_checkpoint(tmp_path / "yarn", rope_parameters={**YARN, "rope_theta": 5e5})
    own = {"rope_theta": 1e4 if theta_in_override else 5e5}
    own |= {"rope_scaling": {"rope_type": "linear", "factor": 2.0}} if old_spelling else {"rope_type": "default"}
    if old_spelling:
        folder = edited(checkpoint[0], tmp_path / "own", rope_parameters=None, **own)
    else:
        folder = edited(checkpoint[0], tmp_path / "own", rope_parameters=own)
    override = {key: "yarn", **{k: v for k, v in YARN.items() if k != "rope_type"}}
    override |= {"rope_theta": 5e5} if theta_in_override else {}
    ours = logits_of(folder, token_ids, rope_scaling=override)
    torch.testing.assert_close(ours, reference_logits(model, token_ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ({}, "rope_type"),
        ({"factor": 4.0}, "rope_type"),  # would have no effect
        ({"rope_type": "spiral"}, "spiral"),
        ({"rope_type": 3}, "3"),
        ({"rope_type": "yarn"}, "factor"),
        ({"rope_type": "yarn", "factor": 0}, "factor"),
        ({"rope_type": "yarn", "factr": 4.0, "factor": 4.0}, "factr"),
    ],
)
def test_rope_override_is_checked(override, named, checkpoint):
    line = refusal(checkpoint[0], rope_scaling=override)
    assert "model_config.rope_scaling" in line and named in line


def test_keys_of_transformers_4(checkpoint, tmp_path):
    raw = json.loads((checkpoint[0] / "config.json").read_text())
    old = {"num_experts": raw["num_local_experts"] if "num_local_experts" in raw else raw["num_experts"]}
    old |= {"rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "bfloat16", "sliding_window": None}
    old |= {"use_sliding_window": False, "transformers_version": "4.51.0", "output_router_logits": False}
    for key in ("rope_parameters", "num_local_experts", "dtype", "layer_types"):
        raw.pop(key, None)
    folder = edited(checkpoint[0], tmp_path / "old")
    (folder / "config.json").write_text(json.dumps(raw | old))
    model = make_checkpoint(tmp_path / "new", rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    token_ids = random_tokens(60)
    torch.testing.assert_close(logits_of(folder, token_ids), reference_logits(model, token_ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["qwen3_30b_a3b", "qwen3_235b_a22b", "random_1b"])
def test_shapes_of_the_published_models(name):
    config = load_config(REPOSITORY / "models/qwen3_moe/shapes" / name)
    sizes = {
        "qwen3_30b_a3b": (48, 2048, 32, 4, 128, 128, 8, 768, 151936),
        "qwen3_235b_a22b": (94, 4096, 64, 4, 128, 128, 8, 1536, 151936),
        "random_1b": (16, 1024, 16, 4, 128, 64, 8, 256, 32768),
    }[name]
    found = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads)
    found += (config.head_dim, config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size)
    assert (*found, config.vocab_size) == sizes and config.rope_parameters["rope_theta"] == 1e6


# Random weights


def test_random_weights_need_only_a_config(checkpoint, tmp_path):
    shutil.copy(checkpoint[0] / "config.json", tmp_path)
    with pytest.raises(ValueError, match="has neither"):
        LLM(tmp_path, device="cpu")
    first, second = (LLM(tmp_path, device="cpu", with_ckpt=False, dtype="float32") for _ in range(2))
    token_ids = random_tokens(20)
    assert torch.equal(first.logits(token_ids), second.logits(token_ids))
    assert first.logits(token_ids).std() > 0


# generate, chat, logits


def test_prompt_types(with_tokenizer, demo_tokenizer):
    llm = LLM(with_tokenizer, device="cpu", dtype="float32", batch_size=2, max_new_tokens=4)
    texts = ["Good morrow", "What news?"]
    token_ids = [demo_tokenizer.encode(text) for text in texts]
    outputs = llm.generate(texts)
    assert [o.prompt for o in outputs] == texts and [o.prompt_token_ids for o in outputs] == token_ids
    assert all(len(o.token_ids) == 4 and o.text == demo_tokenizer.decode(o.token_ids) for o in outputs)
    expected = [o.token_ids for o in outputs]
    assert [o.token_ids for o in llm.generate(token_ids)] == expected
    assert [o.token_ids for o in llm.generate([texts[0], token_ids[1]])] == expected
    assert [o.token_ids for o in llm.generate(texts[0]) + llm.generate(token_ids[1])] == expected
    assert llm.generate([]) == []


def test_stream(with_tokenizer):
    """The chunks of each prompt, in any order between prompts, make up its output."""
    llm = LLM(with_tokenizer, device="cpu", dtype="float32", batch_size=2, max_new_tokens=12)
    texts = ["Good morrow", "What news?", "Speak!"]
    outputs = llm.generate(texts)
    chunks = list(llm.stream(texts))
    for index, output in enumerate(outputs):
        own = [chunk for chunk in chunks if chunk.index == index]
        assert "".join(chunk.text for chunk in own) == output.text
        assert [token_id for chunk in own for token_id in chunk.token_ids] == output.token_ids
        assert [chunk.finish_reason for chunk in own] == [None] * 11 + ["length"]
    first = chunks.index(next(chunk for chunk in chunks if chunk.index == 1))
    last = max(place for place, chunk in enumerate(chunks) if chunk.index == 0)
    assert first < last  # they run at the same time
    assert [chunk.token_ids for chunk in llm.stream(texts[0])] == [[token_id] for token_id in outputs[0].token_ids]


def test_samples(checkpoint):
    """Each has random numbers of its own; they do not depend on other prompts, nor on the number of samples."""
    llm = LLM(checkpoint[0], device="cpu", dtype="float32", batch_size=3)
    params = SamplingParams(max_new_tokens=8, temperature=1.0, seed=random.randrange(2**32), n=3)
    prompt = random_tokens(140)
    [output] = llm.generate([prompt], params)
    assert [sample.index for sample in output.outputs] == [0, 1, 2] and output.token_ids == output.outputs[0].token_ids
    assert len({tuple(sample.token_ids) for sample in output.outputs}) == 3
    together = llm.generate([random_tokens(5), prompt], params)[1]
    assert [sample.token_ids for sample in together.outputs] == [sample.token_ids for sample in output.outputs]
    [single] = llm.generate([prompt], dataclasses.replace(params, n=1))
    assert single.token_ids == output.token_ids
    chunks = list(llm.stream([prompt], params))
    for number, sample in enumerate(output.outputs):
        assert [i for chunk in chunks for i in chunk.token_ids if chunk.sample == number] == sample.token_ids


@pytest.mark.parametrize("thinking", [False, True])
def test_chat(thinking, with_tokenizer, demo_tokenizer):
    llm = LLM(with_tokenizer, device="cpu", dtype="float32", batch_size=2, enable_thinking=thinking)
    params = SamplingParams(max_new_tokens=5)
    conversations = [[{"role": "user", "content": text}] for text in ("Who's there?", "Speak!")]
    outputs = llm.chat(conversations, params)
    rendered = [
        demo_tokenizer.apply_chat_template(c, add_generation_prompt=True, enable_thinking=thinking)["input_ids"]
        for c in conversations
    ]
    assert [o.token_ids for o in outputs] == [o.token_ids for o in llm.generate(rendered, params)]
    assert [o.prompt_token_ids for o in outputs] == rendered
    [single] = llm.chat(conversations[1], params)
    assert single.token_ids == outputs[1].token_ids


def test_checkpoint_without_tokenizer_takes_token_ids(checkpoint):
    llm = LLM(checkpoint[0], device="cpu", dtype="float32")
    with pytest.raises(ValueError, match="has no tokenizer, only token ids can be given"):
        llm.generate("a text")
    with pytest.raises(ValueError, match="has no tokenizer, only token ids can be given"):
        llm.chat([{"role": "user", "content": "a text"}])
    [output] = llm.generate([[1, 2, 3]], SamplingParams(max_new_tokens=3))
    assert output.text == "" and len(output.token_ids) == 3
    with pytest.raises(ValueError, match="stop"):  # it could never match
        llm.generate([[1, 2, 3]], SamplingParams(stop=("a",)))


def test_from_yaml(checkpoint, tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(f"model_name: tiny\nmodel_path: {checkpoint[0]}\ndevice: cpu\n")
    llm = LLM.from_yaml(file, ["model_config.dtype=float32", "data_config.max_new_tokens=3"])
    token_ids = random_tokens(9)
    assert torch.equal(llm.logits(token_ids), logits_of(checkpoint[0], token_ids))
    assert len(llm.generate([token_ids])[0].token_ids) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logits(dtype, checkpoint):
    token_ids = random_tokens(140)
    logits = LLM(checkpoint[0], device="cpu", dtype=dtype).logits(token_ids)
    assert logits.dtype == torch.float32 and logits.shape == (140, 211) and logits.device.type == "cpu"
    expected = reference_logits(checkpoint[1], token_ids)
    # The median: where two experts are almost equally likely, rounding may choose the other one.
    error = (logits - expected).abs().median() / expected.std()
    assert error < {"float32": 1e-6, "bfloat16": 1e-1, "float16": 2e-2}[dtype]


def test_cache_larger_than_memory(checkpoint):
    line = refusal(checkpoint[0], cache_tokens=10**9)
    assert line.startswith("model_config.cache_tokens: 1000000000 tokens need ")
    assert "cache_memory_fraction" in refusal(checkpoint[0], cache_memory_fraction=1e-9)


def test_lengths_beyond_memory(checkpoint):
    assert "input_max_len" in refusal(checkpoint[0], input_max_len=10**12)


def test_logits_reach_the_last_position(checkpoint):
    llm = LLM(checkpoint[0], device="cpu", dtype="float32", input_max_len=600, max_new_tokens=1)
    assert llm.logits(random_tokens(601)).shape == (601, 211)
    with pytest.raises(ValueError, match="602 tokens"):
        llm.logits(random_tokens(602))


def test_attention_that_is_not_plain_beyond_a_length_is_refused_there(tmp_path):
    """From Python a prompt may be longer than the settings planned for, but not longer than that."""
    make_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["dual_chunk_attention_config"] = {"chunk_size": 64, "local_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    llm = LLM(tmp_path, device="cpu", dtype="float32", input_max_len=30, max_new_tokens=4)
    [output] = llm.generate([list(range(60))], SamplingParams(max_new_tokens=4, ignore_eos=True))
    assert len(output.token_ids) == 4
    with pytest.raises(
        ValueError, match="config.json's dual_chunk_attention_config.chunk_size is not supported beyond it"
    ):
        llm.generate([list(range(62))], SamplingParams(max_new_tokens=4))
    with pytest.raises(TypeError, match="token_ids: "):
        llm.logits(b"abc")
