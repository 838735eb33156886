# SPDX-License-Identifier: Apache-2.0
"""Qwen3-MoE, after transformers' models/qwen3_moe/modeling_qwen3_moe.py.

T tokens of a step, D hidden size, H query heads, G kv heads, C head dim, V vocabulary.
"""

import torch
from transformers import Qwen3MoeConfig

from models.layers.attention import Attention, KVCache
from models.layers.linear import Linear, NormLinear
from models.layers.mlp import DenseMlp, SparseMoe
from models.layers.parameter import Parameters
from models.layers.rotary import RotaryEmbedding
from models.qwen3_moe.weights import is_sparse_layer
from ops import DenseWeight, Ops, StepMetadata


class DecoderLayer:
    """Attention, then the feed-forward block; `residual` carries the sum of all blocks before."""

    def __init__(self, config: Qwen3MoeConfig, layer_id: int, parameters: Parameters, ops: Ops):
        eps = config.rms_norm_eps
        attention = parameters.within("self_attn")
        self.qkv_proj = NormLinear(
            parameters["input_layernorm.weight"],
            eps,
            attention["qkv_proj.weight"],
            attention["qkv_proj.bias"] if config.attention_bias else None,
            ops,
        )
        self.attention = Attention(attention["q_norm.weight"], attention["k_norm.weight"], eps, ops)
        self.o_proj = Linear(
            attention["o_proj.weight"], attention["o_proj.bias"] if config.attention_bias else None, ops
        )
        build_mlp = build_sparse_moe if is_sparse_layer(config, layer_id) else build_dense_mlp
        self.mlp = build_mlp(config, parameters["post_attention_layernorm.weight"], parameters.within("mlp"), ops)

    def __call__(
        self,
        hidden_states: torch.Tensor,  # [T, D]
        residual: torch.Tensor | None,  # [T, D]
        cos_sin: tuple[torch.Tensor, torch.Tensor],  # [T, C]
        kv_cache: KVCache,
        step: StepMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        qkv, residual = self.qkv_proj(hidden_states, residual)  # [T, (H + 2G) * C]
        hidden_states = self.o_proj(self.attention(qkv, cos_sin, kv_cache, step))
        return self.mlp(hidden_states, residual)


class Qwen3Moe:
    """The network from token ids to logits."""

    def __init__(self, config: Qwen3MoeConfig, parameters: Parameters, rotary: RotaryEmbedding, ops: Ops):
        self.ops = ops
        self.rotary = rotary
        self.embed_tokens = parameters["embed_tokens.weight"]
        self.layers = [
            DecoderLayer(config, layer_id, parameters.within(f"layers.{layer_id}"), ops)
            for layer_id in range(config.num_hidden_layers)
        ]
        lm_head = DenseWeight(self.embed_tokens) if config.tie_word_embeddings else parameters["lm_head.weight"]
        self.lm_head = NormLinear(parameters["norm.weight"], config.rms_norm_eps, lm_head, None, ops)

    def forward(
        self, token_ids: torch.Tensor, step: StepMetadata, kv_caches: list[KVCache]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """token_ids [T] int64 -> the last layer's output and residual [T, D]; `logits` adds and normalises them."""
        hidden_states, residual = self.ops.embedding(token_ids, self.embed_tokens), None
        cos_sin = self.rotary(step)
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            hidden_states, residual = layer(hidden_states, residual, cos_sin, kv_cache, step)
        return hidden_states, residual

    def logits(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """`forward`'s result, all its rows or some [T, D] -> logits [T, V] float32."""
        logits, _ = self.lm_head(hidden_states, residual)
        return logits.float()


def build_dense_mlp(config: Qwen3MoeConfig, norm_weight: torch.Tensor, parameters: Parameters, ops: Ops) -> DenseMlp:
    gate_up_proj = NormLinear(norm_weight, config.rms_norm_eps, parameters["gate_up_proj.weight"], None, ops)
    return DenseMlp(gate_up_proj, Linear(parameters["down_proj.weight"], None, ops), ops)


def build_sparse_moe(config: Qwen3MoeConfig, norm_weight: torch.Tensor, parameters: Parameters, ops: Ops) -> SparseMoe:
    return SparseMoe(
        norm_weight=norm_weight,
        eps=config.rms_norm_eps,
        router_weight=parameters["gate.weight"],
        top_k=config.num_experts_per_tok,
        renormalize=config.norm_topk_prob,
        gate_up_proj=parameters["experts.gate_up_proj"],
        down_proj=parameters["experts.down_proj"],
        ops=ops,
    )
