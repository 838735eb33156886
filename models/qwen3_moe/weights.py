# SPDX-License-Identifier: Apache-2.0
"""Qwen3-MoE's parameters and the checkpoint tensors they are made of: q, k and v merged, gate and up merged,
experts stacked. Names on the right are those of the published checkpoints."""

from transformers import Qwen3MoeConfig

from models.layers.parameter import ParameterSpec, Role, Source


def is_sparse_layer(config: Qwen3MoeConfig, layer_id: int) -> bool:
    """Whether a layer's feed-forward block is a mixture of experts (the rule of transformers' decoder layer)."""
    return (
        layer_id not in config.mlp_only_layers
        and config.num_experts > 0
        and (layer_id + 1) % config.decoder_sparse_step == 0
    )


def parameter_specs(config: Qwen3MoeConfig) -> list[ParameterSpec]:
    """All parameters of a model, in the order of its layers."""
    vocabulary = (config.vocab_size, config.hidden_size)
    specs = [plain("embed_tokens.weight", "model.embed_tokens.weight", vocabulary, Role.TABLE)]
    for layer_id in range(config.num_hidden_layers):
        specs += layer_specs(config, layer_id)
    specs.append(plain("norm.weight", "model.norm.weight", (config.hidden_size,), Role.NORM))
    if not config.tie_word_embeddings:
        specs.append(plain("lm_head.weight", "lm_head.weight", vocabulary, Role.MATRIX))
    return specs


def layer_specs(config: Qwen3MoeConfig, layer_id: int) -> list[ParameterSpec]:
    ours, theirs = f"layers.{layer_id}", f"model.layers.{layer_id}"
    hidden, head_dim = config.hidden_size, config.head_dim
    q_rows, kv_rows = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    q_k_v = {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows}
    attention = "self_attn"
    specs = [
        plain(f"{ours}.{norm}.weight", f"{theirs}.{norm}.weight", (size,), Role.NORM)
        for norm, size in (
            ("input_layernorm", hidden),
            ("post_attention_layernorm", hidden),
            (f"{attention}.q_norm", head_dim),
            (f"{attention}.k_norm", head_dim),
        )
    ]
    specs.append(merged(f"{ours}.{attention}.qkv_proj.weight", f"{theirs}.{attention}.%s.weight", q_k_v, hidden))
    o_proj = f"{attention}.o_proj"
    specs.append(plain(f"{ours}.{o_proj}.weight", f"{theirs}.{o_proj}.weight", (hidden, q_rows), Role.MATRIX))
    if config.attention_bias:
        specs.append(merged(f"{ours}.{attention}.qkv_proj.bias", f"{theirs}.{attention}.%s.bias", q_k_v))
        specs.append(plain(f"{ours}.{o_proj}.bias", f"{theirs}.{o_proj}.bias", (hidden,), Role.BIAS))
    mlp_specs = sparse_moe_specs if is_sparse_layer(config, layer_id) else dense_mlp_specs
    return specs + mlp_specs(config, f"{ours}.mlp", f"{theirs}.mlp")


def dense_mlp_specs(config: Qwen3MoeConfig, ours: str, theirs: str) -> list[ParameterSpec]:
    hidden, width = config.hidden_size, config.intermediate_size
    gate_up = {"gate_proj": width, "up_proj": width}
    return [
        merged(f"{ours}.gate_up_proj.weight", f"{theirs}.%s.weight", gate_up, hidden),
        plain(f"{ours}.down_proj.weight", f"{theirs}.down_proj.weight", (hidden, width), Role.MATRIX),
    ]


def sparse_moe_specs(config: Qwen3MoeConfig, ours: str, theirs: str) -> list[ParameterSpec]:
    experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
    gate_up = [
        Source(f"{theirs}.experts.{expert}.{name}.weight", (expert, rows), (width, hidden))
        for expert in range(experts)
        for name, rows in (("gate_proj", slice(0, width)), ("up_proj", slice(width, 2 * width)))
    ]
    down = [
        Source(f"{theirs}.experts.{expert}.down_proj.weight", (expert,), (hidden, width)) for expert in range(experts)
    ]
    return [
        plain(f"{ours}.gate.weight", f"{theirs}.gate.weight", (experts, hidden), Role.TABLE),
        ParameterSpec(f"{ours}.experts.gate_up_proj", (experts, 2 * width, hidden), Role.MATRIX, tuple(gate_up)),
        ParameterSpec(f"{ours}.experts.down_proj", (experts, hidden, width), Role.MATRIX, tuple(down)),
    ]


def plain(name: str, source: str, shape: tuple[int, ...], role: Role) -> ParameterSpec:
    """A parameter that is one tensor of the checkpoint."""
    return ParameterSpec(name, shape, role, (Source(source, (), shape),))


def merged(name: str, source: str, rows: dict[str, int], columns: int | None = None) -> ParameterSpec:
    """Checkpoint tensors one below the other; `source` has %s where the keys of `rows` go; biases have no columns."""
    tail = () if columns is None else (columns,)
    sources, start = [], 0
    for part, count in rows.items():
        sources.append(Source(source % part, (slice(start, start + count),), (count, *tail)))
        start += count
    return ParameterSpec(name, (start, *tail), Role.BIAS if columns is None else Role.MATRIX, tuple(sources))
