# SPDX-License-Identifier: Apache-2.0
"""The network equals transformers' in float32, for every kind of config."""

import pytest
import torch

from executor import LLM
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
    llm = LLM(tmp_path, device="cpu", dtype="float32")
    torch.testing.assert_close(llm.logits(token_ids), reference_logits(model, token_ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", ["plain", "dynamic", "longrope"])  # the last two depend on the prompt's length
def test_logits_of_a_prompt_in_chunks_equal_transformers(variant, tmp_path):
    model = make_checkpoint(tmp_path, **VARIANTS[variant])
    token_ids = torch.randint(0, 211, (150,)).tolist()
    llm = LLM(tmp_path, device="cpu", dtype="float32", max_step_tokens=35)
    torch.testing.assert_close(llm.logits(token_ids), reference_logits(model, token_ids), atol=1e-4, rtol=0)
