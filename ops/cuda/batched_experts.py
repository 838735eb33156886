# SPDX-License-Identifier: Apache-2.0
"""Routed experts in decode steps of several tokens: an expert's weights are read once for all tokens routed to it.

Pair index: token * TOP_K + choice. The plan has a slot per active expert: expert id, number of pairs, pair indices (up
to MAX_TOKENS); unused slots have expert id -1.

The number of tokens is a runtime argument, so that kernels are not recompiled for each.
"""

import triton
import triton.language as tl

from ops.cuda.launch import pdl_trigger, pdl_wait
from ops.cuda.moe import TAKEN, logit_of, sortable_keys
from ops.cuda.tiles import MAX_TOKENS

PLAN_FIELDS = tl.constexpr(2 + MAX_TOKENS)


@triton.jit(do_not_specialize=["num_tokens", "num_slots"])
def plan_kernel(
    logits,  # [T, E] float32
    slots,  # [num_slots, PLAN_FIELDS] int32
    weights,  # [T, TOP_K] float32
    num_tokens,  # T
    num_slots,
    BLOCK_T: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TOP_K: tl.constexpr,
    FIRST: tl.constexpr,  # first local expert
    COUNT: tl.constexpr,  # number of local experts
    RENORMALIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Computes top-k ids and weights, and groups the pairs by expert into the plan; a single program."""
    t = tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    is_token = t < num_tokens
    pdl_wait(PDL)
    pdl_trigger(PDL)
    keys = sortable_keys(logits + (t * is_token)[:, None] * E, e[None, :], E, BLOCK_E)  # padding rows repeat token 0
    highest = logit_of(tl.max(keys, axis=1), BLOCK_E)
    exponentials = tl.exp(logit_of(keys, BLOCK_E) - highest[:, None])
    places = tl.full([BLOCK_T, BLOCK_E], TOP_K, tl.int32)
    remaining = keys
    for place in tl.static_range(TOP_K):
        is_best = remaining == tl.max(remaining, axis=1)[:, None]
        places = tl.where(is_best, place, places)
        remaining = tl.where(is_best, TAKEN, remaining)
    is_chosen = (places < TOP_K) & is_token[:, None]
    total = tl.sum(tl.where(is_chosen | (not RENORMALIZE), exponentials, 0.0), axis=1)
    here = e - FIRST
    is_here = (here >= 0) & (here < COUNT)
    factors = exponentials / total[:, None]
    if COUNT < E:
        factors = tl.where(is_here[None, :], factors, 0.0)
    tl.store(weights + t[:, None] * TOP_K + places, factors, mask=is_chosen)
    if COUNT < E:
        is_chosen = is_chosen & is_here[None, :]
    has_slot = tl.max(is_chosen.to(tl.int32), axis=0)
    slot = tl.cumsum(has_slot, axis=0) - 1
    tl.store(slots + slot * PLAN_FIELDS, here, mask=has_slot > 0)
    tl.store(slots + slot * PLAN_FIELDS + 1, tl.sum(is_chosen.to(tl.int32), axis=0), mask=has_slot > 0)
    order = tl.cumsum(is_chosen.to(tl.int32), axis=0) - 1
    pairs = t[:, None] * TOP_K + places
    tl.store(slots + slot[None, :] * PLAN_FIELDS + 2 + order, pairs, mask=is_chosen)
    left_over = tl.sum(has_slot, axis=0) + e
    tl.store(slots + left_over * PLAN_FIELDS, -1, mask=left_over < num_slots)


@triton.jit
def gate_up_shared_kernel(
    normed,  # [T, D]
    slots,  # [num_slots, PLAN_FIELDS] int32
    weight,  # [COUNT, 2F, D]
    output,  # [T, TOP_K, F]
    D: tl.constexpr,
    F: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """gate_up_proj with SwiGLU of all pairs of an expert. Grid (F / ROWS, num_slots)."""
    d = tl.arange(0, D)
    f = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = slots + tl.program_id(1) * PLAN_FIELDS
    pdl_wait(PDL)
    pdl_trigger(PDL)
    expert = tl.load(slot, cache_modifier=".cg").to(tl.int64)
    count = tl.load(slot + 1, cache_modifier=".cg")
    pairs = slot + 2
    pair = tl.load(pairs, cache_modifier=".cg")
    if expert >= 0:
        rows = weight + expert * (2 * F * D) + f[:, None] * D + d[None, :]
        gate_weight = tl.load(rows, eviction_policy="evict_first")
        up_weight = tl.load(rows + F * D, eviction_policy="evict_first")
        for _ in range(count):
            x = tl.load(normed + pair // TOP_K * D + d).to(tl.float32)
            gate = tl.sum(gate_weight.to(tl.float32) * x[None, :], axis=1)
            up = tl.sum(up_weight.to(tl.float32) * x[None, :], axis=1)
            y = gate * tl.sigmoid(gate) * up
            tl.store(output + pair * F + f, y.to(output.dtype.element_ty))
            pairs += 1
            pair = tl.load(pairs, cache_modifier=".cg")


@triton.jit
def down_shared_kernel(
    slots,  # [num_slots, PLAN_FIELDS] int32
    activated,  # [T, TOP_K, F]
    weight,  # [COUNT, D, F]
    output,  # [T, TOP_K, D] float32
    D: tl.constexpr,
    F: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,  # power of two that divides F
    PDL: tl.constexpr,
):
    """down_proj of all pairs of an expert, without top-k weights. Grid (D / ROWS, num_slots)."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, CHUNK)
    slot = slots + tl.program_id(1) * PLAN_FIELDS
    pdl_trigger(PDL)
    # the plan is complete: gate_up triggers after its wait
    expert = tl.load(slot, cache_modifier=".cg").to(tl.int64)
    count = tl.load(slot + 1, cache_modifier=".cg")
    pairs = slot + 2
    pair = tl.load(pairs, cache_modifier=".cg")
    rows = weight + expert * (D * F) + n[:, None] * F + k[None, :]
    tiles = ()
    for i in tl.static_range(F // CHUNK):
        is_used = (k >= 0)[None, :] & (expert >= 0)
        tiles = tiles + (tl.load(rows + i * CHUNK, mask=is_used, other=0.0, eviction_policy="evict_first"),)
    pdl_wait(PDL)
    if expert >= 0:
        for _ in range(count):
            accumulated = tl.zeros([ROWS, CHUNK], tl.float32)
            for i in tl.static_range(F // CHUNK):
                x = tl.load(activated + pair * F + i * CHUNK + k).to(tl.float32)
                accumulated += tiles[i].to(tl.float32) * x[None, :]
            tl.store(output + pair * D + n, tl.sum(accumulated, axis=1))
            pairs += 1
            pair = tl.load(pairs, cache_modifier=".cg")


@triton.jit
def weighted_sum_kernel(
    weights,  # [T, TOP_K] float32
    partial,  # [T, TOP_K, D] float32
    output,  # [T, D]
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    ELSEWHERE: tl.constexpr,  # expert parallelism: experts on other ranks have weight 0 and undefined `partial`
    PDL: tl.constexpr,
):
    """Combine: weighted sum over the experts of a token. Grid (D / BLOCK, T)."""
    token = tl.program_id(1)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pdl_trigger(PDL)
    pdl_wait(PDL)
    y = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(TOP_K):
        factor = tl.load(weights + token * TOP_K + i)
        address = partial + (token * TOP_K + i) * D + n
        is_here = (n >= 0) & (
            factor.to(tl.int32, bitcast=True) != 0
        )  # Triton's interpreter cannot combine float comparisons
        y += (tl.load(address, mask=is_here, other=0.0) if ELSEWHERE else tl.load(address)) * factor
    tl.store(output + token * D + n, y.to(output.dtype.element_ty))
