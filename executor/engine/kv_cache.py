# SPDX-License-Identifier: Apache-2.0
"""The paged cache of keys and values: fixed blocks, handed out to sequences as they come."""

from itertools import chain

import torch

BLOCK_SIZE = 128  # tokens a block; fits the paged attention of every backend
NULL_BLOCK = 0  # belongs to nobody: padding rows of a captured step write here, unused table entries point here


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // BLOCK_SIZE)


class BlockAllocator:
    """Which blocks of a cache are free."""

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self.free_blocks = list(range(num_blocks, NULL_BLOCK, -1))  # popped from the end: low numbers first

    def allocate(self, num_tokens: int) -> list[int] | None:
        """Blocks for `num_tokens` tokens, or None if there are not enough free ones."""
        count = blocks_for(num_tokens)
        if count > len(self.free_blocks):
            return None
        return [self.free_blocks.pop() for _ in range(count)]

    def free(self, blocks: list[int]) -> None:
        """Gives blocks back."""
        self.free_blocks.extend(reversed(blocks))


def cache_tensors(
    num_layers: int, num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer, [num_blocks + 1, BLOCK_SIZE, G, C]: the null block is one more.

    They start as zeros, because a masked position still takes part in attention with weight 0, and 0 times the NaN of
    stale memory is NaN.
    """
    shape = (2, num_blocks + 1, BLOCK_SIZE, num_kv_heads, head_dim)
    return [tuple(torch.zeros(shape, dtype=dtype, device=device)) for _ in range(num_layers)]


def zero_blocks(kv_caches: list[tuple[torch.Tensor, torch.Tensor]], blocks: list[int]) -> None:
    """Makes these blocks, and the null block, what they were at the start, in every layer."""
    index = torch.tensor(sorted({NULL_BLOCK, *blocks}), device=kv_caches[0][0].device)
    for cache in chain.from_iterable(kv_caches):
        cache.index_fill_(0, index, 0)


def block_bytes(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values."""
    return num_layers * 2 * BLOCK_SIZE * num_kv_heads * head_dim * dtype.itemsize
