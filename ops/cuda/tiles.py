# SPDX-License-Identifier: Apache-2.0
"""Sizes of kernels: what was fastest on an H100, or on two H200s, for the shapes measured (docs/gpu.md), else a rule
that fits any."""

from dataclasses import dataclass

from ops.cuda.launch import power_of_two_factor

MAX_TOKENS = 8  # of a step that takes the kernels for a few tokens

# (N, K): rows of a tile, tiles of a program, warps
GEMV_TILES = {
    (5120, 2048): (4, 1, 4),
    (2048, 4096): (4, 1, 8),
    (128, 2048): (1, 1, 8),
    (151936, 2048): (4, 2, 8),
    # on each of two H200s
    (2560, 2048): (4, 1, 4),
    (2048, 2048): (2, 1, 4),
    (75968, 2048): (8, 1, 8),
}
# (F, D): rows, warps
GATE_UP_TILES = {(768, 2048): (2, 8), (384, 2048): (1, 2)}
DOWN_TILES = {(768, 2048): (8, 4), (384, 2048): (8, 8)}
# the same where several tokens share experts: rows, warps
SHARED_GATE_UP_TILES = {(768, 2048): (4, 4)}
SHARED_DOWN_TILES = {(768, 2048): (16, 2)}
ATTENTION_BLOCK = 128  # cached tokens of a tile
ATTENTION_MAX_ROUNDS = 4  # tiles of a split before there are more splits,
ATTENTION_SPLITS_GROWTH = 2  # up to so many times as many; then the splits take more tiles each
# sequences, query heads of a program, splits of the cache, warps
ATTENTION_SPLITS = ((1, 4, 16, 4), (2, 4, 16, 4), (4, 4, 8, 4), (8, 4, 4, 4), (16, 8, 4, 4))
MANY_SEQUENCES_SPLITS = (8, 2, 4)
GEMV_ELEMENTS = 32768  # of the matrix in one program's registers
DOWN_ELEMENTS = 24576
SHARED_ELEMENTS = 16384


@dataclass(frozen=True)
class GemvTile:
    rows: int
    tiles: int
    warps: int


def gemv_tile(n: int, k: int) -> GemvTile:
    """For a matrix [n, k]; the rows of a program divide n."""
    if (n, k) in GEMV_TILES:
        return GemvTile(*GEMV_TILES[n, k])
    rows = power_of_two_factor(n, rounded_down(min(4, GEMV_ELEMENTS // k, n // 128)))
    tiles = power_of_two_factor(n // rows, rounded_down(min(2, GEMV_ELEMENTS // (k * rows))))
    return GemvTile(rows, tiles, 8)


def gate_up_tile(f: int, d: int) -> tuple[int, int]:
    """Rows (of the gate and as many of the up part) and warps of a program."""
    if (f, d) in GATE_UP_TILES:
        return GATE_UP_TILES[f, d]
    return power_of_two_factor(f, rounded_down(min(8, GEMV_ELEMENTS // (2 * d)))), 4


def down_tile(f: int, d: int, top_k: int) -> tuple[int, int]:
    """Rows and warps of a program that holds them of `top_k` experts."""
    if (f, d) in DOWN_TILES:
        return DOWN_TILES[f, d]
    return power_of_two_factor(d, rounded_down(min(8, DOWN_ELEMENTS // (f * top_k)))), 4


def shared_gate_up_tile(f: int, d: int) -> tuple[int, int]:
    if (f, d) in SHARED_GATE_UP_TILES:
        return SHARED_GATE_UP_TILES[f, d]
    return power_of_two_factor(f, rounded_down(min(8, SHARED_ELEMENTS // (2 * d)))), 4


def shared_down_tile(f: int, d: int) -> tuple[int, int]:
    if (f, d) in SHARED_DOWN_TILES:
        return SHARED_DOWN_TILES[f, d]
    return power_of_two_factor(d, rounded_down(min(16, SHARED_ELEMENTS // f))), 4


def attention_split(num_sequences: int, group_size: int) -> tuple[int, int, int]:
    """Query heads of a program (a power of two that divides the kv head's group), splits of the cache, warps."""
    fitting = (sizes for most, *sizes in ATTENTION_SPLITS if num_sequences <= most)
    heads, splits, warps = next(fitting, MANY_SEQUENCES_SPLITS)
    return power_of_two_factor(group_size, heads), splits, warps


def rounded_down(number: int) -> int:
    """The largest power of two up to `number`, at least 1."""
    return 1 << max(0, number.bit_length() - 1)
