# SPDX-License-Identifier: Apache-2.0
"""Every checkpoint form that transformers loads gives the same logits, or is refused with one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from executor import LLM
from tests.checkpoints import make_checkpoint, make_model, reference_logits, rewrite, unstack

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
INDEX = "model.safetensors.index.json"


def edit_config(folder: Path, **changed) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changed))


def base_model(folder: Path) -> None:
    make_model(tie_word_embeddings=True).model.save_pretrained(folder)


def mixed(folder: Path) -> None:
    """One layer of stacked experts, one of per-expert tensors, and one that mixes both."""
    make_checkpoint(folder, stacked=True)
    names = ("layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj", "layers.2.mlp.experts.down_proj")
    for name in names:
        rewrite(folder, lambda t, name=name: unstack(t, f"model.{name}"))


def head_alone(folder: Path) -> None:
    make_checkpoint(folder, tie_word_embeddings=True)
    rewrite(folder, lambda t: t.update({HEAD: t.pop(EMBEDDING)}))


def head_twice(folder: Path) -> None:
    make_checkpoint(folder, tie_word_embeddings=True)
    rewrite(folder, lambda t: t.update({HEAD: t[EMBEDDING].clone()}))


def old_buffers(folder: Path) -> None:
    make_checkpoint(folder)
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(3)]
    rewrite(folder, lambda t: t.update({name: torch.rand(8) for name in names}))


def single_beside_index(folder: Path) -> None:
    make_checkpoint(folder / "other", seed=1, max_shard_size="100KB")
    shutil.copytree(folder / "other", folder, dirs_exist_ok=True)
    make_checkpoint(folder / "single")
    shutil.copy(folder / "single" / "model.safetensors", folder)


def nested_folder(folder: Path) -> None:
    make_checkpoint(folder, max_shard_size="100KB")
    index = json.loads((folder / INDEX).read_text())
    (folder / "weights").mkdir()
    for name in set(index["weight_map"].values()):
        (folder / name).rename(folder / "weights" / name)
    index["weight_map"] = {key: f"weights/{name}" for key, name in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


def changed_config(**changed):
    def make(folder: Path) -> None:
        make_checkpoint(folder)
        edit_config(folder, **changed)

    return make


FORMS = {
    "stacked": lambda folder: make_checkpoint(folder, stacked=True),
    "stacked_sharded": lambda folder: make_checkpoint(folder, stacked=True, max_shard_size="100KB"),
    "stacked_bias_dense_layer": lambda folder: make_checkpoint(
        folder, stacked=True, attention_bias=True, mlp_only_layers=[1]
    ),
    "mixed": mixed,
    "base_model": base_model,
    "head_alone": head_alone,
    "head_twice": head_twice,
    "old_buffers": old_buffers,
    "single_beside_index": single_beside_index,
    "nested_folder": nested_folder,
    "float64": lambda folder: make_model().double().save_pretrained(folder),
    "architectures_null": changed_config(architectures=None),
    "architectures_empty": changed_config(architectures=[]),
    "swish": changed_config(hidden_act="swish"),
    "torch_dtype": changed_config(torch_dtype="float16"),
    "layer_types": changed_config(layer_types=["full_attention"] * 3),
    "both_rope_spellings": changed_config(
        rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters={"rope_type": "default"}, rope_theta=5e5
    ),
    "original_length_outside_rope": changed_config(
        rope_scaling={"type": "yarn", "factor": 4.0}, original_max_position_embeddings=32
    ),
    "sliding_window_longer_than_the_run": changed_config(use_sliding_window=True, sliding_window=60),
}


@pytest.mark.parametrize("form", FORMS)
def test_logits_equal_what_transformers_loads(form, tmp_path):
    FORMS[form](tmp_path)
    token_ids = torch.randint(0, 211, (50,)).tolist()
    model = Qwen3MoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours = LLM(tmp_path, device="cpu", dtype="float32", input_max_len=50, max_new_tokens=2).logits(token_ids)
    torch.testing.assert_close(ours, reference_logits(model, token_ids), atol=1e-4, rtol=0)


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as error:
        LLM(folder, device="cpu", dtype="float32", input_max_len=50, max_new_tokens=2)
    line = str(error.value)
    assert "\n" not in line and len(line) <= 500
    return line


def test_pickle_files_are_never_read(tmp_path):
    make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert "convert its pytorch_model.bin to safetensors" in refusal(tmp_path)


def test_base_model_without_lm_head_is_refused(tmp_path):
    make_model().model.save_pretrained(tmp_path)
    assert f"1 missing: {HEAD}" in refusal(tmp_path)


def test_stacked_and_per_expert_tensors_of_one_layer_are_refused(tmp_path):
    make_checkpoint(tmp_path, stacked=True)
    name = "model.layers.1.mlp.experts.down_proj"

    def both(tensors):
        stacked = tensors[name].clone()
        unstack(tensors, name)
        tensors[name] = stacked

    rewrite(tmp_path, both)
    assert "10 not expected: model.layers.1.mlp.experts.0.down_proj.weight" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop("model.layers.0.mlp.experts.down_proj"), "10 missing: model.layers.0.mlp.experts.0.down_proj"),
        (
            lambda t: t.update({"model.layers.0.mlp.experts.gate_up_proj": torch.ones(10, 48, 80)}),
            "gate_up_proj is [10, 48, 80] instead of [10, 80, 48]",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.experts.down_proj": torch.ones(9, 48, 40)}),
            "down_proj is [9, 48, 40] instead of [10, 48, 40]",
        ),
        (lambda t: t.update({"norm.weight": torch.ones(48)}), "norm.weight is in the checkpoint under two names"),
    ],
)
def test_stacked_experts_of_wrong_names_or_shapes_are_refused(change, problem, tmp_path):
    make_checkpoint(tmp_path, stacked=True)
    rewrite(tmp_path, change)
    line = refusal(tmp_path)
    assert line.startswith(str(tmp_path)) and problem in line, line


def test_skipped_tensors_are_logged(tmp_path, caplog):
    old_buffers(tmp_path)
    caplog.set_level("INFO")
    LLM(tmp_path, device="cpu", dtype="float32")
    assert "not needed: model.layers.0.self_attn.rotary_emb.inv_freq, model.layers.1." in caplog.text
