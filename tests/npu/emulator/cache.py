# SPDX-License-Identifier: Apache-2.0
"""Writes into the KV cache (op-plugin docs: npu_scatter_pa_kv_cache, npu_scatter_nd_update_; for the operation that
also norms and rotates, aclnnQkvRmsNormRopeCache of ops-transformer).

T tokens, G kv heads, D head width, blocks of `block_size` tokens; slot = block * block_size + offset.
"""

import torch

from tests.npu.emulator.norms import rms_norm, rotate_half
from tests.npu.emulator.registry import (
    HALVES,
    kernel,
    require,
    require_contiguous,
    require_dtype,
    require_not_empty,
    require_same_dtype,
    require_shape,
)

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


@kernel("npu_qkv_rms_norm_rope_cache")
def npu_qkv_rms_norm_rope_cache(
    qkv: torch.Tensor,
    q_gamma: torch.Tensor,
    k_gamma: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    index: torch.Tensor,
    q_out: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    qkv_size: list[int],
    head_nums: list[int],
    epsilon: float,
    cache_mode: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normed and rotated q into q_out [B * S, N * D], k and v into the NZ caches at index [B * S]; -1 is skipped.

    The results before quantisation are not returned: "not output" in the documentation's table.
    """
    batch, length, heads, width = qkv_size
    num_heads, num_kv_heads, num_values = head_nums
    tokens = batch * length
    require_dtype("qkv", qkv, HALVES)
    require_same_dtype(qkv=qkv, q_gamma=q_gamma, k_gamma=k_gamma, cos=cos, sin=sin, q_out=q_out)
    require_same_dtype(qkv=qkv, k_cache=k_cache, v_cache=v_cache)  # int8 caches have no emulation
    require_contiguous(qkv=qkv, q_out=q_out, k_cache=k_cache, v_cache=v_cache)
    require_not_empty(qkv=qkv, k_cache=k_cache, v_cache=v_cache)
    require(cache_mode == "PA_NZ", f"cache_mode '{cache_mode}': only PA_NZ")
    require(width == 128, f"head width {width}: only 128")
    require(num_kv_heads == num_values, f"{num_kv_heads} key heads, {num_values} value heads")
    require(heads == num_heads + 2 * num_kv_heads, f"qkv_size {qkv_size} and head_nums {head_nums} disagree")
    require(num_heads % num_kv_heads == 0, f"{num_heads} query heads are no multiple of {num_kv_heads}")
    require_shape("qkv", qkv, tokens, heads * width)
    require_shape("q_out", q_out, tokens, num_heads * width)
    for name, tensor in (("cos", cos), ("sin", sin)):
        require_shape(name, tensor, tokens, width)
    for name, tensor in (("q_gamma", q_gamma), ("k_gamma", k_gamma)):
        require_shape(name, tensor, width)
    require_dtype("index", index, (torch.int64,))
    require_shape("index", index, tokens)
    block_size = k_cache.shape[2]
    require(block_size % 32 == 0, f"block size {block_size}: a multiple of 32")
    needed = -(-length // block_size) * batch
    require(len(k_cache) >= needed, f"{len(k_cache)} blocks, but B * ceil(S / block size) is {needed}")
    require(len(index.unique()) == len(index), "index has a slot twice")
    in_range = bool(((index >= -1) & (index < len(k_cache) * block_size)).all())
    require(in_range, f"index leaves [-1, {len(k_cache) * block_size})")
    parts = qkv.view(tokens, heads, width).split([num_heads, num_kv_heads, num_kv_heads], 1)
    rotated = []
    for part, gamma in zip(parts, (q_gamma, k_gamma), strict=False):
        normed = rms_norm(part.float(), gamma, epsilon)[0]
        rotated.append((normed * cos.float()[:, None] + rotate_half(normed) * sin.float()[:, None]).to(qkv.dtype))
    q_out.copy_(rotated[0].flatten(1))
    kept = index >= 0
    _write_nz("k_cache", k_cache, rotated[1][kept], index[kept])
    _write_nz("v_cache", v_cache, parts[2][kept], index[kept])
    return tuple(torch.empty(0, dtype=qkv.dtype) for _ in range(3))
