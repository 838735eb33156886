# SPDX-License-Identifier: Apache-2.0
"""Grouped GEMM kernels of the experts for any number of tokens, on tensor cores.

The gate_up GEMM gathers its rows from the unsorted tokens and applies SwiGLU in the epilogue, the down GEMM scatters
its rows to their (token, choice) pairs, so that no separate permutation pass is needed. Weights are loaded through
tensor descriptors (TMA on Hopper). Tiles of an expert run consecutively and share its weight in L2; a last tile with
few rows is computed as half a tile.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ops import GroupedRows, Routing
from ops.cuda.expert_order import SLOT_FIELDS, ExpertOrder
from ops.cuda.launch import BoundKernel, fits, power_of_two_factor
from ops.cuda.moe import combine_kernel
from ops.cuda.tiles import GROUPED_COLUMNS, GROUPED_DEPTH, GROUPED_WARPS, grouped_stages

LEAST_BLOCK = 16  # minimum tile size for tensor cores
COMBINE_BLOCK = 1024
MAX_EXPERTS = 512


@triton.jit
def find_tile(slots, ROWS: tl.constexpr, COLUMN_TILES: tl.constexpr):
    """Maps a program to its tile: expert (-1: no work), first row, end of the expert's rows, column tile index."""
    program = tl.program_id(0)
    fields = slots + program // COLUMN_TILES * SLOT_FIELDS
    expert = tl.load(fields)
    first_row = tl.load(fields + 1)
    end_row = tl.load(fields + 2)
    within = program - tl.load(fields + 3) * COLUMN_TILES
    row_tiles = tl.maximum(tl.load(fields + 4), 1)
    return expert, first_row + within % row_tiles * ROWS, end_row, within // row_tiles


@triton.jit
def gate_up_tile(
    hidden,
    order,
    output,
    weight,
    expert,
    first_row,
    end_row,
    f0,
    D: tl.constexpr,
    F: tl.constexpr,
    TOP_K: tl.constexpr,
    SORTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < end_row
    rows = tl.minimum(rows, end_row - 1)
    tokens = rows if SORTED else tl.load(order + rows) // TOP_K
    addresses = hidden + tokens.to(tl.int64)[:, None] * D + tl.arange(0, DEPTH)[None, :]
    both = tl.zeros([ROWS, 2 * COLUMNS], tl.float32)
    for k in tl.range(0, D, DEPTH, num_stages=STAGES):
        x = tl.load(addresses)
        w = weight.load([expert * 2, f0, k]).reshape(2 * COLUMNS, DEPTH)
        both = tl.dot(x, w.T, both)
        addresses += DEPTH
    gate, up = both.reshape(ROWS, 2, COLUMNS).permute(0, 2, 1).split()
    activated = (gate * tl.sigmoid(gate) * up).to(output.dtype.element_ty)
    target = output + rows.to(tl.int64)[:, None] * F + f0 + tl.arange(0, COLUMNS)[None, :]
    tl.store(target, activated, mask=inside[:, None])


@triton.jit
def grouped_gate_up_kernel(
    hidden,  # [T, D]; [P, D] if the rows are already in expert order (SORTED)
    order,  # [P] int32; ignored if SORTED
    slots,  # [S, SLOT_FIELDS] int32
    output,  # [P, F], rows in `order`
    weight,  # descriptor of [E * 2, F, D] in blocks [2, COLUMNS, DEPTH]
    D: tl.constexpr,
    F: tl.constexpr,
    TOP_K: tl.constexpr,
    SORTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grouped gate_up_proj with SwiGLU, one tile of rows of one expert per program. Grid (S * F / COLUMNS,)."""
    expert, row, end, column = find_tile(slots, ROWS, F // COLUMNS)
    if expert < 0:
        return
    f0 = column * COLUMNS
    if end - row <= ROWS // 2:
        gate_up_tile(
            hidden, order, output, weight, expert, row, end, f0, D, F, TOP_K, SORTED, ROWS // 2, COLUMNS, DEPTH, STAGES
        )
    else:
        gate_up_tile(
            hidden, order, output, weight, expert, row, end, f0, D, F, TOP_K, SORTED, ROWS, COLUMNS, DEPTH, STAGES
        )


@triton.jit
def down_tile(
    activated,
    order,
    output,
    weight,
    expert,
    first_row,
    end_row,
    d0,
    D: tl.constexpr,
    F: tl.constexpr,
    SORTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < end_row
    rows = tl.minimum(rows, end_row - 1)
    addresses = activated + rows.to(tl.int64)[:, None] * F + tl.arange(0, DEPTH)[None, :]
    y = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in tl.range(0, F, DEPTH, num_stages=STAGES):
        x = tl.load(addresses)
        w = weight.load([expert * D + d0, k])
        y = tl.dot(x, w.T, y)
        addresses += DEPTH
    pairs = rows if SORTED else tl.load(order + rows)
    target = output + pairs.to(tl.int64)[:, None] * D + d0 + tl.arange(0, COLUMNS)[None, :]
    tl.store(target, y.to(output.dtype.element_ty), mask=inside[:, None])


@triton.jit
def grouped_down_kernel(
    activated,  # [P, F], rows in `order`
    order,  # [P] int32; ignored if SORTED
    slots,  # [S, SLOT_FIELDS] int32
    output,  # [P, D], a row per pair, or in the row order of `activated` if SORTED; non-local rows undefined
    weight,  # descriptor of [E * D, F] in blocks [COLUMNS, DEPTH]
    D: tl.constexpr,
    F: tl.constexpr,
    SORTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grouped down_proj, one tile of rows of one expert per program. Grid (S * D / COLUMNS,)."""
    expert, row, end, column = find_tile(slots, ROWS, D // COLUMNS)
    if expert < 0:
        return
    d0 = column * COLUMNS
    if end - row <= ROWS // 2:
        down_tile(
            activated, order, output, weight, expert, row, end, d0, D, F, SORTED, ROWS // 2, COLUMNS, DEPTH, STAGES
        )
    else:
        down_tile(activated, order, output, weight, expert, row, end, d0, D, F, SORTED, ROWS, COLUMNS, DEPTH, STAGES)


def grouped_experts_support(hidden_states: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> bool:
    """Returns whether the kernels of this file support these tensors."""
    num_experts, d, f = down.shape
    sizes_fit = num_experts <= MAX_EXPERTS and d % LEAST_BLOCK == 0 and f % LEAST_BLOCK == 0
    return sizes_fit and hidden_states.dtype == gate_up.dtype == down.dtype and fits(hidden_states, gate_up, down)


class GroupedLinear:
    """The two grouped GEMMs of a layer's experts, for any number of rows."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, tile_rows: int, top_k: int, is_sorted: bool):
        num_experts, d, f = down.shape
        self.d, self.f = d, f
        self.gate_up_columns = power_of_two_factor(f, GROUPED_COLUMNS // 2)
        self.down_columns = power_of_two_factor(d, GROUPED_COLUMNS)
        sizes = {"D": d, "F": f, "ROWS": tile_rows, "STAGES": grouped_stages(down.device), "SORTED": is_sorted}
        depth = power_of_two_factor(d, GROUPED_DEPTH)
        columns = {"COLUMNS": self.gate_up_columns, "DEPTH": depth, "TOP_K": top_k}
        by_gate_and_up = gate_up.view(num_experts * 2, f, d)
        weight = TensorDescriptor.from_tensor(by_gate_and_up, [2, self.gate_up_columns, depth])
        self.gate_up = BoundKernel(grouped_gate_up_kernel, (1,), GROUPED_WARPS, False, (weight,), **sizes, **columns)
        depth = power_of_two_factor(f, GROUPED_DEPTH)
        columns = {"COLUMNS": self.down_columns, "DEPTH": depth}
        weight = TensorDescriptor.from_tensor(down.view(num_experts * d, f), [self.down_columns, depth])
        self.down = BoundKernel(grouped_down_kernel, (1,), GROUPED_WARPS, False, (weight,), **sizes, **columns)

    def __call__(
        self, hidden_states: torch.Tensor, order: torch.Tensor, slots: torch.Tensor, num_pairs: int
    ) -> torch.Tensor:
        """Runs both GEMMs -> [num_pairs, D], with rows as in `grouped_down_kernel`."""
        activated = hidden_states.new_empty(num_pairs, self.f)
        self.gate_up.grid = (slots.shape[0] * (self.f // self.gate_up_columns), 1, 1)
        self.gate_up(hidden_states, order, slots, activated)
        output = hidden_states.new_empty(num_pairs, self.d)
        self.down.grid = (slots.shape[0] * (self.d // self.down_columns), 1, 1)
        self.down(activated, order, slots, output)
        return output


class GroupedExpertsCall:
    """Sort by expert, grouped GEMMs and combine (`Ops.experts`) for any number of tokens, bound to the weights."""

    def __init__(self, order: ExpertOrder, gate_up: torch.Tensor, down: torch.Tensor, top_k: int):
        num_experts, d, _ = down.shape
        self.order = order
        self.products = GroupedLinear(gate_up, down, order.tile_rows, top_k, is_sorted=False)
        self.block = min(COMBINE_BLOCK, triton.next_power_of_2(d))
        sizes = {"D": d, "NUM_EXPERTS": num_experts, "TOP_K": top_k, "BLOCK": self.block}
        self.combine = BoundKernel(combine_kernel, (1,), 4, **sizes)

    def __call__(self, hidden_states: torch.Tensor, routing: Routing) -> torch.Tensor:
        order, slots = self.order(routing.topk_ids)
        expert_output = self.products(hidden_states, order, slots, routing.topk_ids.numel())
        output = torch.empty_like(hidden_states)
        self.combine.grid = (output.shape[0], triton.cdiv(output.shape[1], self.block), 1)
        self.combine(expert_output, routing.topk_weights, routing.topk_ids, output)
        return output


class SortedExpertsCall:
    """Grouped GEMMs (`Ops.experts`) of rows already in expert order, bound to a layer's weights."""

    def __init__(self, order: ExpertOrder, gate_up: torch.Tensor, down: torch.Tensor):
        self.order = order
        self.products = GroupedLinear(gate_up, down, order.tile_rows, top_k=1, is_sorted=True)

    def __call__(self, rows: torch.Tensor, routing: GroupedRows) -> torch.Tensor:
        slots = self.order.slots_of(routing.tokens_per_expert, rows.shape[0])
        return self.products(rows, slots, slots, rows.shape[0])
