# SPDX-License-Identifier: Apache-2.0
"""Packing of unsigned 4-bit integers: eight to an int32 word, the first in the lowest bits."""

import torch

PER_WORD = 8


def unpack_int4(words: torch.Tensor) -> torch.Tensor:
    """Unpacks along the last dimension: int32 [..., K / 8] -> uint8 [..., K], values 0 to 15."""
    if words.stride(-1) != 1:  # also where a dimension of 1 makes it count as contiguous
        words = words.clone(memory_format=torch.contiguous_format)
    pairs = words.contiguous().view(torch.uint8)  # little-endian: byte b holds values 2b (low bits) and 2b + 1
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """Packs along the last dimension, a multiple of 8: uint8 [..., K], values 0 to 15 -> int32 [..., K / 8]."""
    pairs = values[..., 0::2] | (values[..., 1::2] << 4)
    return pairs.contiguous().view(torch.int32)
