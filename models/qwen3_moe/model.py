# SPDX-License-Identifier: Apache-2.0
"""Qwen3-MoE model definition, after transformers' models/qwen3_moe/modeling_qwen3_moe.py.

T tokens of a step, D hidden size, H query heads, G kv heads, C head dim, R rows whose logits are computed. Under
tensor parallelism H and G count the heads of this rank.
"""

from dataclasses import dataclass

import torch
from transformers import Qwen3MoeConfig

from models.layers.attention import Attention, KVCache
from models.layers.embedding import Embedding
from models.layers.expert_exchange import ExpertExchange
from models.layers.linear import NormLinear, RowLinear
from models.layers.lm_head import LmHead, ShardedLogits
from models.layers.mlp import DenseMlp, SparseMoe
from models.layers.padding import pad_rows, share_of
from models.layers.parameter import Parameters
from models.layers.rotary import RotaryEmbedding
from models.qwen3_moe.weights import is_sparse_layer
from ops import DenseWeight, Ops, StepMetadata
from ops.comm import ParallelContext


@dataclass(frozen=True, kw_only=True)
class Building:
    """Build context of the layers: config, backend, parallel groups and expert exchanges."""

    config: Qwen3MoeConfig
    ops: Ops
    parallel: ParallelContext
    decode_exchange: ExpertExchange
    prefill_exchange: ExpertExchange


class DecoderLayer:
    """Attention and feed-forward block; `residual` is the residual stream before `hidden_states` is added to it."""

    def __init__(self, build: Building, layer_id: int, parameters: Parameters):
        config, ops, eps = build.config, build.ops, build.config.rms_norm_eps
        attention = parameters.within("self_attn")
        qkv_bias, o_bias = (
            (attention["qkv_proj.bias"], attention["o_proj.bias"]) if config.attention_bias else (None, None)
        )
        self.qkv_proj = NormLinear(
            parameters["input_layernorm.weight"],
            eps,
            attention["qkv_proj.weight"],
            qkv_bias,
            build.parallel.attn_tp,
            ops,
        )
        self.attention = Attention(attention["q_norm.weight"], attention["k_norm.weight"], eps, ops)
        self.o_proj = RowLinear(attention["o_proj.weight"], o_bias, build.parallel.attn_tp, ops)
        build_mlp = build_sparse_moe if is_sparse_layer(config, layer_id) else build_dense_mlp
        self.mlp = build_mlp(build, parameters["post_attention_layernorm.weight"], parameters.within("mlp"))

    def __call__(
        self,
        hidden_states: torch.Tensor,  # [T, D]
        residual: torch.Tensor | None,  # [T, D]
        cos_sin: tuple[torch.Tensor, torch.Tensor],  # [T, C]
        kv_cache: KVCache,
        step: StepMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        qkv, residual = self.qkv_proj(hidden_states, residual, step)  # [T, (H + 2G) * C]
        hidden_states = self.o_proj(self.attention(qkv, cos_sin, kv_cache, step), step)
        return self.mlp(hidden_states, residual, step)


class Qwen3Moe:
    """Qwen3-MoE decoder-only model, this rank's shard: token ids to hidden states, and hidden states to logits."""

    def __init__(self, build: Building, parameters: Parameters, rotary: RotaryEmbedding):
        config, ops, parallel = build.config, build.ops, build.parallel
        table = parameters["embed_tokens.weight"]
        self.embed_tokens = Embedding(table, parallel.embed_tp, parallel.holds_same_tokens(parallel.embed_tp), ops)
        self.rotary = rotary
        self.layers = [
            DecoderLayer(build, layer_id, parameters.within(f"layers.{layer_id}"))
            for layer_id in range(config.num_hidden_layers)
        ]
        head = DenseWeight(table) if config.tie_word_embeddings else parameters["lm_head.weight"]
        same_tokens = parallel.holds_same_tokens(parallel.lmhead_tp)
        self.lm_head = LmHead(
            parameters["norm.weight"], config.rms_norm_eps, head, parallel.lmhead_tp, same_tokens, ops
        )
        self.attn_tp = parallel.attn_tp
        self.decode_exchange = build.decode_exchange
        self.ops = ops

    def forward(
        self, token_ids: torch.Tensor, step: StepMetadata, kv_caches: list[KVCache]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs all layers: token_ids [T] int64 -> hidden_states and residual [T, D], not yet added and normalised."""
        hidden_states, residual = self.embed_tokens(token_ids, step), None
        cos_sin, step = self.ops.prepare_attention(self.rotary(step), step, hidden_states.dtype)
        if step.is_decode:
            self.decode_exchange.begin(step)
        if step.sequence_parallel:
            share = share_of(step.num_tokens, self.attn_tp.size)
            hidden_states = pad_rows(hidden_states, share * self.attn_tp.size)
            hidden_states = hidden_states[self.attn_tp.index * share : (self.attn_tp.index + 1) * share]
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            hidden_states, residual = layer(hidden_states, residual, cos_sin, kv_cache, step)
        if step.sequence_parallel:
            hidden_states, residual = (
                self.attn_tp.all_gather(part)[: step.num_tokens] for part in (hidden_states, residual)
            )
        return hidden_states, residual

    def logits(self, hidden_states: torch.Tensor, residual: torch.Tensor, max_rows: int) -> ShardedLogits:
        """Computes float32 logits of rows [R, D] of `forward`'s result; max_rows: the largest R of any rank."""
        return self.lm_head(hidden_states, residual, max_rows)


def build_dense_mlp(build: Building, norm_weight: torch.Tensor, parameters: Parameters) -> DenseMlp:
    ops = build.ops
    eps, attn_tp = build.config.rms_norm_eps, build.parallel.attn_tp
    gate_up_proj = NormLinear(norm_weight, eps, parameters["gate_up_proj.weight"], None, attn_tp, ops)
    down_proj = RowLinear(parameters["down_proj.weight"], None, attn_tp, ops)
    return DenseMlp(gate_up_proj, down_proj, ops)


def build_sparse_moe(build: Building, norm_weight: torch.Tensor, parameters: Parameters) -> SparseMoe:
    return SparseMoe(
        norm_weight=norm_weight,
        eps=build.config.rms_norm_eps,
        router_weight=parameters["gate.weight"],
        top_k=build.config.num_experts_per_tok,
        renormalize=build.config.norm_topk_prob,
        gate_up_proj=parameters["experts.gate_up_proj"],
        down_proj=parameters["experts.down_proj"].with_columns_over(build.parallel.moe_tp),
        decode_exchange=build.decode_exchange,
        prefill_exchange=build.prefill_exchange,
        ops=build.ops,
    )
