# SPDX-License-Identifier: Apache-2.0
"""Small random checkpoints written by transformers, the reference of the tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

TINY = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 10,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "max_position_embeddings": 512,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}


def make_model(seed: int = 0, **config: Any) -> Qwen3MoeForCausalLM:
    """Random float32 model, including norm weights and biases."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**TINY, **config})).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.5 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.3)
    return model


def make_checkpoint(
    folder: Path, seed: int = 0, max_shard_size: str = "1GB", stacked: bool = False, **config: Any
) -> Qwen3MoeForCausalLM:
    """Saves `make_model` as a checkpoint in `folder` and returns it; `stacked`: experts as one tensor per layer."""
    model = make_model(seed, **config)
    model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=not stacked)
    return model


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrites the single file after `change` has edited its dict of tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def unstack(tensors: dict[str, torch.Tensor], name: str) -> None:
    """Replaces a tensor of stacked experts, `...experts.gate_up_proj` or `...experts.down_proj`, by one per expert."""
    prefix, _, kind = name.rpartition(".")
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    for expert, matrix in enumerate(tensors.pop(name)):
        for part, rows in zip(parts, matrix.chunk(len(parts)), strict=True):
            tensors[f"{prefix}.{expert}.{part}.weight"] = rows.clone()


def rounded(model: Qwen3MoeForCausalLM, dtype: torch.dtype) -> Qwen3MoeForCausalLM:
    """Rounds the weights to `dtype`. Its rotary frequencies stay exact: `model.to` would round them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return model


@torch.no_grad()
def reference_logits(model: Qwen3MoeForCausalLM, token_ids: list[int]) -> torch.Tensor:
    """transformers' logits [T, V] float32 of one sequence."""
    return model(torch.tensor([token_ids], device=model.device)).logits[0].float()
