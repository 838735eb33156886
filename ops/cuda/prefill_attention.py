# SPDX-License-Identifier: Apache-2.0
"""Prefill kernels: fused q/k norm, rotary embedding and cache write; causal attention over short packed prompts."""

import torch
import triton
import triton.language as tl

from ops.cuda.attention import LOG2_E, add_tile, head_sizes
from ops.cuda.launch import BoundKernel

LONGEST = 1024  # maximum tokens per prompt; beyond, torch's attention is faster
BLOCK = 64
CACHE_HEADS = 8  # heads per program of the cache write
LOWEST = tl.constexpr(-1e30)  # finite: with -inf, a row whose first tiles are fully masked would become NaN


@triton.jit
def norm_rotary_cache_kernel(
    qkv,  # [T, (H + 2G) * C]
    cos,  # [T, C] float32
    sin,  # [T, C] float32
    key_cache,  # [L, S, G, C]
    value_cache,  # [L, S, G, C]
    slot_mapping,  # [T] int64
    query_key_output,  # [T, H + G, C]
    q_norm_weight,  # [C]
    k_norm_weight,  # [C]
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    HEADS: tl.constexpr,  # heads per program
    EPS: tl.constexpr,
):
    """Fused q/k norm, rotary embedding and cache write of k and v. Grid (T, ceil((H + 2G) / HEADS))."""
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half = tl.arange(0, C // 2)
    is_value = (h >= H + G) & (h < H + 2 * G)
    is_key = (h >= H) & (h < H + G)
    is_rotated = h < H + G
    source = qkv + token * ((H + 2 * G) * C) + h[:, None] * C + half[None, :]
    in_qkv = (h < H + 2 * G)[:, None]
    x_1 = tl.load(source, mask=in_qkv, other=0.0)
    x_2 = tl.load(source + C // 2, mask=in_qkv, other=0.0)
    cache_row = tl.load(slot_mapping + token) * (G * C)
    value_address = value_cache + cache_row + (h - H - G)[:, None] * C + half[None, :]
    tl.store(value_address, x_1, mask=is_value[:, None])
    tl.store(value_address + C // 2, x_2, mask=is_value[:, None])
    y_1 = x_1.to(tl.float32)
    y_2 = x_2.to(tl.float32)
    scale = tl.rsqrt(tl.sum(y_1 * y_1 + y_2 * y_2, axis=1) / C + EPS)[:, None]
    is_query = (h < H)[:, None]
    q_gain_1 = tl.load(q_norm_weight + half).to(tl.float32)[None, :]
    q_gain_2 = tl.load(q_norm_weight + C // 2 + half).to(tl.float32)[None, :]
    k_gain_1 = tl.load(k_norm_weight + half).to(tl.float32)[None, :]
    k_gain_2 = tl.load(k_norm_weight + C // 2 + half).to(tl.float32)[None, :]
    y_1 = y_1 * scale * tl.where(is_query, q_gain_1, k_gain_1)
    y_2 = y_2 * scale * tl.where(is_query, q_gain_2, k_gain_2)
    cos_half = tl.load(cos + token * C + half)[None, :]
    sin_half = tl.load(sin + token * C + half)[None, :]
    z_1 = (y_1 * cos_half - y_2 * sin_half).to(qkv.dtype.element_ty)
    z_2 = (y_2 * cos_half + y_1 * sin_half).to(qkv.dtype.element_ty)
    target = query_key_output + token * ((H + G) * C) + h[:, None] * C + half[None, :]
    tl.store(target, z_1, mask=is_rotated[:, None])
    tl.store(target + C // 2, z_2, mask=is_rotated[:, None])
    key_address = key_cache + cache_row + (h - H)[:, None] * C + half[None, :]
    tl.store(key_address, z_1, mask=is_key[:, None])
    tl.store(key_address + C // 2, z_2, mask=is_key[:, None])


@triton.jit
def count_not_finite(
    qkv, first_start, end, kv_head, H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr
):
    """Checks V of key tokens `first_start` to `end` for NaN and infinity; returns 0 if all are finite."""
    c = tl.arange(0, C)
    zeros = tl.zeros([BLOCK, C], tl.float32)
    for first_column in tl.range(first_start, end, BLOCK, num_stages=1):  # rare: no shared memory of its own
        columns = first_column + tl.arange(0, BLOCK)
        value_rows = qkv + (columns * (H + 2 * G) + H + G + kv_head).to(tl.int64) * C
        value = tl.load(value_rows[:, None] + c[None, :], mask=(columns < end)[:, None], other=0.0)
        zeros += value.to(tl.float32) * 0.0
    return tl.sum(tl.sum((zeros != 0.0).to(tl.int32), axis=1), axis=0)


@triton.jit
def attend_to_columns(
    query,
    query_key,
    qkv,
    rows,
    starts,
    first_start,
    end,
    kv_head,
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ISOLATE_NOT_FINITE: tl.constexpr,
):
    """Flash attention of a tile of query tokens (rows) over key tokens (columns) `first_start` to `end`.

    ISOLATE_NOT_FINITE: the tile spans several prompts and V may hold NaN or infinity, which must not spread to
    other prompts (0 * NaN is NaN). Such V rows are zeroed and their scores set to NaN, which the mask removes for other
    prompts.
    """
    i = tl.arange(0, BLOCK)
    c = tl.arange(0, C)
    scale = LOG2_E / tl.sqrt(C * 1.0)
    maximum = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    accumulated = tl.zeros([BLOCK, C], tl.float32)
    # the rare case copies V once more, which shared memory must hold
    stages: tl.constexpr = 1 if ISOLATE_NOT_FINITE else 3
    for first_column in tl.range(first_start, end, BLOCK, num_stages=stages):
        columns = first_column + i
        in_columns = (columns < end)[:, None]  # later tokens may belong to another prompt
        key_rows = query_key + (columns * (H + G) + H + kv_head).to(tl.int64) * C
        key = tl.load(key_rows[:, None] + c[None, :], mask=in_columns, other=0.0)
        value_rows = qkv + (columns * (H + 2 * G) + H + G + kv_head).to(tl.int64) * C
        value = tl.load(value_rows[:, None] + c[None, :], mask=in_columns, other=0.0)
        seen = (columns[None, :] <= rows[:, None]) & (columns[None, :] >= starts[:, None])
        scores = tl.dot(query, tl.trans(key)) * scale
        if ISOLATE_NOT_FINITE:
            is_finite = tl.sum(value.to(tl.float32) * 0.0, axis=1) == 0.0
            value = tl.where(is_finite[:, None], value, 0.0)
            scores = tl.where(is_finite[None, :], scores, float("nan"))
        scores = tl.where(seen, scores, float("-inf"))
        maximum, total, accumulated = add_tile(scores, value, maximum, total, accumulated)
    return total, accumulated


@triton.jit(do_not_specialize=["num_tokens"])
def prefill_attention_kernel(
    query_key,  # [T, H + G, C]
    qkv,  # [T, (H + 2G) * C], only the values are read
    positions,  # [T] int64, of each token in its prompt
    output,  # [T, H * C]
    num_tokens,
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Flash attention (Dao et al. 2022) of BLOCK tokens of one or several prompts. Grid (ceil(T / BLOCK), H)."""
    first_row = tl.program_id(0) * BLOCK
    head = tl.program_id(1)
    kv_head = head // (H // G)
    i = tl.arange(0, BLOCK)
    c = tl.arange(0, C)
    rows = first_row + i
    in_rows = rows < num_tokens
    starts = rows - tl.load(positions + rows, mask=in_rows, other=0).to(tl.int32)  # first token of each row's prompt
    first_start = first_row - tl.load(positions + first_row).to(tl.int32)
    query_rows = query_key + (rows * (H + G) + head).to(tl.int64) * C
    query = tl.load(query_rows[:, None] + c[None, :], mask=in_rows[:, None], other=0.0)
    end = tl.minimum(first_row + BLOCK, num_tokens)
    not_finite = 0
    if tl.max(tl.where(in_rows, starts, first_start), axis=0) > first_start:  # the tile spans several prompts
        not_finite = count_not_finite(qkv, first_start, end, kv_head, H, G, C, BLOCK)
    if not_finite > 0:
        total, accumulated = attend_to_columns(
            query, query_key, qkv, rows, starts, first_start, end, kv_head, H, G, C, BLOCK, True
        )
    else:
        total, accumulated = attend_to_columns(
            query, query_key, qkv, rows, starts, first_start, end, kv_head, H, G, C, BLOCK, False
        )
    target = output + (rows * H + head).to(tl.int64)[:, None] * C + c[None, :]
    tl.store(target, (accumulated / total[:, None]).to(output.dtype.element_ty), mask=in_rows[:, None])


class NormRotaryCacheCall:
    """q/k norm, rotary embedding and cache write of a prefill step, bound to a layer's norm weights."""

    def __init__(
        self,
        qkv: torch.Tensor,
        q_norm_weight: torch.Tensor,
        k_norm_weight: torch.Tensor,
        eps: float,
        key_cache: torch.Tensor,
    ):
        self.num_heads, self.num_kv_heads, self.head_dim = head_sizes(qkv, key_cache)
        self.kernel = BoundKernel(
            norm_rotary_cache_kernel,
            (1,),
            4,
            False,
            (q_norm_weight, k_norm_weight),
            H=self.num_heads,
            G=self.num_kv_heads,
            C=self.head_dim,
            HEADS=CACHE_HEADS,
            EPS=eps,
        )
        self.programs_per_token = triton.cdiv(self.num_heads + 2 * self.num_kv_heads, CACHE_HEADS)

    def __call__(
        self,
        qkv: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        """Returns queries and keys [T, H + G, C]."""
        output = qkv.new_empty(qkv.shape[0], self.num_heads + self.num_kv_heads, self.head_dim)
        self.kernel.grid = (qkv.shape[0], self.programs_per_token, 1)
        self.kernel(qkv, *cos_sin, key_cache, value_cache, slot_mapping, output)
        return output


class PrefillAttentionCall:
    """Causal prefill attention over packed prompts of up to LONGEST tokens each, bound to the head counts."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int):
        self.num_heads = num_heads
        self.width = num_heads * head_dim
        self.kernel = BoundKernel(
            prefill_attention_kernel, (1,), 4, H=num_heads, G=num_kv_heads, C=head_dim, BLOCK=BLOCK
        )

    def __call__(self, query_key: torch.Tensor, qkv: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Queries and keys [T, H + G, C], qkv [T, (H + 2G) * C] for V, positions [T] int64 -> [T, H * C]."""
        num_tokens = qkv.shape[0]
        output = qkv.new_empty(num_tokens, self.width)
        self.kernel.grid = (triton.cdiv(num_tokens, BLOCK), self.num_heads, 1)
        self.kernel(query_key, qkv, positions, output, num_tokens)
        return output
