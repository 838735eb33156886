# SPDX-License-Identifier: Apache-2.0
"""Tunes kernel tile sizes on this GPU: `python -m ops.cuda.tune CONFIG.JSON [--format w4a16] [--write NAME]`.

Every candidate is timed within a captured decode step of a few layers with random weights, since the best size in
isolation is often not the best in context. Kernels are tuned one after the other, keeping the best sizes so far. The
kernels of a tensor-parallel rank are tuned without collectives.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from ops import DenseWeight, Weight
from ops.cuda import CudaOps, tiles
from ops.cuda.int4_calls import TILE_COLUMNS, TILE_ROWS, CudaInt4Weight, int4_tile
from ops.step import BLOCK_SIZE, Span, blocks_for, step_inputs
from ops.weight import DENSE, Int4Weight

LAYERS = 8  # so that the weights do not stay in the L2 cache
CONTEXT = 1024
REPLAYS, ROUNDS = 20, 5
SHARED_TOKENS = 4  # tokens of the step that times the kernels of batched_experts.py
EPS = 1e-6
FORMATS = (DENSE, Int4Weight.format_name)
MAX_THREAD_BYTES = 512
WARP_ELEMENTS = 12288  # maximum weight elements in the registers of a warp
# kernel, weight shape, tokens of the timed step, candidates; the first is the current one
Search = tuple[str, tuple[int, int], int, list[list[int]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Model sizes; letters as in ops/__init__.py."""

    d: int
    h: int
    g: int
    c: int
    e: int
    k: int
    f: int
    v: int

    @classmethod
    def read(cls, path: Path) -> "Shape":
        """Reads the sizes from a checkpoint's config.json."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        d, h = raw["hidden_size"], raw["num_attention_heads"]
        return cls(
            d=d,
            h=h,
            g=raw["num_key_value_heads"],
            c=raw.get("head_dim") or d // h,
            e=raw["num_experts"],
            k=raw["num_experts_per_tok"],
            f=raw["moe_intermediate_size"],
            v=raw["vocab_size"],
        )

    def of_rank(self, tp_size: int) -> "Shape":
        """Returns the sizes of one of `tp_size` tensor-parallel ranks; raises ValueError if they do not divide evenly.

        With more ranks than kv heads, kv heads are replicated, one per rank.
        """
        split = {"query heads": self.h, "expert columns": self.f, "vocabulary": self.v}
        split |= {"kv heads": max(self.g, tp_size)}
        if uneven := [f"{size} {what}" for what, size in split.items() if tp_size < 1 or size % tp_size]:
            raise ValueError(f"{tp_size} ranks cannot share {', '.join(uneven)}")
        h, f, v, g = (size // tp_size for size in split.values())
        return dataclasses.replace(self, h=h, f=f, v=v, g=g)


def random_int4(*shape: int, device: str, dtype: torch.dtype) -> CudaInt4Weight:
    """Whole tiles with a scale per row."""
    *experts, n, k = shape
    tiles = (*experts, n // TILE_ROWS, k // TILE_COLUMNS)
    words = torch.randint(-(2**15), 2**15, (*tiles, TILE_ROWS * TILE_COLUMNS // 4), dtype=torch.int16, device=device)
    scales = torch.randn(*tiles, TILE_ROWS, device=device).mul_(0.005)
    zeros = torch.randint(16, 32, scales.shape, device=device)
    return CudaInt4Weight(words, torch.stack((scales, zeros), dim=-1).flatten(-2).to(dtype), k)


class Layers:
    """A few layers and an LM head with random weights, and the inputs of a decode step of `num_tokens` sequences."""

    def __init__(
        self, shape: Shape, num_layers: int, num_tokens: int, device: str, dtype: torch.dtype, weight_format: str
    ):
        def random(*size: int, std: float = 0.02) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device).normal_(0, std)

        def weight(*size: int) -> Weight:
            if weight_format == DENSE:
                return DenseWeight(random(*size))
            return random_int4(*size, device=device, dtype=dtype)

        s, self.shape = shape, shape
        blocks = blocks_for(CONTEXT)
        self.layers = [
            {
                "qkv": weight((s.h + 2 * s.g) * s.c, s.d),
                "o": weight(s.d, s.h * s.c),
                "router": random(s.e, s.d),
                "gate_up": weight(s.e, 2 * s.f, s.d),
                "down": weight(s.e, s.d, s.f),
                "norms": [1 + random(size) for size in (s.d, s.d, s.c, s.c)],
                "cache": [random(1 + num_tokens * blocks, BLOCK_SIZE, s.g, s.c, std=1) for _ in range(2)],
            }
            for _ in range(num_layers)
        ]
        self.norm, self.lm_head = 1 + random(s.d), DenseWeight(random(s.v, s.d))
        self.hidden_states = random(num_tokens, s.d, std=1)
        self.cos_sin = tuple(torch.rand(num_tokens, s.c, device=device) for _ in range(2))
        spans = [
            Span(CONTEXT - 1, 1, list(range(1 + row * blocks, 1 + (row + 1) * blocks)), CONTEXT - 1)
            for row in range(num_tokens)
        ]
        self.step = step_inputs(spans, [[]] * num_tokens, device)[1]

    def run(self, ops: CudaOps) -> torch.Tensor:
        hidden_states, residual = self.hidden_states, None
        for layer in self.layers:
            norm_1, norm_2, q_norm, k_norm = layer["norms"]
            qkv, residual = ops.norm_linear(hidden_states, residual, norm_1, EPS, layer["qkv"])
            key_cache, value_cache = layer["cache"]
            attended = ops.attention(qkv, q_norm, k_norm, EPS, self.cos_sin, key_cache, value_cache, self.step)
            hidden_states = ops.linear(attended, layer["o"])
            normed, residual, routing = ops.route(
                hidden_states, residual, norm_2, EPS, layer["router"], self.shape.k, True
            )
            hidden_states = ops.experts(normed, routing, layer["gate_up"], layer["down"])
        return ops.norm_linear(hidden_states, residual, self.norm, EPS, self.lm_head)[0]


def graph_us(work: Callable[[], object]) -> float:
    """Measures the time of a graph replay in microseconds, median of several rounds."""
    recorder = CudaOps().graph_recorder()
    recorder.warm_up(work)
    _, replay = recorder.record(work)
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPLAYS):
            replay([])
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / REPLAYS)
    return sorted(times)[ROUNDS // 2]


def searches(shape: Shape, weight_format: str) -> Iterator[Search]:
    """Lists the tile searches of all kernels of a format, sorted by tokens per step."""
    f, d = shape.f, shape.d
    if weight_format != DENSE:
        yield from int4_searches(shape)
        return
    qkv, o, router, lm_head = ((shape.h + 2 * shape.g) * shape.c, d), (d, shape.h * shape.c), (shape.e, d), (shape.v, d)
    yield from (gemv_search(n, k) for n, k in (qkv, o, router, lm_head))
    yield "gate_up", (f, d), 1, [[*tiles.gate_up_tile(f, d)], *rows_and_warps(f, 2 * d)]
    yield "down", (f, d), 1, [[*tiles.down_tile(f, d, shape.k)], *rows_and_warps(d, f * shape.k)]
    yield "shared_gate_up", (f, d), SHARED_TOKENS, [[*tiles.shared_gate_up_tile(f, d)], *rows_and_warps(f, 2 * d)]
    yield "shared_down", (f, d), SHARED_TOKENS, [[*tiles.shared_down_tile(f, d)], *rows_and_warps(d, f)]


def int4_searches(shape: Shape) -> Iterator[Search]:
    f, d = shape.f, shape.d
    for n, k in (((shape.h + 2 * shape.g) * shape.c, d), (d, shape.h * shape.c)):
        yield "linear_int4", (n, k), 1, [[*int4_tile("linear_int4", n, k)], *tiles_and_warps(n, k)]
    for prefix, num_tokens, experts in (("", 1, shape.k), ("shared_", SHARED_TOKENS, 1)):
        gate_up, down = f"{prefix}gate_up_int4", f"{prefix}down_int4"
        yield gate_up, (f, d), num_tokens, [[*int4_tile(gate_up, f, d, 2)], *tiles_and_warps(f, d, 2)]
        yield down, (d, f), num_tokens, [[*int4_tile(down, d, f, experts)], *tiles_and_warps(d, f, experts)]


def tiles_and_warps(n: int, k: int, matrices: int = 1) -> list[list[int]]:
    """Candidate tiles of a column, and warps, of programs that hold 4-bit weights in registers."""
    return [
        [count, warps]
        for count in (1, 2, 4)
        for warps in (1, 2, 4, 8)
        if n % (TILE_ROWS * count) == 0
        and warps <= matrices * max(1, k // TILE_COLUMNS)
        and matrices * count * TILE_ROWS * k // 2 <= 32 * warps * MAX_THREAD_BYTES
    ]


def rows_and_warps(n: int, k: int) -> list[list[int]]:
    """Candidate rows and warps for programs that hold whole rows of a matrix [n, k] in registers."""
    return [
        [rows, warps]
        for rows in (1, 2, 4, 8, 16)
        for warps in (1, 2, 4, 8)
        if n % rows == 0 and rows * k <= warps * WARP_ELEMENTS
    ]


def gemv_search(n: int, k: int) -> Search:
    """Search over GEMV tiles for a matrix [n, k]."""
    current = tiles.gemv_tile(n, k)
    sizes = [[rows, count, warps] for rows in (1, 2, 4, 8) for count in (1, 2) for warps in (4, 8)]
    sizes = [size for size in sizes if n % (size[0] * size[1]) == 0 and size[0] * size[1] * k <= tiles.GEMV_ELEMENTS]
    return "gemv", (n, k), 1, [[current.rows, current.tiles, current.warps], *sizes]


def tune(
    shape: Shape,
    num_layers: int,
    device: str,
    dtype: torch.dtype,
    weight_format: str = DENSE,
    time_of: Callable[..., float] = graph_us,
) -> tiles.Table:
    """Tunes all kernels; updates this process's table with the fastest sizes and returns it."""
    table = tiles.measured()
    layers: Layers | None = None
    for kernel, (n, k), num_tokens, candidates in searches(shape, weight_format):
        if layers is None or len(layers.hidden_states) != num_tokens:
            layers = None  # free its memory
            layers = Layers(shape, num_layers, num_tokens, device, dtype, weight_format)
        sizes, times = table.setdefault(kernel, {}), []
        for candidate in tqdm(candidates, desc=f"{kernel} {n}x{k}", leave=False):
            sizes[f"{n}x{k}"] = candidate
            times.append(step_us(layers, time_of))
        best = min(range(len(times)), key=times.__getitem__)
        sizes[f"{n}x{k}"] = candidates[best]
        print(f"{kernel} {n}x{k}: {candidates[best]} {times[best]:.1f} us a step, was {candidates[0]} {times[0]:.1f}")
    return table


def step_us(layers: Layers, time_of: Callable[..., float]) -> float:
    ops = CudaOps()  # new instance: kernels are bound with the current table
    return time_of(lambda: layers.run(ops))


def refuses_name(name: str, device_name: str) -> str | None:
    """Returns why `name` cannot be the key of this device's table, or None."""
    if not name or name not in device_name:
        return f"{name!r} does not occur in the name of this device, {device_name}"
    existing = tiles.name_of_table(device_name)
    return None if existing in ("", name) else f"the table of {device_name} is called {existing}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ops.cuda.tune", description=__doc__)
    parser.add_argument("config", type=Path, help="config.json of a checkpoint: the shape to tune for")
    parser.add_argument("--tp-size", type=int, default=1, help="ranks that share every matrix; 1 unless given")
    parser.add_argument("--format", choices=FORMATS, default=DENSE, help="of the projections; dense unless given")
    parser.add_argument("--write", metavar="NAME", help="keep the table under this part of the device's name")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no GPU to measure")
    if arguments.write is not None and (refusal := refuses_name(arguments.write, torch.cuda.get_device_name())):
        parser.error(f"--write: {refusal}")
    try:
        shape = Shape.read(arguments.config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{arguments.config}: expected the config.json of a mixture of experts ({error!r})")
    try:
        shape = shape.of_rank(arguments.tp_size)
    except ValueError as error:
        parser.error(f"--tp-size: {error}")
    with torch.inference_mode():
        table = tune(shape, LAYERS, "cuda", torch.bfloat16, arguments.format)
    if arguments.write:
        tables = tiles.tables() | {arguments.write: table}
        tiles.TABLES_FILE.write_text(tiles.text_of(tables), encoding="utf-8")


if __name__ == "__main__":
    main()
