# SPDX-License-Identifier: Apache-2.0
"""Device memory: loads the weights, then sizes and allocates the KV cache; checks that both fit."""

import heapq
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig

from executor.config import Settings
from executor.engine.kv_cache import block_bytes, cache_tensors
from executor.loading.before_loading import load_scheme
from executor.loading.checkpoint import read_unique_object
from executor.loading.device import free_memory_bytes
from executor.loading.loader import load_parameters, random_bytes, random_parameters
from executor.loading.stored_model import check_tensors
from executor.utils.text import one_line
from models.layers.attention import KVCache
from models.layers.parameter import Parameters
from models.qwen3_moe.sharding import Layout
from models.qwen3_moe.weights import parameter_specs
from ops import Ops
from ops.comm import ParallelContext
from ops.step import BLOCK_SIZE, blocks_for

logger = logging.getLogger(__name__)


def fill_parameters(
    settings: Settings,
    config: Qwen3MoeConfig,
    model_path: Path,
    parallel: ParallelContext,
    dtype: torch.dtype,
    device: torch.device,
    ops: Ops,
) -> Parameters:
    """Loads this rank's weights, or initializes them randomly; ValueError if they do not fit into free memory."""
    specs = parameter_specs(config, Layout.of(parallel))
    file = model_path / "config.json" if model_path.is_dir() else model_path
    scheme = load_scheme(file.parent, read_unique_object(file))
    if not settings.model_config.with_ckpt:
        check_fits(sum(random_bytes(spec, dtype, scheme, ops.dequantizes) for spec in specs), dtype, device)
        parameters = random_parameters(specs, dtype, device, std=config.initializer_range, scheme=scheme)
        logger.info("number formats: %s", ", ".join(parameters.formats()))
        return parameters
    stored = check_tensors(model_path, parameter_specs(config, Layout()), scheme)
    if scheme.method is not None and not stored.formats:
        logger.warning("%s", one_line(f"{model_path}: declared as {scheme.method}, but no tensor is quantised"))
    check_fits(sum(stored.prepared_bytes(spec, dtype, ops.dequantizes) for spec in specs), dtype, device)
    parameters = load_parameters(stored, specs, dtype, device, quiet=parallel.world.index > 0)
    logger.info("number formats: %s", ", ".join(parameters.formats()))
    return parameters


def check_fits(needed: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError if the weights do not fit into free memory."""
    free = free_memory_bytes(device)
    logger.info("weights: %.2f GB in %s, free memory: %.2f GB", needed / 1e9, dtype, free / 1e9)
    if needed > free:
        raise ValueError(
            f"model_path: the weights need {needed / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')}, "
            f"{device} has {free / 1e9:.1f} GB free"
        )


def allocate_cache(
    settings: Settings,
    config: Qwen3MoeConfig,
    max_len: int,
    parallel: ParallelContext,
    dtype: torch.dtype,
    device: torch.device,
    ops: Ops,
    known_lens: Sequence[int] = (),
    fills_memory: bool = False,
) -> tuple[int, list[KVCache]]:
    """Allocates a KV cache of `cache_tokens`, else of `cache_memory_fraction` of the free memory.

    Returns its number of blocks, equal on all ranks, and each layer's (keys, values). max_len: maximum tokens of a
    sequence. known_lens: cached tokens of each sequence that will run, if known; this caps the cache, as does
    batch_size sequences of max_len unless it `fills_memory`. ValueError if it does not fit.
    """
    model = settings.model_config
    num_kv_heads = max(1, config.num_key_value_heads // parallel.attn_tp.size)
    bytes_per_block = block_bytes(config.num_hidden_layers, num_kv_heads, config.head_dim, dtype)
    free = free_memory_bytes(device)
    batch_size = -(-settings.data_config.batch_size // parallel.attn_dp.size)
    usable = blocks_in_use(known_lens, batch_size) if known_lens else batch_size * blocks_for(max_len)
    if model.cache_tokens is not None:
        num_blocks = blocks_for(model.cache_tokens)
        needed = (num_blocks + 1) * bytes_per_block
        if needed > free:
            raise ValueError(
                f"model_config.cache_tokens: {model.cache_tokens} tokens need {needed / 1e9:.1f} GB, "
                f"{device} has {free / 1e9:.1f} GB free"
            )
        num_blocks = min(num_blocks, usable) if known_lens else num_blocks
    else:
        num_blocks = int(free * model.cache_memory_fraction) // bytes_per_block - 1
        num_blocks = num_blocks if fills_memory else min(usable, num_blocks)
    num_blocks = min(parallel.control.all_gather(torch.tensor([num_blocks], device=device)).tolist())
    if num_blocks < 1:
        raise ValueError("model_config.cache_memory_fraction: no memory is left for even one cache block")
    why = ", the maximum that the known prompts can use" if known_lens and num_blocks == usable else ""
    logger.info("cache: %d tokens, %.2f GB%s", num_blocks * BLOCK_SIZE, num_blocks * bytes_per_block / 1e9, why)
    sizes = (config.num_hidden_layers, num_blocks, num_kv_heads, config.head_dim)
    return num_blocks, cache_tensors(*sizes, dtype, device, ops)


def blocks_in_use(lens: Sequence[int], batch_size: int) -> int:
    """Peak number of cache blocks in use by sequences of these lengths, with up to `batch_size` running at a time."""
    return sum(heapq.nlargest(batch_size, map(blocks_for, lens)))
