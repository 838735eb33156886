# SPDX-License-Identifier: Apache-2.0
"""Triton kernel for all between the merged q, k, v and attention: RMSNorm of q and k, rotary embedding, cache write.

Shape letters as in ops/__init__.py; R = H / G query heads of a kv head.
"""

import triton
import triton.language as tl
from torch import Tensor

MAX_PROGRAMS = 48  # per kv head: the vector cores of an NPU; a program takes every MAX_PROGRAMS-th token


@triton.jit
def norm_and_rotate(first, second, weight, cos, sin, half, C: tl.constexpr, EPS: tl.constexpr):
    """RMSNorm and half-split rotary embedding of rows given as their halves [R, C / 2] float32."""
    scale = tl.rsqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / C + EPS)[:, None]
    first = first * scale * tl.load(weight + half).to(tl.float32)[None, :]
    second = second * scale * tl.load(weight + C // 2 + half).to(tl.float32)[None, :]
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def qkv_kernel(
    qkv,  # [T, (H + 2G) * C]
    q_norm,  # [C]
    k_norm,  # [C]
    cos,  # [T, C], the second half repeats the first
    sin,  # [T, C]
    slots,  # [T] int64; negative: not written to the cache
    query,  # [T, H * C]
    key_cache,  # [L, S, G, C]
    value_cache,  # [L, S, G, C]
    num_tokens,
    G: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,  # R rounded up to a power of two
    C: tl.constexpr,
    EPS: tl.constexpr,
):
    """A program takes one kv head, with its query heads, of some of the tokens, one at a time: the tiles are
    BLOCK_R x C numbers, far less than the on-chip memory of a vector core."""
    head = tl.program_id(1)
    half, column, row = tl.arange(0, C // 2), tl.arange(0, C), tl.arange(0, BLOCK_R)
    of_query = (head * R + row)[:, None] * C + half[None, :]
    is_head = (row < R)[:, None]
    one = half[None, :]
    for token in range(tl.program_id(0), num_tokens, tl.num_programs(0)):
        source = qkv + token * ((R + 2) * G * C)
        cosine = tl.load(cos + token * C + half).to(tl.float32)[None, :]
        sine = tl.load(sin + token * C + half).to(tl.float32)[None, :]
        first = tl.load(source + of_query, mask=is_head, other=0.0).to(tl.float32)
        second = tl.load(source + of_query + C // 2, mask=is_head, other=0.0).to(tl.float32)
        first, second = norm_and_rotate(first, second, q_norm, cosine, sine, half, C, EPS)
        target = query + token * (R * G * C) + of_query
        tl.store(target, first.to(query.dtype.element_ty), mask=is_head)
        tl.store(target + C // 2, second.to(query.dtype.element_ty), mask=is_head)
        slot = tl.load(slots + token)
        source += (R * G + head) * C
        first, second = tl.load(source + one).to(tl.float32), tl.load(source + one + C // 2).to(tl.float32)
        first, second = norm_and_rotate(first, second, k_norm, cosine, sine, half, C, EPS)
        place = (slot * G + head) * C
        tl.store(key_cache + place + one, first.to(key_cache.dtype.element_ty), mask=slot >= 0)
        tl.store(key_cache + place + one + C // 2, second.to(key_cache.dtype.element_ty), mask=slot >= 0)
        tl.store(value_cache + place + column, tl.load(source + G * C + column), mask=slot >= 0)


def prepare_query(
    qkv: Tensor,
    q_norm_weight: Tensor,
    k_norm_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """Normed and rotated query [T, H, C]; the new keys and values are written to the caches [L, S, G, C]."""
    num_tokens, width = qkv.shape
    num_kv_heads, head_dim = key_cache.shape[2:]
    repeats = width // head_dim // num_kv_heads - 2
    query = qkv.new_empty(num_tokens, repeats * num_kv_heads, head_dim)
    qkv_kernel[(min(num_tokens, MAX_PROGRAMS), num_kv_heads)](
        *(qkv, q_norm_weight, k_norm_weight, cos, sin, slots, query, key_cache, value_cache, num_tokens),
        G=num_kv_heads,
        R=repeats,
        BLOCK_R=triton.next_power_of_2(repeats),
        C=head_dim,
        EPS=eps,
    )
    return query
