# SPDX-License-Identifier: Apache-2.0
"""Fused experts (`Ops.experts`) for decode steps, bound to the weights of a layer."""

import torch
import triton

from ops import RouterLogits
from ops.cuda.batched_experts import (
    PLAN_FIELDS,
    down_shared_kernel,
    gate_up_shared_kernel,
    plan_kernel,
    weighted_sum_kernel,
)
from ops.cuda.launch import BoundKernel, fits, is_power_of_two, power_of_two_factor
from ops.cuda.moe import down_kernel, gate_up_kernel
from ops.cuda.tiles import MAX_TOKENS, down_tile, gate_up_tile, shared_down_tile, shared_gate_up_tile

MAX_D = 8192  # limit: a program holds a weight row in registers
MIN_CHUNK, MAX_CHUNK = 16, 256  # columns per tile of down_proj
MAX_PARTS = 64  # tiles per program of down_proj
SUM_BLOCK = 256
PLAN_WARPS = 4


def experts_support(normed: torch.Tensor, routing: RouterLogits, gate_up: torch.Tensor, down: torch.Tensor) -> bool:
    """Returns whether the decode kernels of this file support these tensors."""
    d, f = down.shape[1:]
    chunks = f // power_of_two_factor(f, MAX_CHUNK)
    few_enough = normed.shape[0] <= MAX_TOKENS  # PLAN_FIELDS limits the tokens
    sizes_fit = is_power_of_two(d) and 16 <= d <= MAX_D and f % MIN_CHUNK == 0 and chunks * routing.top_k <= MAX_PARTS
    dtypes_fit = normed.dtype == gate_up.dtype == down.dtype and routing.logits.dtype is torch.float32
    return few_enough and sizes_fit and dtypes_fit and fits(normed, routing.logits, gate_up, down)


class ExpertsCall:
    """Experts for one token: gate_up_proj with SwiGLU, then down_proj with the weighted sum over experts."""

    def __init__(
        self, normed: torch.Tensor, routing: RouterLogits, gate_up: torch.Tensor, down: torch.Tensor, pdl: bool
    ):
        num_tokens, top_k, num_experts = normed.shape[0], routing.top_k, routing.logits.shape[1]
        count, d, f = down.shape
        sizes = {"D": d, "F": f, "E": num_experts, "BLOCK_E": triton.next_power_of_2(num_experts), "TOP_K": top_k}
        sizes |= {"FIRST": routing.first, "COUNT": count}
        self.activated = normed.new_empty(num_tokens, top_k, f)
        self.output = torch.empty_like(normed)
        rows, warps = gate_up_tile(f, d)
        grid: tuple[int, int] = (f // rows, num_tokens * top_k)
        fixed: tuple[torch.Tensor, ...] = (gate_up, self.activated)
        self.gate_up = BoundKernel(gate_up_kernel, grid, warps, pdl, fixed, **sizes, ROWS=rows, PDL=pdl)
        rows, warps = down_tile(f, d, top_k)
        self.down = BoundKernel(
            down_kernel,
            (d // rows, num_tokens),
            warps,
            pdl,
            (self.activated, down, self.output),
            **sizes,
            RENORMALIZE=routing.renormalize,
            ROWS=rows,
            CHUNK=power_of_two_factor(f, MAX_CHUNK),
            PDL=pdl,
        )

    def __call__(self, normed: torch.Tensor, routing: RouterLogits) -> torch.Tensor:
        self.gate_up(normed, routing.logits)
        self.down(routing.logits)
        return self.output


class BatchedExpertsCall:
    """Experts for two to MAX_TOKENS tokens: an expert's weights are read once for all tokens routed to it."""

    def __init__(
        self, normed: torch.Tensor, routing: RouterLogits, gate_up: torch.Tensor, down: torch.Tensor, pdl: bool
    ):
        num_tokens, top_k, num_experts = normed.shape[0], routing.top_k, routing.logits.shape[1]
        count, d, f = down.shape
        sizes = {"D": d, "F": f, "TOP_K": top_k}
        num_slots = min(num_tokens * top_k, count)
        # the kernels may read one element past the last pair
        slots = normed.new_empty(num_slots + 1, PLAN_FIELDS.value, dtype=torch.int32)
        weights = normed.new_empty(num_tokens, top_k, dtype=torch.float32)
        self.activated = normed.new_empty(num_tokens, top_k, f)
        self.partial = normed.new_empty(num_tokens, top_k, d, dtype=torch.float32)
        self.output = torch.empty_like(normed)
        self.plan = BoundKernel(
            plan_kernel,
            (1,),
            min(PLAN_WARPS, triton.next_power_of_2(num_tokens)),
            pdl,
            (slots, weights, num_tokens, num_slots),
            BLOCK_T=triton.next_power_of_2(num_tokens),
            E=num_experts,
            BLOCK_E=triton.next_power_of_2(num_experts),
            TOP_K=top_k,
            FIRST=routing.first,
            COUNT=count,
            RENORMALIZE=routing.renormalize,
            PDL=pdl,
        )
        rows, warps = shared_gate_up_tile(f, d)
        grid: tuple[int, int] = (f // rows, num_slots)
        fixed: tuple[torch.Tensor, ...] = (slots, gate_up, self.activated)
        self.gate_up = BoundKernel(gate_up_shared_kernel, grid, warps, pdl, fixed, **sizes, ROWS=rows, PDL=pdl)
        rows, warps = shared_down_tile(f, d)
        grid, fixed = (d // rows, num_slots), (slots, self.activated, down, self.partial)
        chunk = power_of_two_factor(f, MAX_CHUNK)
        self.down = BoundKernel(down_shared_kernel, grid, warps, pdl, fixed, **sizes, ROWS=rows, CHUNK=chunk, PDL=pdl)
        block = min(SUM_BLOCK, d)
        grid, fixed = (d // block, num_tokens), (weights, self.partial, self.output)
        constants = {"D": d, "TOP_K": top_k, "BLOCK": block, "ELSEWHERE": count < num_experts}
        self.sum = BoundKernel(weighted_sum_kernel, grid, 2, pdl, fixed, **constants, PDL=pdl)

    def __call__(self, normed: torch.Tensor, routing: RouterLogits) -> torch.Tensor:
        self.plan(routing.logits)
        self.gate_up(normed)
        self.down()
        self.sum()
        return self.output
