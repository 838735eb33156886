# SPDX-License-Identifier: Apache-2.0
"""Kernels of decode steps on 4-bit weights (W4A16): weights become 16-bit floats in registers and meet tensor cores.

Two neighbouring 16-bit words of four numbers become four registers of two neighbouring floats by a shift and a logical
instruction each, without conversion: a number in the upper mantissa bits of 16.0 is 16 plus itself. The 16, and zero
points, are subtracted from the products instead: per group of columns,
y = scale * (sum of x * (16 + q) - (16 + zero) * sum of x), both sums by tensor cores.

A weight is stored as tiles of 16 rows and 128 columns in the order in which the threads of a warp hold operands of
tensor cores, so that nothing passes through shared memory: [2 (h), 8 (g), 4 (c), 8 (q)] words, of which number i is row
8 h + g and column 32 i + 8 c + q; c and g make the lane. Scales of a tile, and 16 + its zero points, are
[PARTS, 8 (g), 2 (h), 2], a part being 128 / PARTS columns. The tiles of a row are a batch, which the warps of a program
share.
"""

import triton
import triton.language as tl

from ops.cuda.batched_experts import PLAN_FIELDS
from ops.cuda.launch import pdl_trigger, pdl_wait
from ops.cuda.moe import TAKEN, expert_of, key_at, logit_of, sortable_keys
from ops.cuda.triton_internals import INTERPRETED

BFLOAT16_SHIFTS, FLOAT16_SHIFTS = (3, -1, -5, -9), (6, 2, -2, -6)  # of number i to the upper mantissa bits; left > 0
BFLOAT16_16, FLOAT16_16 = 0x4180, 0x4C00  # bits of 16.0
BFLOAT16_MASK, FLOAT16_MASK = 0x0078, 0x03C0


def assembly(shifts: tuple[int, ...], mask: int, sixteen: int) -> str:
    """PTX that turns register $4, two words, into registers $0 to $3 of two floats."""
    pair = 0x10001
    lines = [
        f"{'shl' if shift > 0 else 'shr'}.b32 t, $4, {abs(shift)}; "
        f"lop3.b32 ${i}, t, {mask * pair:#x}, {sixteen * pair:#x}, 0xEA;"  # 0xEA: (a & b) | c
        for i, shift in enumerate(shifts)
    ]
    return "{ .reg .b32 t; " + " ".join(lines) + " }"


IN_ASSEMBLY = tl.constexpr(not INTERPRETED)
BFLOAT16_ASSEMBLY = tl.constexpr(assembly(BFLOAT16_SHIFTS, BFLOAT16_MASK, BFLOAT16_16))
FLOAT16_ASSEMBLY = tl.constexpr(assembly(FLOAT16_SHIFTS, FLOAT16_MASK, FLOAT16_16))


@triton.jit
def numbers(words, TYPE: tl.constexpr):
    """16 + each of the four numbers of int16 words: float16 if TYPE is, otherwise bfloat16."""
    if IN_ASSEMBLY:
        if TYPE is tl.float16:
            return tl.inline_asm_elementwise(
                FLOAT16_ASSEMBLY, "=r,=r,=r,=r,r", [words], (tl.float16, tl.float16, tl.float16, tl.float16), True, 2
            )
        return tl.inline_asm_elementwise(
            BFLOAT16_ASSEMBLY, "=r,=r,=r,=r,r", [words], (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), True, 2
        )
    if TYPE is tl.float16:
        return (
            ((words << 6) & 0x03C0 | 0x4C00).to(tl.float16, bitcast=True),
            ((words << 2) & 0x03C0 | 0x4C00).to(tl.float16, bitcast=True),
            ((words >> 2) & 0x03C0 | 0x4C00).to(tl.float16, bitcast=True),
            ((words >> 6) & 0x03C0 | 0x4C00).to(tl.float16, bitcast=True),
        )
    return (
        ((words << 3) & 0x0078 | 0x4180).to(tl.bfloat16, bitcast=True),
        ((words >> 1) & 0x0078 | 0x4180).to(tl.bfloat16, bitcast=True),
        ((words >> 5) & 0x0078 | 0x4180).to(tl.bfloat16, bitcast=True),
        ((words >> 9) & 0x0078 | 0x4180).to(tl.bfloat16, bitcast=True),
    )


@triton.jit
def load_weight(words, scales, tile, mask, PARTS: tl.constexpr, POLICY: tl.constexpr):
    """Loads tiles [S, M], S of a row by M of a column: words [4, 8, S, M, 2, 8] (c, g, tile, h, q); by part, scales and
    16 + zero points [4, 8, S, M, 2, 2] (c, g, tile, h, which).
    """
    c, g, h, q = tl.arange(0, 4), tl.arange(0, 8), tl.arange(0, 2), tl.arange(0, 8)
    in_tile = (g[None, :] * 32 + c[:, None] * 8)[:, :, None, None, None, None] + h[:, None] * 256 + q[None, :]
    at = tile[:, :, None, None] * 512 + in_tile
    all_mask = mask[:, :, None, None] & (in_tile >= 0)
    packed = tl.load(words + at, mask=all_mask, other=0, eviction_policy=POLICY)
    rows = (c[:, None] * 0 + g[None, :] * 4)[:, :, None, None, None, None] + h[:, None] * 2 + h[None, :]
    row_mask = mask[:, :, None, None] & (rows >= 0)
    row_scales = ()
    for part in tl.static_range(PARTS):
        row_at = (tile * PARTS + part)[:, :, None, None] * 32 + rows
        row_scales = row_scales + (tl.load(scales + row_at, mask=row_mask, other=0.0),)
    return packed, row_scales


@triton.jit
def columns(tile, number, TOKENS: tl.constexpr):
    """Columns [4, TOKENS, S, 8] (c, any token, tile, q) that meet a number of words."""
    c, n, q = tl.arange(0, 4), tl.arange(0, TOKENS), tl.arange(0, 8)
    return (c[:, None] * 8 + n[None, :] * 0)[:, :, None, None] + (tile[:, None] * 128 + number * 32 + q[None, :])


@triton.jit
def load_activations(x, tile, mask, K: tl.constexpr):
    """Activations of 8 tokens at x [8], masked, as four operands of tensor cores."""
    operands = ()
    for i in tl.static_range(4):
        k = columns(tile, i, 8)
        part = tl.load(x[:, None, None] + k, mask=mask[:, None, None] & (k < K), other=0.0)
        operands = operands + (right_operand(part),)
    return operands


@triton.jit
def left_operand(values):
    """[4, 8, S, M, 2, 8] (c, g, tile, h, q) as [S, 16 M rows, 32 columns]."""
    S: tl.constexpr = values.shape[2]
    M: tl.constexpr = values.shape[3]
    split = tl.reshape(values, [4, 8, S, M, 2, 2, 2, 2])
    return tl.reshape(tl.permute(split, (2, 3, 4, 1, 5, 6, 0, 7)), [S, M * 16, 32])


@triton.jit
def right_operand(values):
    """[4, T, S, 8] (c, token, tile, q) as [S, 32 columns, T tokens], columns in the order of `left_operand`."""
    T: tl.constexpr = values.shape[1]
    S: tl.constexpr = values.shape[2]
    split = tl.reshape(values, [4, T, S, 2, 2, 2])
    return tl.reshape(tl.permute(split, (2, 3, 4, 0, 5, 1)), [S, 32, T])


@triton.jit
def beside_products(values):
    """[4, 8, S, M, 2] (c, g, tile, h) as [S, 16 M rows, 8 tokens]."""
    S: tl.constexpr = values.shape[2]
    M: tl.constexpr = values.shape[3]
    rows = tl.permute(values, (2, 3, 4, 1, 0))[:, :, :, :, :, None]
    return tl.reshape(tl.broadcast_to(rows, [S, M, 2, 8, 4, 2]), [S, M * 16, 8])


@triton.jit
def products(packed, row_scales, x, PARTS: tl.constexpr):
    """Products of a loaded weight and activations by tile of a row: float32 [S, 16 M rows, 8 tokens]."""
    S: tl.constexpr = packed.shape[2]
    R: tl.constexpr = packed.shape[3] * 16
    floats = numbers(packed, x[0].dtype)
    ones = tl.full([S, R, 32], 1.0, x[0].dtype)
    y = tl.zeros([S, R, 8], tl.float32)
    for part in tl.static_range(PARTS):
        sums = tl.zeros([S, R, 8], tl.float32)
        totals = tl.zeros([S, R, 8], tl.float32)
        for i in tl.static_range(4):
            if i * PARTS // 4 == part:
                sums = tl.dot(left_operand(floats[i]), x[i], sums)
                totals = tl.dot(ones, x[i], totals)
        scale, zero = tl.split(row_scales[part].to(tl.float32))
        y += (sums - beside_products(zero) * totals) * beside_products(scale)
    return y


@triton.jit(do_not_specialize=["num_tokens"])
def linear_int4_kernel(
    hidden,  # [T, K]
    residual,  # [T, K] float32; unused without residual
    norm_weight,  # [K]
    words,  # of [N, K]
    scales,
    bias,  # [N]
    output,  # [T, N]
    residual_output,  # [T, K] float32
    num_tokens,  # T
    K: tl.constexpr,
    TILES: tl.constexpr,  # of a row
    S: tl.constexpr,  # power of two, at least TILES
    M: tl.constexpr,  # tiles of a column per program
    PARTS: tl.constexpr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,  # only with one token
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FIRST: tl.constexpr,  # whether it is the first kernel of a step
    PDL: tl.constexpr,
):
    """Linear layer, with residual add and RMSNorm if NORM: norm(hidden + residual) x weight^T + bias.

    Grid (N / (16 * M),).
    """
    block = tl.arange(0, S)
    m = tl.program_id(0) * M + tl.arange(0, M)
    t = tl.arange(0, 8)
    pdl_trigger(PDL and not FIRST)
    mask = (block < TILES)[:, None] & (m >= 0)[None, :]
    weight = load_weight(words, scales, m[None, :] * TILES + block[:, None], mask, PARTS, "")
    pdl_wait(PDL)
    pdl_trigger(PDL and FIRST)
    if NORM:
        summed = ()
        squares = tl.zeros([4, 1, S, 8], tl.float32)
        for i in tl.static_range(4):
            k = columns(block, i, 1)
            part = tl.load(hidden + k, mask=k < K, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                part += tl.load(residual + k, mask=k < K, other=0.0)
            tl.store(residual_output + k, part, mask=(k < K) & (tl.program_id(0) == 0))
            squares += part * part
            summed = summed + (part,)
        scale = tl.rsqrt(tl.sum(tl.reshape(squares, [32 * S]), axis=0) / K + EPS)
        x = ()
        for i in tl.static_range(4):
            k = columns(block, i, 1)
            gain = tl.load(norm_weight + k, mask=k < K, other=0.0).to(tl.float32)
            normed = (summed[i] * scale * gain).to(hidden.dtype.element_ty)
            x = x + (tl.broadcast_to(right_operand(normed), [S, 32, 8]),)
    else:
        x = load_activations(hidden + t * K, block, t < num_tokens, K)
    y = tl.sum(products(weight[0], weight[1], x, PARTS), axis=0)
    n = tl.program_id(0) * (16 * M) + tl.arange(0, 16 * M)
    if HAS_BIAS:
        y += tl.load(bias + n).to(tl.float32)[:, None]
    at = t[None, :] * (tl.num_programs(0) * (16 * M)) + n[:, None]
    tl.store(output + at, y.to(output.dtype.element_ty), mask=(t < num_tokens)[None, :] & (n >= 0)[:, None])


@triton.jit
def load_gate_up(
    words,
    scales,
    expert,
    F: tl.constexpr,
    TILES: tl.constexpr,
    S: tl.constexpr,
    M: tl.constexpr,
    PARTS: tl.constexpr,
):
    """This program's tiles of an expert's gate and up projections."""
    block = tl.arange(0, S)
    m = tl.program_id(0) * M + tl.arange(0, M)
    mask = (block < TILES)[:, None] & (m >= 0)[None, :]
    tile = (expert * (2 * F // 16) + m)[None, :] * TILES + block[:, None]
    gate = load_weight(words, scales, tile, mask, PARTS, "evict_first")
    up = load_weight(words, scales, tile + F // 16 * TILES, mask, PARTS, "evict_first")
    tl.debug_barrier()  # keeps the compiler from loading the second matrix after it has multiplied the first
    return gate, up


@triton.jit
def swiglu(gate, up, x, PARTS: tl.constexpr):
    """silu(gate x) * (up x): float32 [16 M rows, 8 tokens]."""
    gated = tl.sum(products(gate[0], gate[1], x, PARTS), axis=0)
    upped = tl.sum(products(up[0], up[1], x, PARTS), axis=0)
    return gated * tl.sigmoid(gated) * upped


@triton.jit
def gate_up_int4_kernel(
    normed,  # [1, D]
    logits,  # [1, E] float32
    words,  # of [COUNT, 2F, D]
    scales,
    output,  # [1, TOP_K, F]
    D: tl.constexpr,
    F: tl.constexpr,
    TILES: tl.constexpr,
    S: tl.constexpr,
    M: tl.constexpr,
    PARTS: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    FIRST: tl.constexpr,  # first local expert
    COUNT: tl.constexpr,  # number of local experts
    PDL: tl.constexpr,
):
    """gate_up_proj with SwiGLU of one token and one of its top-k experts, if local. Grid (F / (16 * M), TOP_K)."""
    place = tl.program_id(1)
    t = tl.arange(0, 8)
    pdl_wait(PDL)
    pdl_trigger(PDL)
    expert = expert_of(key_at(sortable_keys(logits, tl.arange(0, BLOCK_E), E, BLOCK_E), place), BLOCK_E) - FIRST
    if COUNT < E:  # noqa: SIM102  constexpr, unlike the inner condition
        if (expert < 0) | (expert >= COUNT):
            return
    gate, up = load_gate_up(words, scales, expert, F, TILES, S, M, PARTS)
    x = load_activations(normed + t * 0, tl.arange(0, S), t >= 0, D)
    y = swiglu(gate, up, x, PARTS)
    f = tl.program_id(0) * (16 * M) + tl.arange(0, 16 * M)
    at = place * F + f[:, None] + t[None, :]
    tl.store(output + at, y.to(output.dtype.element_ty), mask=(t == 0)[None, :] & (f >= 0)[:, None])


@triton.jit
def down_int4_kernel(
    logits,  # [1, E] float32
    activated,  # [1, TOP_K, F]
    words,  # of [COUNT, D, F]
    scales,
    output,  # [1, D]
    D: tl.constexpr,
    F: tl.constexpr,
    TILES: tl.constexpr,
    S: tl.constexpr,  # power of two, at least TILES
    M: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,  # power of two, at least TOP_K
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    FIRST: tl.constexpr,  # first local expert
    COUNT: tl.constexpr,  # number of local experts
    PDL: tl.constexpr,
):
    """down_proj of one token's local top-k experts, weighted and summed. Grid (D / (16 * M),).

    The tiles of all these experts are one batch, whose weights are loaded before `pdl_wait`.
    """
    t = tl.arange(0, 8)
    m = tl.program_id(0) * M + tl.arange(0, M)
    place = tl.arange(0, BLOCK_K * S) // S
    block = tl.arange(0, BLOCK_K * S) % S
    pdl_trigger(PDL)
    keys = sortable_keys(logits, tl.arange(0, BLOCK_E), E, BLOCK_E)  # gate_up triggers after its wait
    highest = logit_of(tl.max(keys, axis=0), BLOCK_E)
    total = 0.0
    if not RENORMALIZE:
        total = tl.sum(tl.exp(logit_of(keys, BLOCK_E) - highest), axis=0)
    expert = tl.full([BLOCK_K * S], -1, tl.int64)
    factors = tl.zeros([BLOCK_K * S], tl.float32)
    for i in tl.static_range(TOP_K):
        best = tl.max(keys, axis=0)
        keys = tl.where(keys == best, TAKEN, keys)
        factor = tl.exp(logit_of(best, BLOCK_E) - highest)
        if RENORMALIZE:
            total += factor
        expert = tl.where(place == i, expert_of(best, BLOCK_E) - FIRST, expert)
        factors = tl.where(place == i, factor, factors)
    is_here = (expert >= 0) & (expert < COUNT) & (block < TILES)
    tile = (expert[:, None] * (D // 16) + m[None, :]) * TILES + block[:, None]
    mask = is_here[:, None] & (m >= 0)[None, :]
    weight = load_weight(words, scales, tile, mask, PARTS, "evict_first")
    pdl_wait(PDL)
    x = ()
    for i in tl.static_range(4):
        k = columns(block, i, 8)
        at = activated + place[:, None] * F + k
        x = x + (right_operand(tl.load(at, mask=is_here[:, None] & (k < F), other=0.0)),)
    y = products(weight[0], weight[1], x, PARTS)
    y = tl.where(is_here[:, None, None], y * factors[:, None, None], 0.0)
    y = tl.sum(y, axis=0) / total
    n = tl.program_id(0) * (16 * M) + tl.arange(0, 16 * M)
    at = n[:, None] + t[None, :]
    tl.store(output + at, y.to(output.dtype.element_ty), mask=(t == 0)[None, :] & (n >= 0)[:, None])


@triton.jit
def gate_up_shared_int4_kernel(
    normed,  # [T, D]
    slots,  # [num_slots, PLAN_FIELDS] int32
    words,  # of [COUNT, 2F, D]
    scales,
    output,  # [T, TOP_K, F]
    D: tl.constexpr,
    F: tl.constexpr,
    TILES: tl.constexpr,
    S: tl.constexpr,
    M: tl.constexpr,
    PARTS: tl.constexpr,
    TOP_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """gate_up_proj with SwiGLU of all pairs of an expert. Grid (F / (16 * M), num_slots)."""
    t = tl.arange(0, 8)
    slot = slots + tl.program_id(1) * PLAN_FIELDS
    pdl_wait(PDL)
    pdl_trigger(PDL)
    expert = tl.load(slot, cache_modifier=".cg").to(tl.int64)
    if expert < 0:
        return
    gate, up = load_gate_up(words, scales, expert, F, TILES, S, M, PARTS)
    is_pair = t < tl.load(slot + 1, cache_modifier=".cg")
    pair = tl.load(slot + 2 + t, mask=is_pair, other=0, cache_modifier=".cg")
    x = load_activations(normed + pair // TOP_K * D, tl.arange(0, S), is_pair, D)
    y = swiglu(gate, up, x, PARTS)
    f = tl.program_id(0) * (16 * M) + tl.arange(0, 16 * M)
    at = (pair * F)[None, :] + f[:, None]
    tl.store(output + at, y.to(output.dtype.element_ty), mask=is_pair[None, :] & (f >= 0)[:, None])


@triton.jit
def down_shared_int4_kernel(
    slots,  # [num_slots, PLAN_FIELDS] int32
    activated,  # [T, TOP_K, F]
    words,  # of [COUNT, D, F]
    scales,
    output,  # [T, TOP_K, D] float32
    D: tl.constexpr,
    F: tl.constexpr,
    TILES: tl.constexpr,
    S: tl.constexpr,
    M: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """down_proj of all pairs of an expert, without top-k weights. Grid (D / (16 * M), num_slots)."""
    t = tl.arange(0, 8)
    block = tl.arange(0, S)
    m = tl.program_id(0) * M + tl.arange(0, M)
    slot = slots + tl.program_id(1) * PLAN_FIELDS
    pdl_trigger(PDL)
    # the plan is complete: gate_up triggers after its wait
    expert = tl.load(slot, cache_modifier=".cg").to(tl.int64)
    is_pair = t < tl.load(slot + 1, cache_modifier=".cg")
    tile = (expert * (D // 16) + m)[None, :] * TILES + block[:, None]
    mask = ((block < TILES) & (expert >= 0))[:, None] & (m >= 0)[None, :]
    weight = load_weight(words, scales, tile, mask, PARTS, "evict_first")
    pair = tl.load(slot + 2 + t, mask=is_pair, other=0, cache_modifier=".cg")
    pdl_wait(PDL)
    if expert < 0:
        return
    x = load_activations(activated + pair * F, block, is_pair, F)
    y = tl.sum(products(weight[0], weight[1], x, PARTS), axis=0)
    n = tl.program_id(0) * (16 * M) + tl.arange(0, 16 * M)
    tl.store(output + (pair * D)[None, :] + n[:, None], y, mask=is_pair[None, :] & (n >= 0)[:, None])


@triton.jit
def dequantize_int4_kernel(
    words,  # of [R, K], rows of all experts
    scales,
    output,  # [R, K]
    K: tl.constexpr,
    TILES: tl.constexpr,
    S: tl.constexpr,  # tiles of a row per program
    PARTS: tl.constexpr,
):
    """Dequantises a matrix for a large step. Grid (R / 16, ceil(TILES / S))."""
    block = tl.program_id(1) * S + tl.arange(0, S)
    row_tile = tl.program_id(0).to(tl.int64)
    tile = (row_tile * TILES + block)[:, None]
    weight = load_weight(words, scales, tile, (block < TILES)[:, None], PARTS, "evict_first")
    floats = numbers(weight[0], output.dtype.element_ty)
    g, h = tl.arange(0, 8), tl.arange(0, 2)
    row = row_tile * 16 + (g[:, None] + h[None, :] * 8)[None, :, None, None, :, None]
    for i in tl.static_range(4):
        scale, zero = tl.split(weight[1][i * PARTS // 4].to(tl.float32))
        value = (floats[i].to(tl.float32) - zero[:, :, :, :, :, None]) * scale[:, :, :, :, :, None]
        k = columns(block, i, 1)[:, :, :, None, None, :]
        tl.store(output + row * K + k, value.to(output.dtype.element_ty), mask=(k < K) & (row >= 0))
