# SPDX-License-Identifier: Apache-2.0
"""Expert kernels of decode steps; top-k and combine kernels around the grouped GEMMs of larger steps.

Decode steps have no separate routing kernel: every program computes top-k from the router logits itself.
"""

import triton
import triton.language as tl

from ops.cuda.launch import pdl_trigger, pdl_wait

NAN_BITS = tl.constexpr(0x7FC00000)
TAKEN = tl.constexpr(-(2**31))  # key of an expert already chosen: sorts after all others


@triton.jit
def sortable_keys(logits, i, E: tl.constexpr, BLOCK: tl.constexpr):
    """Packs a token's logits at `logits` + `i`, 0 <= i < BLOCK, into int32 keys in the order of the logits.

    The lowest bits hold the expert index, so that argmax is a single max: logits tie if their relative difference is
    below 2^-23 * BLOCK, and ties go to the lower expert. NaN of either sign sorts first; masked logits sort last, after
    -inf. Loads bypass the L1 cache, which may hold the logits of an earlier layer.
    """
    values = tl.load(logits + i, mask=i < E, other=float("-inf"), cache_modifier=".cg").to(tl.float32)
    bits = tl.where(values != values, NAN_BITS, values.to(tl.int32, bitcast=True))
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered & -BLOCK) | (BLOCK - 1 - i)


@triton.jit
def key_at(keys, place):
    """Returns the key at `place` in descending order; 0: the largest."""
    best = tl.max(keys, axis=0)
    for _ in range(place):
        keys = tl.where(keys == best, TAKEN, keys)
        best = tl.max(keys, axis=0)
    return best


@triton.jit
def expert_of(key, BLOCK: tl.constexpr):
    return (BLOCK - 1 - (key & (BLOCK - 1))).to(tl.int64)


@triton.jit
def logit_of(key, BLOCK: tl.constexpr):
    """Recovers the logit from a key, rounded towards 0; infinities are preserved."""
    return tl.where(key < 0, (key | (BLOCK - 1)) ^ 0x7FFFFFFF, key & -BLOCK).to(tl.float32, bitcast=True)


@triton.jit
def gate_up_kernel(
    normed,  # [T, D]
    logits,  # [T, E] float32
    weight,  # [COUNT, 2F, D]
    output,  # [T, TOP_K, F]
    D: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TOP_K: tl.constexpr,
    FIRST: tl.constexpr,  # first local expert
    COUNT: tl.constexpr,  # number of local experts
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """gate_up_proj with SwiGLU of one token and one of its top-k experts, if local. Grid (F / ROWS, T * TOP_K)."""
    pair = tl.program_id(1)
    token = pair // TOP_K
    d = tl.arange(0, D)
    f = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pdl_wait(PDL)
    pdl_trigger(PDL)
    best = key_at(sortable_keys(logits + token * E, tl.arange(0, BLOCK_E), E, BLOCK_E), pair % TOP_K)
    expert = expert_of(best, BLOCK_E) - FIRST
    if COUNT < E:  # noqa: SIM102  constexpr, unlike the inner condition
        if (expert < 0) | (expert >= COUNT):
            return
    rows = weight + expert * (2 * F * D) + f[:, None] * D + d[None, :]
    gate_weight = tl.load(rows, eviction_policy="evict_first")
    up_weight = tl.load(rows + F * D, eviction_policy="evict_first")
    x = tl.load(normed + token * D + d).to(tl.float32)
    gate = tl.sum(gate_weight.to(tl.float32) * x[None, :], axis=1)
    up = tl.sum(up_weight.to(tl.float32) * x[None, :], axis=1)
    tl.store(output + pair * F + f, (gate * tl.sigmoid(gate) * up).to(output.dtype.element_ty))


@triton.jit
def down_kernel(
    logits,  # [T, E] float32
    activated,  # [T, TOP_K, F]
    weight,  # [COUNT, D, F]
    output,  # [T, D]
    D: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    FIRST: tl.constexpr,  # first local expert
    COUNT: tl.constexpr,  # number of local experts
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,  # a power of two that divides F
    PDL: tl.constexpr,
):
    """down_proj of a token's local top-k experts, weighted and summed. Grid (D / ROWS, T).

    Loads the down_proj rows of all these experts before `pdl_wait`.
    """
    token = tl.program_id(1)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, CHUNK)
    pdl_trigger(PDL)
    keys = sortable_keys(logits + token * E, tl.arange(0, BLOCK_E), E, BLOCK_E)  # gate_up triggers after its wait
    highest = logit_of(tl.max(keys, axis=0), BLOCK_E)
    total = 0.0
    if not RENORMALIZE:
        total = tl.sum(tl.exp(logit_of(keys, BLOCK_E) - highest), axis=0)
    tiles = ()
    factors = ()
    is_used = ()
    for _ in tl.static_range(TOP_K):
        best = tl.max(keys, axis=0)
        keys = tl.where(keys == best, TAKEN, keys)
        factor = tl.exp(logit_of(best, BLOCK_E) - highest)
        factors = factors + (factor,)
        if RENORMALIZE:
            total += factor
        expert = expert_of(best, BLOCK_E) - FIRST
        rows = weight + expert * (D * F) + n[:, None] * F + k[None, :]
        is_here = (k >= 0) & (expert >= 0) & (expert < COUNT)
        is_used = is_used + (is_here,)
        for i in tl.static_range(F // CHUNK):
            if COUNT < E:
                tile = tl.load(rows + i * CHUNK, mask=is_here[None, :], other=0.0, eviction_policy="evict_first")
            else:
                tile = tl.load(rows + i * CHUNK, eviction_policy="evict_first")
            tiles = tiles + (tile,)
    pdl_wait(PDL)
    accumulated = tl.zeros([ROWS, CHUNK], tl.float32)
    for e in tl.static_range(TOP_K):
        for i in tl.static_range(F // CHUNK):
            address = activated + (token * TOP_K + e) * F + i * CHUNK + k
            x = tl.load(address, mask=is_used[e], other=0.0) if COUNT < E else tl.load(address)
            x = x.to(tl.float32) * factors[e]
            accumulated += tiles[e * (F // CHUNK) + i].to(tl.float32) * x[None, :]
    y = tl.sum(accumulated, axis=1) / total
    tl.store(output + token * D + n, y.to(output.dtype.element_ty))


@triton.jit
def topk_softmax_kernel(
    logits,  # [T, E] float32
    topk_weights,  # [T, TOP_K] float32
    topk_ids,  # [T, TOP_K] int64
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):
    """Router softmax and top-k. One program per token."""
    token = tl.program_id(0).to(tl.int64)
    keys = sortable_keys(logits + token * E, tl.arange(0, BLOCK_E), E, BLOCK_E)
    highest = logit_of(tl.max(keys, axis=0), BLOCK_E)
    probabilities = tl.exp(logit_of(keys, BLOCK_E) - highest)
    chosen = keys != keys
    for i in tl.static_range(TOP_K):
        best = tl.max(tl.where(chosen, TAKEN, keys), axis=0)
        chosen = chosen | (keys == best)
        tl.store(topk_ids + token * TOP_K + i, expert_of(best, BLOCK_E))
        tl.store(topk_weights + token * TOP_K + i, tl.exp(logit_of(best, BLOCK_E) - highest))
    tl.debug_barrier()
    total = tl.sum(tl.where(chosen | (not RENORMALIZE), probabilities, 0.0), axis=0)
    for i in tl.static_range(TOP_K):
        address = topk_weights + token * TOP_K + i
        tl.store(address, tl.load(address) / total)


@triton.jit
def combine_kernel(
    expert_output,  # [T * TOP_K, D]
    topk_weights,  # [T, TOP_K] float32
    topk_ids,  # [T, TOP_K] int64
    output,  # [T, D]
    D: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,  # number of local experts; id for experts on other ranks, whose rows are undefined
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Combine: weighted sum of the expert outputs of a token. Grid (T, ceil(D / BLOCK))."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(TOP_K):
        here = tl.load(topk_ids + token * TOP_K + i) < NUM_EXPERTS
        part = tl.load(expert_output + (token * TOP_K + i) * D + d, mask=(d < D) & here, other=0.0).to(tl.float32)
        total += part * tl.load(topk_weights + token * TOP_K + i)
    tl.store(output + token * D + d, total.to(output.dtype.element_ty), mask=d < D)
