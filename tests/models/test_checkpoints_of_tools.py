# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that other tools wrote (tests/quantized/make_fixtures.py) load by what they store."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from executor import LLM
from executor.config import REPOSITORY

FOLDER = REPOSITORY / "tests/quantized"
REFUSED = {"gptqmodel_gptq_desc_act": "GPTQ with act-order (desc_act) is not supported"}
INTEGER = ("llmcompressor_w8a8", "msmodelslim")  # rounded activations may differ in an element
CHECKPOINTS = sorted(file.parent for file in FOLDER.glob("*/config.json"))


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)
def test_logits_equal_those_of_the_tool(folder: Path):
    if folder.name in REFUSED:
        with pytest.raises(ValueError, match="act-order") as error:
            LLM(folder, device="cpu", dtype="float32")
        assert REFUSED[folder.name] in str(error.value)
        return
    expected = load_file(folder / "logits.safetensors")
    found = LLM(folder, device="cpu", dtype="float32").logits(expected["token_ids"].flatten().tolist())
    errors = (found - expected["logits"].view_as(found)).abs().amax(-1)
    is_integer = folder.name.startswith(INTEGER)
    assert (errors.median() if is_integer else errors.max()) < 1e-4, errors
    assert errors.max() < 0.05 * expected["logits"].std()


@pytest.mark.parametrize("keys", [("checkpoint_format", "format"), ()], ids=["two keys", "all of it"])
def test_what_config_json_leaves_out_is_in_quantize_config_json(keys, tmp_path):
    """GPTQ's second layout of zero points, which the tensors do not show."""
    source = FOLDER / "gptqmodel_gptq_v2"
    folder = shutil.copytree(source, tmp_path / "copy")
    raw = json.loads((folder / "config.json").read_text())
    for key in keys:
        raw["quantization_config"].pop(key)
    if not keys:
        raw.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(raw))
    expected = load_file(source / "logits.safetensors")
    found = LLM(folder, device="cpu", dtype="float32").logits(expected["token_ids"].flatten().tolist())
    assert (found - expected["logits"].view_as(found)).abs().max() < 1e-4


def test_every_tool_has_a_checkpoint():
    tools = {folder.name.split("_")[0] for folder in CHECKPOINTS}
    assert {"autoawq", "gptqmodel", "llmcompressor", "msmodelslim"} <= tools
    assert all(
        (torch.isfinite(load_file(folder / "logits.safetensors")["logits"])).all()
        for folder in CHECKPOINTS
        if folder.name not in REFUSED
    )
