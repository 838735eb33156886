# SPDX-License-Identifier: Apache-2.0
"""Baseline for benchmarks: transformers on the same weights."""

import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3MoeForCausalLM

from executor.llm import LLM
from executor.loading.device import synchronize
from models.transformers_internals import compute_rope_buffers
from ops import DenseWeight, TransposedWeight

EXPERTS_IMPLEMENTATIONS = ("grouped_mm", "batched_mm")


def transformers_model(llm: LLM) -> Qwen3MoeForCausalLM:
    """Builds transformers' model on views of the LLM's parameters, without a copy."""
    config = llm.config
    dtype = getattr(torch, llm.settings.model_config.dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.eval().requires_grad_(False)
    model.load_state_dict(state_dict(llm), strict=not config.tie_word_embeddings, assign=True)
    model.tie_weights()
    compute_rope_buffers(model, llm.device)
    return model


def state_dict(llm: LLM) -> dict[str, torch.Tensor]:
    """State dict of transformers' model, as views of the LLM's parameters.

    ValueError if they are transposed or quantised.
    """
    kinds = {type(value) for value in llm.parameters.values.values()}
    if TransposedWeight in kinds:
        device = llm.device.type
        raise ValueError(f"--peer: transformers cannot share the weights on device {device}, where they are transposed")
    if not kinds <= {torch.Tensor, DenseWeight}:
        raise ValueError(f"--peer: transformers cannot share quantised weights ({', '.join(llm.parameters.formats())})")
    config = llm.config
    heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
    renamed: dict[str, torch.Tensor] = {}
    for name, value in llm.parameters.values.items():
        tensor = value.data if isinstance(value, DenseWeight) else value
        assert isinstance(tensor, torch.Tensor)
        full_name = name if name.startswith("lm_head") else f"model.{name}"
        if ".qkv_proj." in name:
            parts = tensor.split([count * config.head_dim for count in heads])
            renamed |= {full_name.replace("qkv", p): part for p, part in zip("qkv", parts, strict=True)}
        elif name.endswith("mlp.gate_up_proj.weight"):
            parts = tensor.chunk(2)
            renamed |= {full_name.replace("gate_up", p): part for p, part in zip(("gate", "up"), parts, strict=True)}
        else:
            renamed[full_name] = tensor
    return renamed


class TransformersPeer:
    """Prefill and greedy decode with transformers, in a minimal loop."""

    def __init__(self, llm: LLM):
        self.model = transformers_model(llm)
        self.device = llm.device

    @torch.inference_mode()
    def generate(
        self, prompts: list[list[int]], new_tokens: int, experts_implementation: str
    ) -> tuple[list[list[int]], float, list[float]]:
        """Generates for prompts of equal length; returns token ids, ttft_ms, and the ms of each decode step.

        Prefill always uses grouped_mm: batched_mm copies the weights of every token's experts.
        """
        self.model.set_experts_implementation("grouped_mm")
        cache = DynamicCache(config=self.model.config)
        start_s = time.perf_counter()
        ids = torch.tensor(prompts, device=self.device)
        ids = self.step(ids, cache)
        times_s = [start_s, time.perf_counter()]
        tokens = [ids]
        self.model.set_experts_implementation(experts_implementation)
        for _ in range(new_tokens - 1):
            ids = self.step(ids, cache)
            tokens.append(ids)
            times_s.append(time.perf_counter())
        intervals_ms = [(after - before) * 1e3 for before, after in zip(times_s, times_s[1:], strict=False)]
        return torch.cat(tokens, dim=1).tolist(), intervals_ms[0], intervals_ms[1:]

    def step(self, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        logits = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1].argmax(dim=-1, keepdim=True)
        synchronize(self.device)
        return ids
