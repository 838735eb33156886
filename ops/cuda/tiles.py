# SPDX-License-Identifier: Apache-2.0
"""Tile sizes of kernels: tuned ones from `ops/cuda/tiles.json` for this device and shape, else a heuristic.

The file maps a substring of the device name to a table. `python -m ops.cuda.tune` measures a table.
"""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from ops.cuda.launch import power_of_two_factor

MAX_TOKENS = 8  # maximum tokens of a step for which the decode kernels are used
TABLES_FILE = Path(__file__).with_name("tiles.json")
Table = dict[str, dict[str, list[int]]]  # kernel -> weight shape -> tile sizes

ATTENTION_BLOCK = 128  # cached tokens per tile
ATTENTION_MAX_ROUNDS = 4  # tiles per split above which a sequence gets more splits than its batch size implies
# maximum sequences -> query heads per program, splits, warps
ATTENTION_SPLITS = ((2, 4, 20, 4), (8, 8, 8, 4), (16, 8, 4, 4))
MANY_SEQUENCES_SPLITS = (8, 2, 4)
# grouped GEMM: rows, columns and depth of a tile, pipeline stages, warps
GROUPED_ROWS, GROUPED_COLUMNS, GROUPED_DEPTH, GROUPED_STAGES, GROUPED_WARPS = 128, 256, 64, 4, 8
HOPPER_SHARED_MEMORY = 227 << 10  # bytes per program
GROUPED_BARRIERS = 256  # bytes of shared memory reserved for what is not a pipeline stage (barriers)
# weight elements that a program (or warp, as named) holds in registers or shared memory
MATMUL_ELEMENTS, GEMV_ELEMENTS, SHARED_GATE_UP_ELEMENTS = 32768, 32768, 16384
DOWN_WARP_ELEMENTS, SHARED_DOWN_WARP_ELEMENTS = 12288, 6144


@functools.cache
def measured() -> Table:
    """Returns the tuned table of this device; empty if there is none."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return table_of(name)


def table_of(device_name: str) -> Table:
    return tables().get(name_of_table(device_name), {})


def name_of_table(device_name: str) -> str:
    """Returns the key of the device's table: a substring of its name; empty if there is none."""
    return next((part for part in tables() if part in device_name), "")


def tables() -> dict[str, Table]:
    """Loads all tables, by substring of the device name."""
    return json.loads(TABLES_FILE.read_text(encoding="utf-8"))


def text_of(tables: dict[str, Table]) -> str:
    """Serialises tables to JSON with one line per kernel."""
    devices = []
    for part, table in tables.items():
        lines = [f"  {json.dumps(kernel)}: {json.dumps(sizes)}" for kernel, sizes in table.items()]
        devices.append(f" {json.dumps(part)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(devices) + "\n}\n"


def sizes_of(kernel: str, *shape: int) -> list[int] | None:
    return measured().get(kernel, {}).get("x".join(map(str, shape)))


@dataclass(frozen=True)
class GemvTile:
    rows: int
    tiles: int
    warps: int


def gemv_tile(n: int, k: int) -> GemvTile:
    """Tile of the GEMV kernel for a matrix [n, k]; its rows divide n."""
    if sizes := sizes_of("gemv", n, k):
        return GemvTile(*sizes)
    rows = power_of_two_factor(n, rounded_down(min(4, GEMV_ELEMENTS // k, n // 128)))
    tiles = power_of_two_factor(n // rows, rounded_down(min(2, GEMV_ELEMENTS // (k * rows))))
    return GemvTile(rows, tiles, 8)


def matmul_tile(n: int, k: int, num_tokens: int) -> tuple[int, int]:
    """Rows per program and warps of the skinny GEMM kernel for a matrix [n, k]."""
    rows = power_of_two_factor(n, rounded_down(min(16, MATMUL_ELEMENTS // k)))
    return rows, 8 if num_tokens <= 4 else 4


def gate_up_tile(f: int, d: int) -> tuple[int, int]:
    """Rows per program (of gate and of up each) and warps of the gate_up kernel."""
    if sizes := sizes_of("gate_up", f, d):
        return sizes[0], sizes[1]
    return power_of_two_factor(f, rounded_down(min(8, GEMV_ELEMENTS // (2 * d)))), 4


def down_tile(f: int, d: int, top_k: int) -> tuple[int, int]:
    """Rows per program and warps of the down kernel, which holds rows of `top_k` experts."""
    if sizes := sizes_of("down", f, d):
        return sizes[0], sizes[1]
    return rows_and_warps(d, f * top_k, DOWN_WARP_ELEMENTS)


def shared_gate_up_tile(f: int, d: int) -> tuple[int, int]:
    """Rows per program (of gate and of up each) and warps of the gate_up kernel for several tokens."""
    if sizes := sizes_of("shared_gate_up", f, d):
        return sizes[0], sizes[1]
    return power_of_two_factor(f, rounded_down(min(8, SHARED_GATE_UP_ELEMENTS // (2 * d)))), 4


def shared_down_tile(f: int, d: int) -> tuple[int, int]:
    if sizes := sizes_of("shared_down", f, d):
        return sizes[0], sizes[1]
    return rows_and_warps(d, f, SHARED_DOWN_WARP_ELEMENTS)


def rows_and_warps(n: int, k: int, warp_elements: int) -> tuple[int, int]:
    """Heuristic rows per program and warps for a matrix [n, k]: up to 8 rows in a warp, more warps for long rows."""
    rows = power_of_two_factor(n, rounded_down(min(8, warp_elements // k)))
    return rows, rounded_up(rows * k / warp_elements)


def shared_memory_bytes(device: torch.device) -> int:
    """Shared memory that a program may use; without a GPU (Triton interpreter) that of a Hopper."""
    if device.type != "cuda":
        return HOPPER_SHARED_MEMORY
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def grouped_stages(device: torch.device) -> int:
    """Pipeline stages of the grouped GEMM, limited by the device's shared memory."""
    return stages_within(shared_memory_bytes(device))


def stages_within(shared_memory: int) -> int:
    """Pipeline stages of the grouped GEMM that fit into `shared_memory` bytes, at most GROUPED_STAGES."""
    stage_bytes = (GROUPED_ROWS + GROUPED_COLUMNS) * GROUPED_DEPTH * 2
    return min(GROUPED_STAGES, (shared_memory - GROUPED_BARRIERS) // stage_bytes)


def extend_block(device: torch.device, head_dim: int, is_few: bool) -> int:
    """Cached tokens per iteration of extend attention; with few new tokens two programs share a multiprocessor."""
    if head_dim > 128:
        return 32
    return 128 if not is_few and shared_memory_bytes(device) >= HOPPER_SHARED_MEMORY else 64


def attention_split(num_sequences: int, group_size: int) -> tuple[int, int, int]:
    """Query heads per program (power of two that divides the GQA group), splits, warps of decode attention."""
    fitting = (sizes for most, *sizes in ATTENTION_SPLITS if num_sequences <= most)
    heads, splits, warps = next(fitting, MANY_SEQUENCES_SPLITS)
    return power_of_two_factor(group_size, heads), splits, warps


def rounded_down(number: int) -> int:
    """Rounds down to a power of two, at least 1."""
    return 1 << max(0, number.bit_length() - 1)


def rounded_up(number: float) -> int:
    """Rounds up to a power of two, at least 1."""
    return 1 << (max(1, math.ceil(number)) - 1).bit_length()
