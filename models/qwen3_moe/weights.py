# SPDX-License-Identifier: Apache-2.0
"""Mapping of checkpoint tensors to Qwen3-MoE's parameters: q, k and v merged, gate and up merged, experts stacked.

Checkpoint names are those of the published checkpoints, and of those that transformers writes with
`save_original_format=False`, where the experts of a layer are already stacked.
"""

import re
from collections.abc import Collection

from transformers import Qwen3MoeConfig

from models.layers.parameter import ParameterSpec, Role, Source
from models.qwen3_moe.sharding import Layout

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NOT_A_WEIGHT = re.compile(r"(.*\.)?rotary_emb\.inv_freq")  # buffer stored in old checkpoints; computed from the config


def is_sparse_layer(config: Qwen3MoeConfig, layer_id: int) -> bool:
    """Whether a layer is an MoE layer rather than a dense one (the rule of transformers' decoder layer)."""
    return (
        layer_id not in config.mlp_only_layers
        and config.num_experts > 0
        and (layer_id + 1) % config.decoder_sparse_step == 0
    )


def name_in_model(stored_name: str, modules: Collection[str]) -> str:
    """Maps a checkpoint tensor's name to the model's: checkpoints of the base model lack the prefix "model."."""
    module = stored_name.rpartition(".")[0]
    lacks_prefix = module not in modules and f"model.{module}" in modules
    return f"model.{stored_name}" if lacks_prefix else stored_name


def parameter_specs(config: Qwen3MoeConfig, layout: Layout) -> list[ParameterSpec]:
    """Specifications of all parameters of one rank, in layer order."""
    return SpecBuilder(config, layout).all()


class SpecBuilder:
    """Builds the parameter specifications of one rank."""

    def __init__(self, config: Qwen3MoeConfig, layout: Layout):
        self.config = config
        self.layout = layout

    def all(self) -> list[ParameterSpec]:
        config = self.config
        vocabulary = (config.vocab_size, config.hidden_size)
        specs = [self.plain("embed_tokens.weight", EMBEDDING, vocabulary, Role.TABLE)]
        for layer_id in range(config.num_hidden_layers):
            specs += self.layer(layer_id)
        specs.append(self.plain("norm.weight", "model.norm.weight", (config.hidden_size,), Role.NORM))
        if not config.tie_word_embeddings:
            specs.append(self.plain("lm_head.weight", HEAD, vocabulary, Role.MATRIX))
        return specs

    def layer(self, layer_id: int) -> list[ParameterSpec]:
        config = self.config
        ours, theirs = f"layers.{layer_id}", f"model.layers.{layer_id}"
        hidden, head_dim = config.hidden_size, config.head_dim
        q_rows, kv_rows = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        q_k_v = {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows}
        norms = {
            "input_layernorm": hidden,
            "post_attention_layernorm": hidden,
            "self_attn.q_norm": head_dim,
            "self_attn.k_norm": head_dim,
        }
        specs = [
            self.plain(f"{ours}.{name}.weight", f"{theirs}.{name}.weight", (size,), Role.NORM)
            for name, size in norms.items()
        ]
        ours_attn, theirs_attn = f"{ours}.self_attn", f"{theirs}.self_attn"
        specs += [
            self.merged(f"{ours_attn}.qkv_proj.weight", f"{theirs_attn}.%s.weight", q_k_v, hidden),
            self.plain(f"{ours_attn}.o_proj.weight", f"{theirs_attn}.o_proj.weight", (hidden, q_rows), Role.MATRIX),
        ]
        if config.attention_bias:
            specs += [
                self.merged(f"{ours_attn}.qkv_proj.bias", f"{theirs_attn}.%s.bias", q_k_v),
                self.plain(f"{ours_attn}.o_proj.bias", f"{theirs_attn}.o_proj.bias", (hidden,), Role.BIAS),
            ]
        mlp = self.sparse_moe if is_sparse_layer(config, layer_id) else self.dense_mlp
        return specs + mlp(f"{ours}.mlp", f"{theirs}.mlp")

    def dense_mlp(self, ours: str, theirs: str) -> list[ParameterSpec]:
        hidden, width = self.config.hidden_size, self.config.intermediate_size
        gate_up = {"gate_proj": width, "up_proj": width}
        return [
            self.merged(f"{ours}.gate_up_proj.weight", f"{theirs}.%s.weight", gate_up, hidden),
            self.plain(f"{ours}.down_proj.weight", f"{theirs}.down_proj.weight", (hidden, width), Role.MATRIX),
        ]

    def sparse_moe(self, ours: str, theirs: str) -> list[ParameterSpec]:
        config = self.config
        hidden, full_width = config.hidden_size, config.moe_intermediate_size
        experts, width = self.layout.experts(config), full_width // self.layout.moe_tp[1]
        gate_up = [
            self.source(
                f"{theirs}.experts.{expert}.{name}.weight", (full_width, hidden), (expert - experts.start, rows)
            )
            for expert in experts
            for name, rows in (("gate_proj", slice(0, width)), ("up_proj", slice(width, 2 * width)))
        ]
        down = [
            self.source(f"{theirs}.experts.{expert}.down_proj.weight", (hidden, full_width), (expert - experts.start,))
            for expert in experts
        ]
        count = len(experts)
        gate_up_shape, down_shape = (count, 2 * width, hidden), (count, hidden, width)
        gate_up_stacked, down_stacked = self.stacked_experts(f"{theirs}.experts", gate_up[0], down[0])
        return [
            self.plain(f"{ours}.gate.weight", f"{theirs}.gate.weight", (config.num_experts, hidden), Role.TABLE),
            ParameterSpec(f"{ours}.experts.gate_up_proj", gate_up_shape, Role.MATRIX, tuple(gate_up), gate_up_stacked),
            ParameterSpec(f"{ours}.experts.down_proj", down_shape, Role.MATRIX, tuple(down), down_stacked),
        ]

    def stacked_experts(self, theirs: str, gate: Source, down: Source) -> tuple[tuple[Source, ...], tuple[Source, ...]]:
        """Sources in a checkpoint's stacked tensors [E, 2F, D] and [E, D, F]; `gate`, `down`: sources of one expert."""
        full_width, hidden = gate.shape
        held = self.layout.experts(self.config)
        experts = slice(held.start, held.stop)
        rows = gate.part[0] if gate.part else slice(0, full_width)
        width = rows.stop - rows.start
        gate_up = tuple(
            Source(
                f"{theirs}.gate_up_proj",
                (self.config.num_experts, 2 * full_width, hidden),
                (experts, slice(half * full_width + rows.start, half * full_width + rows.stop)),
                (slice(None), slice(half * width, (half + 1) * width)),
            )
            for half in (0, 1)
        )
        down_shape = (self.config.num_experts, hidden, full_width)
        return gate_up, (Source(f"{theirs}.down_proj", down_shape, (experts, *down.part), ()),)

    def source(self, name: str, shape: tuple[int, ...], region: tuple[int | slice, ...]) -> Source:
        return Source(name, shape, self.layout.part(name, shape, self.config), region)

    def plain(self, name: str, source: str, shape: tuple[int, ...], role: Role) -> ParameterSpec:
        """Specification of a parameter that is this rank's shard of one checkpoint tensor."""
        one = self.source(source, shape, ())
        return ParameterSpec(name, part_shape(one), role, (one,))

    def merged(self, name: str, source: str, rows: dict[str, int], columns: int | None = None) -> ParameterSpec:
        """Specification of tensors concatenated along dimension 0; `source`: name with %s for each key of `rows`."""
        tail = () if columns is None else (columns,)
        sources, start = [], 0
        for key, count in rows.items():
            one = self.source(source % key, (count, *tail), ())
            held = part_shape(one)[0]
            sources.append(Source(one.name, one.shape, one.part, (slice(start, start + held),)))
            start += held
        return ParameterSpec(name, (start, *tail), Role.BIAS if columns is None else Role.MATRIX, tuple(sources))


def part_shape(source: Source) -> tuple[int, ...]:
    """Shape of the slice of a checkpoint tensor that this rank reads."""
    parts = (*source.part, *(slice(None),) * (len(source.shape) - len(source.part)))
    return tuple(len(range(*part.indices(size))) for part, size in zip(parts, source.shape, strict=True))
