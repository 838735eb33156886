# SPDX-License-Identifier: Apache-2.0
"""The network equals transformers' in float32, for every kind of config and in chunks of any size."""

import random

import pytest
import torch

from executor import LLM, SamplingParams
from tests.checkpoints import make_checkpoint, reference_logits

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "plain": {},
    "topk_not_normalised": {"norm_topk_prob": False},
    "mlp_only_layers": {"mlp_only_layers": [1]},
    "decoder_sparse_step": {"decoder_sparse_step": 2},
    "all_dense": {"num_experts": 0, "mlp_only_layers": [0, 1, 2]},
    "attention_bias": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "one_kv_head": {"num_key_value_heads": 1},
    "multi_head": {"num_key_value_heads": 6},
    "wide_heads": {"head_dim": 64},
    "top_1": {"num_experts_per_tok": 1},
    "all_experts": {"num_experts_per_tok": 10},
    "eps": {"rms_norm_eps": 1e-2},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "yarn": {"rope_parameters": YARN},
    "yarn_attention_factor": {"rope_parameters": {**YARN, "attention_factor": 0.7}},
    "yarn_betas": {"rope_parameters": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0}},
    "llama3": {"rope_parameters": LLAMA3},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 32},
    "longrope": {"rope_parameters": LONGROPE, "max_position_embeddings": 128},
    "proportional": {"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.5}},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_tokens", [1, 7, 150])
def test_logits_equal_transformers(variant, num_tokens, tmp_path):
    model = make_checkpoint(tmp_path, **VARIANTS[variant])
    token_ids = torch.randint(0, 211, (num_tokens,)).tolist()
    expected = reference_logits(model, token_ids)
    for chunk in {num_tokens, random.randint(1, num_tokens)}:
        llm = LLM(tmp_path, device="cpu", dtype="float32", max_step_tokens=chunk)
        torch.testing.assert_close(llm.logits(token_ids), expected, atol=1e-4, rtol=0, msg=f"chunks of {chunk}")


@pytest.mark.parametrize("variant", ["plain", "yarn", "dynamic", "longrope"])
def test_prefixes_are_shared_where_keys_do_not_depend_on_the_length_of_the_prompt(variant, tmp_path):
    """With dynamic and longrope, the first 30 tokens of a longer prompt have other rotary frequencies."""
    model = make_checkpoint(tmp_path, **VARIANTS[variant])
    llm = LLM(tmp_path, device="cpu", dtype="float32")
    prompt = torch.randint(0, 211, (150,)).tolist()
    for length in (30, 150, 150):
        [output] = llm.generate([prompt[:length]], SamplingParams(max_new_tokens=1))
        assert output.token_ids == [reference_logits(model, prompt[:length])[-1].argmax()]
    assert output.num_cached_tokens == (149 if variant in ("plain", "yarn") else 0)
