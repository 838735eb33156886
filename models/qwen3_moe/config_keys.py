# SPDX-License-Identifier: Apache-2.0
"""Keys of a Qwen3-MoE config.json: those that the network reads, with their bounds, and those without effect."""

from typing import Any

from models.transformers_internals import ROPE_PARAMETER_KEYS

# key -> (minimum, maximum). The maxima are far above the published models, to reject absurd values early.
SIZES = {
    "vocab_size": (1, 1 << 22),
    "hidden_size": (1, 1 << 17),
    "intermediate_size": (1, 1 << 20),
    "num_hidden_layers": (1, 1 << 10),
    "num_attention_heads": (1, 1 << 12),
    "num_key_value_heads": (1, 1 << 12),
    "head_dim": (1, 1 << 12),
    "max_position_embeddings": (1, 1 << 24),
    "decoder_sparse_step": (1, 1 << 31),
    "sliding_window": (1, 1 << 31),
    "moe_intermediate_size": (0, 1 << 20),  # 0 only without experts
    "num_experts_per_tok": (0, 1 << 14),
    "num_experts": (0, 1 << 14),
    "num_local_experts": (0, 1 << 14),  # another name of num_experts
}
FLAGS = ("attention_bias", "norm_topk_prob", "tie_word_embeddings", "use_sliding_window")
TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
NETWORK_KEYS = (
    *SIZES,
    *FLAGS,
    *TOKEN_KEYS,
    "initializer_range",
    "mlp_only_layers",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rms_norm_eps",
    "rope_theta",
)
# Union over all rope types, with both names of the type key and yarn's undocumented keys.
ROPE_KEYS = {"type", "mscale", "mscale_all_dim", "truncate", *ROPE_PARAMETER_KEYS}
# Keys that are validated against what the network implements, or parsed elsewhere.
CHECKED_KEYS = (
    *("add_cross_attention", "architectures", "compression_config", "dual_chunk_attention_config", "hidden_act"),
    *("is_encoder_decoder", "layer_types", "model_type", "per_layer_config", "pruned_heads", "quantization_config"),
    *("rope_parameters", "rope_scaling", "transformers_weights"),
)
# Keys for training, other tasks, execution options and metadata; transformers' network does not read them either.
HARMLESS_KEYS = (
    *("_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_experts_implementation"),
    *("_name_or_path", "attention_dropout", "attn_implementation", "chunk_size_feed_forward", "dtype"),
    *("experts_implementation", "finetuning_task", "id2label", "is_decoder", "label2id", "max_window_layers"),
    *("name_or_path", "num_labels", "output_attentions", "output_hidden_states", "output_router_logits", "prefix"),
    *("problem_type", "return_dict", "router_aux_loss_coef", "task_specific_params", "tf_legacy_loss"),
    *("tie_encoder_decoder", "tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "use_bfloat16"),
    "use_cache",
)
KNOWN_KEYS = {*NETWORK_KEYS, *CHECKED_KEYS, *HARMLESS_KEYS}


def ignored_keys(raw: dict[str, Any]) -> list[str]:
    """Keys of a valid config.json that have no effect; transformers does not read them for this network either."""
    ignored = sorted(key for key in raw if key not in KNOWN_KEYS)
    rope_key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    ignored += sorted(f"{rope_key}.{key}" for key in raw.get(rope_key) or () if key not in ROPE_KEYS)
    if rope_key == "rope_scaling" and raw.get("rope_parameters") not in (None, {}, raw["rope_scaling"]):
        ignored.append("rope_parameters (beside rope_scaling)")
    return ignored
