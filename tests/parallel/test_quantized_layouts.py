# SPDX-License-Identifier: Apache-2.0
"""Every layout of a quantised model equals one rank, also where a split cuts groups and blocks."""

from pathlib import Path

import torch

from executor import LLM
from tests.parallel.ranks import run_ranks, settings_of
from tests.quantized_checkpoints import AWQ, CONFIG, FP8, awq, fp8, gptq, int8, packed, quantize, quantize_static

# attn_tp, moe_tp, embed_tp, lmhead_tp: 4-bit groups of 32 and FP8 blocks of 24 x 40 become smaller in the first two
LAYOUTS = [(4, 4, 4, 4), (2, 2, 1, 4), (4, 1, 4, 1), (1, 4, 1, 1)]
FP8_BLOCK = (24, 40)  # cuts heads, and is partial at the edges of every matrix


def write_checkpoints(folder: Path) -> list[str]:
    fp8_config = {**FP8, "weight_block_size": list(FP8_BLOCK)}
    gptq_config = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}
    packed_config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    activations = {"num_bits": 8, "strategy": "token", "dynamic": True}
    group8 = {**group, "weights": {"num_bits": 8, "strategy": "channel"}, "input_activations": activations}
    quantize(folder / "awq", lambda matrix: awq(matrix, 32), AWQ)
    quantize(folder / "gptq", lambda matrix: gptq(matrix, 32), gptq_config)
    quantize(folder / "w4a16", lambda matrix: packed(matrix, 32, False), packed_config)
    quantize(folder / "fp8", lambda matrix: fp8(matrix, FP8_BLOCK), fp8_config)
    quantize(folder / "w8a8", int8, {**packed_config, "config_groups": {"group_0": group8}})
    quantize_static(folder / "modelslim", as_bits=False)
    return sorted(str(path) for path in folder.iterdir())


def all_logits(folders: list[str], token_ids: list[int], all_settings: list) -> list[list[torch.Tensor]]:
    """Logits of every checkpoint in every layout."""
    return [
        [LLM(folder, device="cpu", dtype="float32", **settings).logits(token_ids) for settings in all_settings]
        for folder in folders
    ]


def test_layouts_equal_one_process(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    folders = write_checkpoints(tmp_path / "checkpoints")
    token_ids = torch.randint(0, CONFIG["vocab_size"], (50,)).tolist()
    expected = all_logits(folders, token_ids, [{}])
    all_settings = [settings_of(layout, 4) for layout in LAYOUTS]
    all_settings[0]["sequence_parallel"] = True
    for rank, found in enumerate(run_ranks(4, all_logits, tmp_path, folders, token_ids, all_settings)):
        for folder, [alone], of_layouts in zip(folders, expected, found, strict=True):
            for layout, logits in zip(LAYOUTS, of_layouts, strict=True):
                errors = (logits - alone).abs().amax(-1)
                # an activation between two whole numbers may be rounded to the other one: few tokens then differ
                is_integer = Path(folder).name in ("w8a8", "modelslim")
                where = f"rank {rank}, {folder}, layout {layout}: {errors}"
                assert (errors.quantile(0.75) if is_integer else errors.max()) < 1e-4, where
                assert errors.max() < 0.05 * alone.std(), where
