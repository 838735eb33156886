# SPDX-License-Identifier: Apache-2.0
"""Quantised checkpoints: logits equal those of the weights that they stand for, in float32."""

import pytest
import torch

from executor import LLM
from tests.checkpoints import reference_logits
from tests.quantized_checkpoints import FORMATS, INTEGER, quantize, with_integer_layers


@pytest.mark.parametrize("name", FORMATS)
def test_logits_equal_transformers(name, tmp_path):
    model = quantize(tmp_path, *FORMATS[name])
    if name in INTEGER:
        model = with_integer_layers(model)
    token_ids = torch.randint(0, 208, (40,)).tolist()
    expected = reference_logits(model, token_ids)
    llm = LLM(tmp_path, device="cpu", dtype="float32", max_step_tokens=23)
    torch.testing.assert_close(llm.logits(token_ids), expected, atol=1e-4, rtol=0)
