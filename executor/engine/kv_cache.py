# SPDX-License-Identifier: Apache-2.0
"""Tensors of the paged KV cache."""

from collections.abc import Iterable
from itertools import chain

import torch

from ops import Ops
from ops.step import BLOCK_SIZE, NULL_BLOCK
from ops.transfer import to_device


def cache_tensors(
    num_layers: int,
    num_blocks: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    ops: Ops,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Allocates keys and values of each layer in the layout of `ops`. The null block is one more than `num_blocks`.

    They are zeros, because a masked position still takes part in attention with weight 0, and 0 times the NaN of stale
    memory is NaN.
    """
    shape = (2, *ops.cache_shape(num_blocks + 1, BLOCK_SIZE, num_kv_heads, head_dim))
    return [tuple(torch.zeros(shape, dtype=dtype, device=device)) for _ in range(num_layers)]


def zero_blocks(kv_caches: list[tuple[torch.Tensor, torch.Tensor]], blocks: Iterable[int]) -> None:
    """Zeroes these blocks and the null block in every layer."""
    index = to_device(torch.tensor(sorted({NULL_BLOCK, *blocks})), kv_caches[0][0].device)
    for cache in chain.from_iterable(kv_caches):
        cache.index_fill_(0, index, 0)


def copy_blocks(kv_caches: list[tuple[torch.Tensor, torch.Tensor]], copies: list[tuple[int, int]]) -> None:
    """Copies blocks (from, to) in every layer."""
    sources, targets = to_device(torch.tensor(copies).T.contiguous(), kv_caches[0][0].device)
    for cache in chain.from_iterable(kv_caches):
        cache.index_copy_(0, targets, cache[sources])


def block_bytes(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values."""
    return num_layers * 2 * BLOCK_SIZE * num_kv_heads * head_dim * dtype.itemsize
