# SPDX-License-Identifier: Apache-2.0
"""Sharding table of Qwen3-MoE's tensors, and the parallel layouts that a config allows."""

import re
from dataclasses import dataclass

from transformers import Qwen3MoeConfig

from ops.comm import ParallelContext

# (checkpoint name, sharded dimension, group); tensors not listed are replicated
SHARDING = (
    (r"model\.embed_tokens\.weight", 0, "embed_tp"),
    (r"lm_head\.weight", 0, "lmhead_tp"),
    (r".*\.self_attn\.[qkv]_proj\.(weight|bias)", 0, "attn_tp"),
    (r".*\.self_attn\.o_proj\.weight", 1, "attn_tp"),
    (r".*\.mlp\.(gate|up)_proj\.weight", 0, "attn_tp"),
    (r".*\.mlp\.down_proj\.weight", 1, "attn_tp"),
    (r".*\.mlp\.experts\.\d+\.(gate|up)_proj\.weight", 0, "moe_tp"),
    (r".*\.mlp\.experts\.\d+\.down_proj\.weight", 1, "moe_tp"),
)
# experts are distributed over moe_ep (see `Layout.experts`), also those of stacked checkpoints

MAX_WORLD_SIZE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Rank index and size of one rank in each parallel group, which determine its shards."""

    attn_tp: tuple[int, int] = (0, 1)
    moe_tp: tuple[int, int] = (0, 1)
    moe_ep: tuple[int, int] = (0, 1)
    embed_tp: tuple[int, int] = (0, 1)
    lmhead_tp: tuple[int, int] = (0, 1)

    @classmethod
    def of(cls, parallel: ParallelContext) -> "Layout":
        names = ("attn_tp", "moe_tp", "moe_ep", "embed_tp", "lmhead_tp")
        return cls(**{name: (getattr(parallel, name).index, getattr(parallel, name).size) for name in names})

    def part(self, name: str, shape: tuple[int, ...], config: Qwen3MoeConfig) -> tuple[slice, ...]:
        """Slice of checkpoint tensor `name` that this rank holds; () for the whole tensor."""
        for pattern, dimension, group in SHARDING:
            if re.fullmatch(pattern, name):
                index, size = getattr(self, group)
                if re.search(r"\.[kv]_proj\.", name) and config.num_key_value_heads < size:
                    # fewer kv heads than ranks: each kv head is replicated on adjacent ranks
                    index, size = index * config.num_key_value_heads // size, config.num_key_value_heads
                if size == 1:
                    return ()
                length = shape[dimension] // size
                return (slice(None),) * dimension + (slice(index * length, (index + 1) * length),)
        return ()

    def experts(self, config: Qwen3MoeConfig) -> range:
        """Ids of the experts on this rank."""
        index, size = self.moe_ep
        count = config.num_experts // size
        return range(index * count, (index + 1) * count)


def group_of(name: str) -> str:
    """Name of the group over which a checkpoint tensor is sharded."""
    return next(group for pattern, _, group in SHARDING if re.fullmatch(pattern, name))


def check_layout(config: Qwen3MoeConfig, world_size: int, sizes: dict[str, int]) -> None:
    """Validates parallel sizes against the model and world size; raises ValueError that lists the allowed sizes.

    `sizes` has the keys attn_tp_size, moe_tp_size, embed_tp_size, lmhead_tp_size and, where stated, attn_dp_size and
    moe_ep_size, which follow from the others.
    """
    if not 1 <= world_size <= MAX_WORLD_SIZE:
        raise ValueError(f"world_size: {world_size} is impossible, must be from 1 to {MAX_WORLD_SIZE}")
    divisors = [size for size in range(1, world_size + 1) if world_size % size == 0]
    dense_layers = config.num_experts == 0 or config.decoder_sparse_step > 1 or config.mlp_only_layers

    def attn_tp_works(size: int) -> bool:
        kv_heads = config.num_key_value_heads
        return (
            config.num_attention_heads % size == 0
            and (kv_heads % size == 0 or size % kv_heads == 0)
            and not (dense_layers and config.intermediate_size % size)
        )

    def moe_tp_works(size: int) -> bool:
        return config.moe_intermediate_size % size == 0 and config.num_experts % (world_size // size) == 0

    legal = {
        "attn_tp_size": [size for size in divisors if attn_tp_works(size)],
        "moe_tp_size": [size for size in divisors if config.num_experts == 0 or moe_tp_works(size)],
        "embed_tp_size": [size for size in divisors if config.vocab_size % size == 0],
        "lmhead_tp_size": [size for size in divisors if config.vocab_size % size == 0],
    }
    for key, allowed in legal.items():
        if sizes[key] not in allowed:
            raise ValueError(
                f"parallel_config.{key}: {sizes[key]} is impossible for this model and world_size {world_size}, "
                f"possible: {', '.join(map(str, allowed)) or 'none'}"
            )
    derived = {
        "attn_dp_size": ("attn_tp_size", sizes["attn_tp_size"]),
        "moe_ep_size": ("moe_tp_size", sizes["moe_tp_size"]),
    }
    for key, (other, size) in derived.items():
        if key in sizes and sizes[key] != world_size // size:
            raise ValueError(
                f"parallel_config.{key}: {sizes[key]} contradicts world_size {world_size} / {other} {size} "
                f"= {world_size // size}"
            )
    if config.tie_word_embeddings and sizes["embed_tp_size"] != sizes["lmhead_tp_size"]:
        raise ValueError("parallel_config.lmhead_tp_size: must equal embed_tp_size, as this model ties the embeddings")
