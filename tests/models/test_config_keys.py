# SPDX-License-Identifier: Apache-2.0
"""Every key of a config.json is applied, refused or warned about: none that changes results is ignored silently."""

import json
import math
import time

import pytest
from transformers import Qwen3MoeConfig

from executor.config import settings_from_dict
from executor.loading.before_loading import check_before_launch, load_config
from models.qwen3_moe.architecture import attention_limit, override_rope, parse_config
from models.qwen3_moe.config_keys import KNOWN_KEYS, NETWORK_KEYS, ignored_keys
from tests.checkpoints import TINY

RAW = {**TINY, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
DUAL = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
# the keys of the published checkpoints' config.json: Qwen3-30B-A3B, its 2507 and Coder successors, their 1M variants
PUBLISHED = RAW | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "dual_chunk_attention_config": DUAL,
    "max_position_embeddings": 1010000,
}


def refusal(**changed) -> str:
    start_s = time.perf_counter()
    with pytest.raises(ValueError) as error:
        parse_config(RAW | changed)
    assert time.perf_counter() - start_s < 1
    return str(error.value)


def check(folder, input_max_len: int, max_new_tokens: int, **changed):
    (folder / "config.json").write_text(json.dumps(RAW | changed))
    data = {"input_max_len": input_max_len, "max_new_tokens": max_new_tokens}
    raw = {"model_name": "m", "model_path": str(folder), "data_config": data}
    return check_before_launch(settings_from_dict(raw, "test"))


def test_every_key_of_the_class_and_of_published_configs_is_known():
    saved = Qwen3MoeConfig(**TINY).to_dict()
    assert not ignored_keys({**saved, "rope_parameters": None}) and not ignored_keys(PUBLISHED)
    parse_config(PUBLISHED)


@pytest.mark.parametrize("key", ["brand_new", "qk_layernorm", "a\x1b[31m", "num_labels_of_mine"])
def test_unknown_keys_are_logged_in_one_line(key, tmp_path, caplog):
    assert not {key} & KNOWN_KEYS
    (tmp_path / "config.json").write_text(json.dumps(RAW | {key: [1], "rope_scaling": {"type": "linear", "factor": 2}}))
    load_config(tmp_path)
    [record] = caplog.records
    line = record.getMessage()
    assert str(tmp_path / "config.json") in line and "\x1b" not in line and key.split("\x1b")[0] in line


def test_rope_keys_without_effect_are_logged(tmp_path, caplog):
    rope = {"rope_type": "linear", "factor": 2.0, "mrope_section": [1, 2]}
    (tmp_path / "config.json").write_text(json.dumps(RAW | {"rope_scaling": rope, "rope_parameters": {"factor": 3.0}}))
    load_config(tmp_path)
    assert "rope_scaling.mrope_section, rope_parameters (beside rope_scaling)" in caplog.text


@pytest.mark.parametrize(
    ("changed", "tokens"),
    [
        ({"dual_chunk_attention_config": DUAL}, 262144),
        ({"dual_chunk_attention_config": {**DUAL, "chunk_size": 1000}}, 1000),
        ({"dual_chunk_attention_config": {**DUAL, "original_max_position_embeddings": 500}}, 500),
        ({"dual_chunk_attention_config": {"chunk_size": 700}}, 700),
        ({"dual_chunk_attention_config": {}}, 8192),
        ({"dual_chunk_attention_config": {**DUAL, "sparse_attention_enabled": True}}, 32768),
        ({"dual_chunk_attention_config": {**DUAL, "sparse_attention_config": {"0": {}}}}, 32768),
        (
            {
                "dual_chunk_attention_config": {
                    **DUAL,
                    "sparse_attention_enabled": False,
                    "sparse_attention_threshold": 9,
                }
            },
            262144,
        ),
        ({"use_sliding_window": True, "sliding_window": 128}, 128),
        ({"use_sliding_window": True}, 4096),  # transformers' default
    ],
)
def test_attention_is_refused_only_beyond_the_length_where_it_is_plain(changed, tokens, tmp_path, caplog):
    check(tmp_path, tokens - 8, 8, **changed)
    assert f"{tokens} is not plain attention beyond {tokens} tokens" in caplog.text and len(caplog.records) == 1
    with pytest.raises(ValueError) as error:
        check(tmp_path, tokens - 8, 9, **changed)
    line = str(error.value)
    assert line.startswith(str(tmp_path)) and next(iter(changed)) in line and f"must be at most {tokens}" in line


def test_attention_without_a_limit():
    for changed in ({}, {"sliding_window": 4096}, {"use_sliding_window": True, "sliding_window": None}):
        assert attention_limit(parse_config(RAW | changed)) is None


SIZES = [key for key in NETWORK_KEYS if isinstance(TINY.get(key), int) and not isinstance(TINY[key], bool)]


@pytest.mark.parametrize("value", [10**9, 10**15, 10**4000, -1, 1.5, math.nan, math.inf, True, "8", [8], {"a": 8}])
@pytest.mark.parametrize("key", [*SIZES, "decoder_sparse_step", "num_local_experts", "sliding_window"])
def test_sizes_out_of_bounds_are_refused_within_a_second(key, value):
    if key in ("decoder_sparse_step", "sliding_window") and value == 10**9:
        return
    without = {name: None for name in ("num_experts",) if key == "num_local_experts"}
    raw = {name: entry for name, entry in RAW.items() if name not in without}
    start_s = time.perf_counter()
    with pytest.raises(ValueError, match=f"^{key} is "):
        parse_config(raw | {key: value})
    assert time.perf_counter() - start_s < 1


@pytest.mark.parametrize(
    "changed",
    [
        {"num_hidden_layers": 1000, "num_experts": 1000},
        {"mlp_only_layers": list(range(10**6))},
        {"mlp_only_layers": ["1"]},
        {"mlp_only_layers": [True]},
        {"layer_types": ["full_attention"] * 10**6},
        {"num_labels": 10**9, "num_experts": 10**9},
        {"num_experts": 8, "num_local_experts": 9},
        {"hidden_size": 4, "head_dim": None},
    ],
)
def test_inconsistent_sizes_are_refused(changed):
    assert list(changed)[-1] in refusal(**changed) or list(changed)[0] in refusal(**changed)


def test_keys_of_other_tasks_are_not_processed():
    start_s = time.perf_counter()
    parse_config(RAW | {"num_labels": 10**9, "id2label": {"x": 1}, "attribute_map": {"a": "b"}, "to_dict": 3})
    assert time.perf_counter() - start_s < 1


@pytest.mark.parametrize("value", ["true", "false", 1, 0, None, [], math.nan])
@pytest.mark.parametrize("key", ["attention_bias", "norm_topk_prob", "tie_word_embeddings", "use_sliding_window"])
def test_flags_must_be_booleans(key, value):
    assert refusal(**{key: value}).startswith(f"{key} is ")


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-6, "1e-6", None, True, [1e-6], 10**400])
@pytest.mark.parametrize("key", ["rms_norm_eps", "initializer_range"])
def test_numbers_must_be_finite(key, value):
    assert refusal(**{key: value}).startswith(f"{key} is ")


@pytest.mark.parametrize(
    "changed",
    [
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {"layer_types": ["full_attention"]},
        {"layer_types": "full_attention"},
        {"per_layer_config": {"0": {"head_dim": 8}}},
        {"is_encoder_decoder": True},
        {"transformers_weights": "other.safetensors"},
        {"dual_chunk_attention_config": [1]},
        {"dual_chunk_attention_config": {"chunk_size": "8192"}},
        {"dual_chunk_attention_config": {"chunk_size": -1}},
        {"hidden_act": ["silu"]},
        {"architectures": "Qwen3MoeForCausalLM"},
        {"architectures": [["Qwen3MoeForCausalLM"]]},
        {"quantization_config": {}},
        {"eos_token_id": "2"},
        {"eos_token_id": [1, None, 10**4000]},
        {"model_type": "x" * 10**6},
    ],
)
def test_unsupported_features_are_refused(changed):
    assert next(iter(changed)) in refusal(**changed)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize("value", ["4", math.nan, math.inf, -math.inf, True, [4.0], {"a": 4.0}, 10**400, 1e300])
@pytest.mark.parametrize(
    ("base", "key"),
    [
        *((YARN, key) for key in ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast")),
        *((YARN, key) for key in ("mscale", "beta_slow", "rope_theta", "partial_rotary_factor")),
        *((LONGROPE, key) for key in ("short_factor", "long_factor")),
    ],
)
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_invalid_rope_values_are_refused(spelling, base, key, value):
    if isinstance(base.get(key), list) and value == [4.0]:  # a list that is too short
        assert "has 1 numbers, must have head_dim / 2 = 8" in refusal(**{spelling: {**base, key: value}})
        return
    assert key in refusal(**{spelling: {**base, key: value}})


@pytest.mark.parametrize(
    "changed",
    [
        {"rope_scaling": "yarn"},
        {"rope_parameters": [1]},
        {"rope_scaling": {"rope_type": ["yarn"]}},
        {"rope_scaling": {"rope_type": "y" * 10**6}},
        {"rope_scaling": {"type": "su", "factor": 2.0}},
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        {"rope_theta": "1e6"},
        {"rope_theta": math.nan},
        {"rope_theta": None},
        {"rope_theta": 10**400},
        {"rope_scaling": {**LONGROPE, "long_factor": [2.0] * 7}},
        {"rope_scaling": {**LONGROPE, "short_factor": [2.0] * 10**6}},
        {"rope_scaling": {**LONGROPE, "long_factor": [0.0] * 8}},
        {"rope_scaling": {**LONGROPE, "long_factor": ["2"] * 8}},
        {"rope_scaling": {**YARN, "truncate": "yes"}},
        {"rope_scaling": {**YARN, "beta_fast": -1.0}},
    ],
)
def test_invalid_rope_parameters_are_refused(changed):
    assert "rope" in refusal(**changed) or "factor" in refusal(**changed) or "truncate" in refusal(**changed)


def test_rope_override_also_replaces_top_level_keys():
    raw = RAW | {"original_max_position_embeddings": 64, "rope_scaling": {"rope_theta": 5e5, "type": "spiral"}}
    config = parse_config(override_rope(raw, YARN))
    rope = config.rope_parameters
    assert (rope["rope_theta"], rope["factor"], rope["original_max_position_embeddings"]) == (5e5, 4.0, 128)
    assert not hasattr(config, "original_max_position_embeddings")
