# SPDX-License-Identifier: Apache-2.0
"""Writes into the KV cache (op-plugin docs: npu_scatter_pa_kv_cache, npu_scatter_nd_update_).

T tokens, G kv heads, D head width, blocks of `block_size` tokens; slot = block * block_size + offset.
"""

import torch

from tests.npu.emulator.registry import kernel, require, require_contiguous, require_dtype, require_same_dtype

INDEX_DTYPES = (torch.int32, torch.int64)


def _write_nd(name: str, cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
    """rows [T, G, D] into cache [blocks, block_size, G, D]."""
    require(cache.shape[2:] == rows.shape[1:], f"{name} {list(cache.shape)} is not ND for rows {list(rows.shape)}")
    cache.view(-1, *rows.shape[1:])[slots] = rows


def _write_nz(name: str, cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
    """rows [T, G, D] into cache [blocks, G * D / lane, block_size, lane], lane = 32 bytes."""
    tokens, heads, width = rows.shape
    lane = 32 // rows.element_size()
    fits = heads * width % lane == 0 and cache.shape[3] == lane and cache.shape[1] == heads * width // lane
    require(fits, f"{name} {list(cache.shape)} is not NZ for rows {list(rows.shape)}; an ND cache needs 'Norm'")
    block_size = cache.shape[2]
    cache[slots // block_size, :, slots % block_size] = rows.reshape(tokens, -1, lane)


@kernel("npu_scatter_pa_kv_cache", nz=("key_cache", "value_cache"))
def npu_scatter_pa_kv_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache_mode: str | None,
) -> None:
    """Writes key and value [T, G, D] at their slots; the default cache_mode takes NZ caches, None and "Norm" ND ones.

    Slots must be unique and in [0, blocks * block_size): the documentation defines no slot that is skipped.
    """
    require(cache_mode in (None, "Norm", "PA_NZ"), f"cache_mode '{cache_mode}': None, Norm or PA_NZ")
    require(key.dim() == 3 and value.dim() == 3, f"key {list(key.shape)}, value {list(value.shape)}: [T, G, D] here")
    require(key.shape[:2] == value.shape[:2], f"key {list(key.shape)} and value {list(value.shape)} differ")
    require(key_cache.dim() == 4 and value_cache.dim() == 4, "the caches have four dimensions")
    require_same_dtype(key=key, value=value, key_cache=key_cache, value_cache=value_cache)
    require_contiguous(key=key, value=value, key_cache=key_cache, value_cache=value_cache, slot_mapping=slot_mapping)
    require_dtype("slot_mapping", slot_mapping, INDEX_DTYPES)
    fits = slot_mapping.dim() == 1 and len(slot_mapping) == len(key)
    require(fits, f"slot_mapping {list(slot_mapping.shape)} for {len(key)} tokens")
    slots = slot_mapping.long()
    block_size = key_cache.shape[2] if cache_mode == "PA_NZ" else key_cache.shape[1]
    require(len(slots.unique()) == len(slots), "slot_mapping has a slot twice")
    in_range = bool(((slots >= 0) & (slots < len(key_cache) * block_size)).all())
    require(in_range, f"slot_mapping leaves [0, {len(key_cache) * block_size})")
    write = _write_nz if cache_mode == "PA_NZ" else _write_nd
    write("key_cache", key_cache, key, slots)
    write("value_cache", value_cache, value, slots)


@kernel("npu_scatter_nd_update_")
def npu_scatter_nd_update_(input: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
    """input[indices] = updates; the last dimension of indices addresses the first dimensions of input."""
    require_same_dtype(input=input, updates=updates)
    require_dtype("indices", indices, INDEX_DTYPES)
    require(indices.dim() >= 2, f"indices {list(indices.shape)}: at least two dimensions")
    depth = indices.shape[-1]
    require(0 < depth <= input.dim(), f"indices address {depth} of {input.dim()} dimensions")
    want = (*indices.shape[:-1], *input.shape[depth:])
    require(tuple(updates.shape) == want, f"updates {list(updates.shape)}, not {list(want)}")
    sizes = torch.tensor(input.shape[:depth])
    require(bool(((indices >= 0) & (indices < sizes)).all()), f"an index leaves {list(input.shape[:depth])}")
    input[tuple(indices.long().unbind(-1))] = updates
    return input
