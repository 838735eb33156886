# SPDX-License-Identifier: Apache-2.0
"""Quantised checkpoints: logits equal those of the weights that they stand for, in float32."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from executor import LLM
from tests.checkpoints import reference_logits
from tests.quantized_checkpoints import CONFIG, FORMATS, INTEGER, quantize, quantize_static, with_integer_layers


def assert_equal_logits(folder: Path, model: Qwen3MoeForCausalLM, integer: bool) -> None:
    """With whole numbers for activations, rounding may differ in an element: one token then differs in all logits."""
    token_ids = torch.randint(0, CONFIG["vocab_size"], (40,)).tolist()
    expected = reference_logits(model, token_ids)
    found = LLM(folder, device="cpu", dtype="float32", max_step_tokens=23).logits(token_ids)
    errors = (found - expected).abs().amax(-1)
    assert (errors.median() if integer else errors.max()) < 1e-4, errors
    assert errors.max() < 0.05 * expected.std(), errors


@pytest.mark.parametrize("name", FORMATS)
def test_logits_equal_transformers(name, tmp_path):
    model = quantize(tmp_path, *FORMATS[name])
    assert_equal_logits(tmp_path, with_integer_layers(model) if name in INTEGER else model, name in INTEGER)


@pytest.mark.parametrize("as_bits", [False, True])
def test_static_activations(as_bits, tmp_path):
    assert_equal_logits(tmp_path, quantize_static(tmp_path, as_bits), True)


@pytest.mark.parametrize("name", ["awq", "gptq", "fp8", "w4a16_asymmetric"])
def test_some_modules_are_float(name, tmp_path):
    """Attention of one layer and the experts of the other, without a word of it in the configuration."""
    model = quantize(tmp_path, *FORMATS[name], is_quantized=lambda module: ("layers.0" in module) == ("attn" in module))
    assert_equal_logits(tmp_path, model, False)
