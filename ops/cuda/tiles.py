# SPDX-License-Identifier: Apache-2.0
"""Sizes of kernels: what `ops/cuda/tiles.json` says for this device and shape, else a rule that fits any.

The file has a table for every kind of device, by a part of its name. `python -m ops.cuda.tune` measures one.
"""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from ops.cuda.launch import power_of_two_factor

MAX_TOKENS = 8  # of a step that takes the kernels for a few tokens
TABLES_FILE = Path(__file__).with_name("tiles.json")
Table = dict[str, dict[str, list[int]]]  # kernel -> shape of its weight -> sizes

ATTENTION_BLOCK = 128  # cached tokens of a tile
ATTENTION_MAX_ROUNDS = 4  # tiles of a split before a sequence gets more splits than its batch size says
# sequences, query heads of a program, splits of the cache, warps
ATTENTION_SPLITS = ((2, 4, 20, 4), (8, 8, 8, 4), (16, 8, 4, 4))
MANY_SEQUENCES_SPLITS = (8, 2, 4)
# grouped products: rows, columns and depth of a tile, its stages in shared memory, warps
GROUPED_ROWS, GROUPED_COLUMNS, GROUPED_DEPTH, GROUPED_STAGES, GROUPED_WARPS = 128, 256, 64, 4, 8
GROUPED_BARRIERS = 256  # bytes of shared memory, more than stand beside the stages
# of the matrix in the shared memory or the registers of a program, or of a warp
MATMUL_ELEMENTS, GEMV_ELEMENTS, SHARED_GATE_UP_ELEMENTS = 32768, 32768, 16384
DOWN_WARP_ELEMENTS, SHARED_DOWN_WARP_ELEMENTS = 12288, 6144


@functools.cache
def measured() -> Table:
    """The table of this device; empty where none was measured."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return table_of(name)


def table_of(device_name: str) -> Table:
    return tables().get(name_of_table(device_name), {})


def name_of_table(device_name: str) -> str:
    """The part of the device's name that its table has; empty if none has one."""
    return next((part for part in tables() if part in device_name), "")


def tables() -> dict[str, Table]:
    """By part of a device's name."""
    return json.loads(TABLES_FILE.read_text(encoding="utf-8"))


def text_of(tables: dict[str, Table]) -> str:
    """JSON with a line a kernel."""
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
    """For a matrix [n, k]; the rows of a program divide n."""
    if sizes := sizes_of("gemv", n, k):
        return GemvTile(*sizes)
    rows = power_of_two_factor(n, rounded_down(min(4, GEMV_ELEMENTS // k, n // 128)))
    tiles = power_of_two_factor(n // rows, rounded_down(min(2, GEMV_ELEMENTS // (k * rows))))
    return GemvTile(rows, tiles, 8)


def matmul_tile(n: int, k: int, num_tokens: int) -> tuple[int, int]:
    """Rows and warps of a program, for a matrix [n, k] and several tokens."""
    rows = power_of_two_factor(n, rounded_down(min(16, MATMUL_ELEMENTS // k)))
    return rows, 8 if num_tokens <= 4 else 4


def gate_up_tile(f: int, d: int) -> tuple[int, int]:
    """Rows (of the gate and as many of the up part) and warps of a program."""
    if sizes := sizes_of("gate_up", f, d):
        return sizes[0], sizes[1]
    return power_of_two_factor(f, rounded_down(min(8, GEMV_ELEMENTS // (2 * d)))), 4


def down_tile(f: int, d: int, top_k: int) -> tuple[int, int]:
    """Rows and warps of a program that holds them of `top_k` experts."""
    if sizes := sizes_of("down", f, d):
        return sizes[0], sizes[1]
    return rows_and_warps(d, f * top_k, DOWN_WARP_ELEMENTS)


def shared_gate_up_tile(f: int, d: int) -> tuple[int, int]:
    """The same where several tokens share experts."""
    if sizes := sizes_of("shared_gate_up", f, d):
        return sizes[0], sizes[1]
    return power_of_two_factor(f, rounded_down(min(8, SHARED_GATE_UP_ELEMENTS // (2 * d)))), 4


def shared_down_tile(f: int, d: int) -> tuple[int, int]:
    if sizes := sizes_of("shared_down", f, d):
        return sizes[0], sizes[1]
    return rows_and_warps(d, f, SHARED_DOWN_WARP_ELEMENTS)


def rows_and_warps(n: int, k: int, warp_elements: int) -> tuple[int, int]:
    """As many rows of a matrix [n, k] as fit one warp, up to 8; more warps where one row does not."""
    rows = power_of_two_factor(n, rounded_down(min(8, warp_elements // k)))
    return rows, rounded_up(rows * k / warp_elements)


def grouped_stages(device: torch.device) -> int:
    """As many as were fastest, or as the device's shared memory holds."""
    if device.type != "cuda":  # interpreted
        return GROUPED_STAGES
    return stages_within(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


def stages_within(shared_memory: int) -> int:
    """Stages of the grouped products that fit so many bytes."""
    stage_bytes = (GROUPED_ROWS + GROUPED_COLUMNS) * GROUPED_DEPTH * 2
    return min(GROUPED_STAGES, (shared_memory - GROUPED_BARRIERS) // stage_bytes)


def attention_split(num_sequences: int, group_size: int) -> tuple[int, int, int]:
    """Query heads of a program (a power of two that divides the kv head's group), splits of the cache, warps."""
    fitting = (sizes for most, *sizes in ATTENTION_SPLITS if num_sequences <= most)
    heads, splits, warps = next(fitting, MANY_SEQUENCES_SPLITS)
    return power_of_two_factor(group_size, heads), splits, warps


def rounded_down(number: int) -> int:
    """The largest power of two up to `number`, at least 1."""
    return 1 << max(0, number.bit_length() - 1)


def rounded_up(number: float) -> int:
    """The smallest power of two from `number` on, at least 1."""
    return 1 << (max(1, math.ceil(number)) - 1).bit_length()
