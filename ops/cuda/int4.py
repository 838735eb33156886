# SPDX-License-Identifier: Apache-2.0
"""Kernels of decode steps on 4-bit weights (W4A16), dequantised in registers; and one that dequantises to memory.

A weight's words are in the order in which the kernels read them: word j of group G (of GROUP columns) holds columns
G * GROUP + i * GROUP / 8 + j, i = 0 to 7, from the lowest bits. All eight then have one scale, and neighbouring words
meet neighbouring activations.

A 4-bit number becomes a float without a conversion instruction: put into the mantissa of 2^23 it is 2^23 plus itself
(times 16^i, where its bits are not shifted down: five of a word's eight fit), from which 2^23 is subtracted.
"""

import triton
import triton.language as tl

from ops.cuda.batched_experts import PLAN_FIELDS
from ops.cuda.launch import pdl_trigger, pdl_wait
from ops.cuda.moe import TAKEN, expert_of, key_at, logit_of, sortable_keys


@triton.jit
def column(j, PLACE: tl.constexpr, GROUP: tl.constexpr):
    """Column of number PLACE of word j."""
    return j // (GROUP // 8) * GROUP + PLACE * (GROUP // 8) + j % (GROUP // 8)


@triton.jit
def number(words, PLACE: tl.constexpr):
    """Number PLACE of each word, less 8, times 2^(4 * (PLACE % 5)): float32."""
    position: tl.constexpr = 4 * (PLACE % 5)
    shifted = words if PLACE < 5 else words >> (4 * 5)
    bits = (shifted & (15 << position)) | 0x4B000000
    return bits.to(tl.float32, bitcast=True) - (8388608.0 + (8 << position))


@triton.jit
def activations(x, j, PLACE: tl.constexpr, GROUP: tl.constexpr):
    """Activations that meet number PLACE of words j, times 2^-(4 * (PLACE % 5))."""
    return tl.load(x + column(j, PLACE, GROUP)).to(tl.float32) * (1.0 / (1 << (4 * (PLACE % 5))))


@triton.jit
def dot_row(words, x, j, offsets, GROUP: tl.constexpr, HAS_ZEROS: tl.constexpr):
    """Products of words [ROWS, J] and activations at x, by word: [ROWS, J]; offsets [ROWS, J]: 8 - zero points."""
    sums = tl.zeros(words.shape, tl.float32)
    total = tl.zeros(j.shape, tl.float32)
    for i in tl.static_range(8):
        part = activations(x, j, i, GROUP)
        sums += number(words, i) * part[None, :]
        if HAS_ZEROS:
            total += part * (1 << (4 * (i % 5)))
    if HAS_ZEROS:
        sums += offsets * total[None, :]
    return sums


@triton.jit
def load_scales(scales, zeros, row, j, GROUPS: tl.constexpr, GROUP: tl.constexpr, HAS_ZEROS: tl.constexpr, mask):
    """Scales and offsets [ROWS, J] of words j of rows `row`, as float32."""
    at = row[:, None] * GROUPS + (j // (GROUP // 8))[None, :]
    scale = tl.load(scales + at, mask=mask, other=0.0).to(tl.float32)
    offsets = scale
    if HAS_ZEROS:
        offsets = 8 - tl.load(zeros + at, mask=mask, other=8).to(tl.float32)
    return scale, offsets


@triton.jit
def gemv_int4_kernel(
    hidden,  # [T, K]
    residual,  # [T, K] float32; unused without residual
    norm_weight,  # [K]
    words,  # [N, K / 8]
    scales,  # [N, K / GROUP]
    zeros,  # [N, K / GROUP] uint8
    bias,  # [N]
    output,  # [T, N]
    residual_output,  # [T, K] float32
    K: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FIRST: tl.constexpr,  # whether it is the first kernel of a step
    PDL: tl.constexpr,
):
    """GEMV, with residual add and RMSNorm if NORM: norm(hidden + residual) x weight^T + bias. Grid (N / ROWS, T)."""
    program = tl.program_id(0)
    j = tl.arange(0, K // 8)
    n = program * ROWS + tl.arange(0, ROWS)
    pdl_trigger(PDL and not FIRST)
    packed = tl.load(words + n[:, None] * (K // 8) + j[None, :])
    scale, offsets = load_scales(
        scales, zeros, n, j, K // GROUP, GROUP, HAS_ZEROS, (n >= 0)[:, None] & (j >= 0)[None, :]
    )
    pdl_wait(PDL)
    pdl_trigger(PDL and FIRST)
    t = tl.program_id(1)
    sums = tl.zeros([ROWS, K // 8], tl.float32)
    total = tl.zeros([K // 8], tl.float32)
    squares = tl.zeros([K // 8], tl.float32)
    for i in tl.static_range(8):
        k = column(j, i, GROUP)
        x = tl.load(hidden + t * K + k).to(tl.float32)
        if NORM:
            if HAS_RESIDUAL:
                x += tl.load(residual + t * K + k)
            if program == t % tl.num_programs(0):
                tl.store(residual_output + t * K + k, x)
            squares += x * x
            x *= tl.load(norm_weight + k).to(tl.float32)
        sums += number(packed, i) * (x * (1.0 / (1 << (4 * (i % 5)))))[None, :]
        if HAS_ZEROS:
            total += x
    if HAS_ZEROS:
        sums += offsets * total[None, :]
    y = tl.sum(sums * scale, axis=1)
    if NORM:
        y *= tl.rsqrt(tl.sum(squares, axis=0) / K + EPS)
    if HAS_BIAS:
        y += tl.load(bias + n).to(tl.float32)
    tl.store(output + t * (tl.num_programs(0) * ROWS) + n, y.to(output.dtype.element_ty))


@triton.jit
def gate_up_int4_kernel(
    normed,  # [T, D]
    logits,  # [T, E] float32
    words,  # [COUNT, 2F, D / 8]
    scales,  # [COUNT, 2F, D / GROUP]
    zeros,
    output,  # [T, TOP_K, F]
    D: tl.constexpr,
    F: tl.constexpr,
    GROUP: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TOP_K: tl.constexpr,
    FIRST: tl.constexpr,  # first local expert
    COUNT: tl.constexpr,  # number of local experts
    ROWS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    PDL: tl.constexpr,
):
    """gate_up_proj with SwiGLU of one token and one of its top-k experts, if local. Grid (F / ROWS, T * TOP_K)."""
    pair = tl.program_id(1)
    token = pair // TOP_K
    j = tl.arange(0, D // 8)
    f = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pdl_wait(PDL)
    pdl_trigger(PDL)
    best = key_at(sortable_keys(logits + token * E, tl.arange(0, BLOCK_E), E, BLOCK_E), pair % TOP_K)
    expert = expert_of(best, BLOCK_E) - FIRST
    if COUNT < E:  # noqa: SIM102  constexpr, unlike the inner condition
        if (expert < 0) | (expert >= COUNT):
            return
    gate = expert * (2 * F) + f
    every = (f >= 0)[:, None] & (j >= 0)[None, :]
    gate_words = tl.load(words + gate[:, None] * (D // 8) + j[None, :], eviction_policy="evict_first")
    up_words = tl.load(words + (gate + F)[:, None] * (D // 8) + j[None, :], eviction_policy="evict_first")
    gate_scale, gate_offsets = load_scales(scales, zeros, gate, j, D // GROUP, GROUP, HAS_ZEROS, every)
    up_scale, up_offsets = load_scales(scales, zeros, gate + F, j, D // GROUP, GROUP, HAS_ZEROS, every)
    x = normed + token * D
    gate_sums = tl.sum(dot_row(gate_words, x, j, gate_offsets, GROUP, HAS_ZEROS) * gate_scale, axis=1)
    up_sums = tl.sum(dot_row(up_words, x, j, up_offsets, GROUP, HAS_ZEROS) * up_scale, axis=1)
    y = gate_sums * tl.sigmoid(gate_sums) * up_sums
    tl.store(output + pair * F + f, y.to(output.dtype.element_ty))


@triton.jit
def down_int4_kernel(
    logits,  # [T, E] float32
    activated,  # [T, TOP_K, F]
    words,  # [COUNT, D, F / 8]
    scales,  # [COUNT, D, F / GROUP]
    zeros,
    output,  # [T, D]
    D: tl.constexpr,
    F: tl.constexpr,
    GROUP: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    FIRST: tl.constexpr,  # first local expert
    COUNT: tl.constexpr,  # number of local experts
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two, at least F / 8
    HAS_ZEROS: tl.constexpr,
    PDL: tl.constexpr,
):
    """down_proj of a token's local top-k experts, weighted and summed. Grid (D / ROWS, T).

    Loads the rows of all these experts before `pdl_wait`.
    """
    token = tl.program_id(1)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, BLOCK)
    pdl_trigger(PDL)
    keys = sortable_keys(logits + token * E, tl.arange(0, BLOCK_E), E, BLOCK_E)  # gate_up triggers after its wait
    highest = logit_of(tl.max(keys, axis=0), BLOCK_E)
    total = 0.0
    if not RENORMALIZE:
        total = tl.sum(tl.exp(logit_of(keys, BLOCK_E) - highest), axis=0)
    packed = ()
    row_scales = ()
    row_offsets = ()
    factors = ()
    for _ in tl.static_range(TOP_K):
        best = tl.max(keys, axis=0)
        keys = tl.where(keys == best, TAKEN, keys)
        factor = tl.exp(logit_of(best, BLOCK_E) - highest)
        if RENORMALIZE:
            total += factor
        expert = expert_of(best, BLOCK_E) - FIRST
        is_here = (expert >= 0) & (expert < COUNT)
        mask = (n >= 0)[:, None] & ((j < F // 8) & is_here)[None, :]
        row = expert * D + n
        packed = packed + (
            tl.load(words + row[:, None] * (F // 8) + j[None, :], mask=mask, other=0, eviction_policy="evict_first"),
        )
        scale, offsets = load_scales(scales, zeros, row, j, F // GROUP, GROUP, HAS_ZEROS, mask)
        row_scales = row_scales + (scale,)
        row_offsets = row_offsets + (offsets,)
        factors = factors + (tl.where(is_here, factor, 0.0),)
    pdl_wait(PDL)
    is_column = j < F // 8
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for e in tl.static_range(TOP_K):
        x = activated + (token * TOP_K + e) * F
        products = tl.zeros([ROWS, BLOCK], tl.float32)
        x_total = tl.zeros([BLOCK], tl.float32)
        is_used = is_column if COUNT == E else is_column & (factors[e].to(tl.int32, bitcast=True) != 0)
        for i in tl.static_range(8):
            part = tl.load(x + column(j, i, GROUP), mask=is_used, other=0.0).to(tl.float32)
            products += number(packed[e], i) * (part * (1.0 / (1 << (4 * (i % 5)))))[None, :]
            x_total += part
        if HAS_ZEROS:
            products += row_offsets[e] * x_total[None, :]
        sums += products * (row_scales[e] * factors[e])
    y = tl.sum(sums, axis=1) / total
    tl.store(output + token * D + n, y.to(output.dtype.element_ty))


@triton.jit
def gate_up_shared_int4_kernel(
    normed,  # [T, D]
    slots,  # [num_slots, PLAN_FIELDS] int32
    words,  # [COUNT, 2F, D / 8]
    scales,
    zeros,
    output,  # [T, TOP_K, F]
    D: tl.constexpr,
    F: tl.constexpr,
    GROUP: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    PDL: tl.constexpr,
):
    """gate_up_proj with SwiGLU of all pairs of an expert. Grid (F / ROWS, num_slots)."""
    j = tl.arange(0, D // 8)
    f = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = slots + tl.program_id(1) * PLAN_FIELDS
    pdl_wait(PDL)
    pdl_trigger(PDL)
    expert = tl.load(slot, cache_modifier=".cg").to(tl.int64)
    count = tl.load(slot + 1, cache_modifier=".cg")
    pairs = slot + 2
    pair = tl.load(pairs, cache_modifier=".cg")
    if expert >= 0:
        gate = expert * (2 * F) + f
        every = (f >= 0)[:, None] & (j >= 0)[None, :]
        gate_words = tl.load(words + gate[:, None] * (D // 8) + j[None, :], eviction_policy="evict_first")
        up_words = tl.load(words + (gate + F)[:, None] * (D // 8) + j[None, :], eviction_policy="evict_first")
        gate_scale, gate_offsets = load_scales(scales, zeros, gate, j, D // GROUP, GROUP, HAS_ZEROS, every)
        up_scale, up_offsets = load_scales(scales, zeros, gate + F, j, D // GROUP, GROUP, HAS_ZEROS, every)
        for _ in range(count):
            x = normed + pair // TOP_K * D
            gate_sums = tl.sum(dot_row(gate_words, x, j, gate_offsets, GROUP, HAS_ZEROS) * gate_scale, axis=1)
            up_sums = tl.sum(dot_row(up_words, x, j, up_offsets, GROUP, HAS_ZEROS) * up_scale, axis=1)
            y = gate_sums * tl.sigmoid(gate_sums) * up_sums
            tl.store(output + pair * F + f, y.to(output.dtype.element_ty))
            pairs += 1
            pair = tl.load(pairs, cache_modifier=".cg")


@triton.jit
def down_shared_int4_kernel(
    slots,  # [num_slots, PLAN_FIELDS] int32
    activated,  # [T, TOP_K, F]
    words,  # [COUNT, D, F / 8]
    scales,
    zeros,
    output,  # [T, TOP_K, D] float32
    D: tl.constexpr,
    F: tl.constexpr,
    GROUP: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two, at least F / 8
    HAS_ZEROS: tl.constexpr,
    PDL: tl.constexpr,
):
    """down_proj of all pairs of an expert, without top-k weights. Grid (D / ROWS, num_slots)."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, BLOCK)
    slot = slots + tl.program_id(1) * PLAN_FIELDS
    pdl_trigger(PDL)
    # the plan is complete: gate_up triggers after its wait
    expert = tl.load(slot, cache_modifier=".cg").to(tl.int64)
    count = tl.load(slot + 1, cache_modifier=".cg")
    pairs = slot + 2
    pair = tl.load(pairs, cache_modifier=".cg")
    is_column = j < F // 8
    mask = (n >= 0)[:, None] & (is_column & (expert >= 0))[None, :]
    row = expert * D + n
    at = words + row[:, None] * (F // 8) + j[None, :]
    packed = tl.load(at, mask=mask, other=0, eviction_policy="evict_first")
    scale, offsets = load_scales(scales, zeros, row, j, F // GROUP, GROUP, HAS_ZEROS, mask)
    pdl_wait(PDL)
    if expert >= 0:
        for _ in range(count):
            products = tl.zeros([ROWS, BLOCK], tl.float32)
            x_total = tl.zeros([BLOCK], tl.float32)
            for i in tl.static_range(8):
                part = tl.load(activated + pair * F + column(j, i, GROUP), mask=is_column, other=0.0).to(tl.float32)
                products += number(packed, i) * (part * (1.0 / (1 << (4 * (i % 5)))))[None, :]
                x_total += part
            if HAS_ZEROS:
                products += offsets * x_total[None, :]
            tl.store(output + pair * D + n, tl.sum(products * scale, axis=1))
            pairs += 1
            pair = tl.load(pairs, cache_modifier=".cg")


@triton.jit
def dequantize_int4_kernel(
    words,  # [R, K / 8], rows of all experts
    scales,  # [R, K / GROUP]
    zeros,
    output,  # [R, K]
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,  # words of a row per program
    HAS_ZEROS: tl.constexpr,
):
    """Dequantises a matrix for a large step. Grid (R, ceil(K / 8 / BLOCK))."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = j < K // 8
    packed = tl.load(words + row * (K // 8) + j, mask=mask, other=0)
    at = row * (K // GROUP) + j // (GROUP // 8)
    scale = tl.load(scales + at, mask=mask, other=0.0).to(tl.float32)
    offset = tl.zeros([BLOCK], tl.float32)
    if HAS_ZEROS:
        offset = 8 - tl.load(zeros + at, mask=mask, other=8).to(tl.float32)
    for i in tl.static_range(8):
        value = number(packed, i) * (1.0 / (1 << (4 * (i % 5)))) + offset
        tl.store(output + row * K + column(j, i, GROUP), (value * scale).to(output.dtype.element_ty), mask=mask)
