# SPDX-License-Identifier: Apache-2.0
"""Tests tile sizes: tables per device, the heuristic without a table, and tuning."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton", reason="the kernels need triton")

from ops.cuda import tiles, tune  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = tune.Shape(d=64, h=2, g=1, c=32, e=6, k=2, f=32, v=96)
if DEVICE == "cpu":  # the interpreter takes seconds a layer
    SHAPE = tune.Shape(d=32, h=1, g=1, c=32, e=4, k=2, f=16, v=64)
INT4_SHAPE = tune.Shape(d=128, h=4, g=1, c=32, e=4, k=2, f=128, v=64)


@pytest.fixture
def table(monkeypatch) -> tiles.Table:
    """Installs an empty tile table."""
    own: tiles.Table = {}
    monkeypatch.setattr(tiles, "measured", lambda: own)
    return own


def test_a_device_is_found_by_a_part_of_its_name(table):
    h100, h200 = (tiles.table_of(f"NVIDIA {name}") for name in ("H100 80GB HBM3", "H200"))
    assert h100["gate_up"] != h200["gate_up"]
    assert tiles.table_of("Some other GPU") == {} == tiles.table_of("")
    assert tiles.gate_up_tile(768, 2048) == (8, 4)  # the heuristic
    table.update(h200)
    assert tiles.gate_up_tile(768, 2048) == tuple(h200["gate_up"]["768x2048"])
    assert tiles.gemv_tile(5120, 2048) == tiles.GemvTile(*h200["gemv"]["5120x2048"])


def test_rules_fit_a_warp_to_what_it_holds(table):
    """30B and 235B shapes, their halves, and an expert too wide for one warp."""
    assert [tiles.down_tile(f, 2048, 8) for f in (384, 768, 1536, 3072)] == [(4, 1), (2, 1), (1, 1), (1, 2)]
    assert [tiles.shared_down_tile(f, 2048) for f in (384, 768, 1536, 12288)] == [(8, 1), (8, 1), (4, 1), (1, 2)]


def test_file_is_as_tune_writes_it():
    text = tiles.TABLES_FILE.read_text(encoding="utf-8")
    assert tiles.text_of(tiles.tables()) == text


@pytest.mark.parametrize("part", tiles.tables())
def test_tables_divide_their_weights(part):
    found = tiles.table_of(part)
    for shape, (rows, count, _) in found["gemv"].items():
        assert int(shape.split("x")[0]) % (rows * count) == 0
    for kernel, side in (("gate_up", 0), ("down", 1), ("shared_gate_up", 0), ("shared_down", 1)):
        for shape, (rows, _) in found[kernel].items():
            assert int(shape.split("x")[side]) % rows == 0


WANTED = {
    "dense": {"gemv": [2, 1, 8], "gate_up": [4, 8], "down": [8, 2], "shared_gate_up": [2, 4], "shared_down": [16, 4]},
    "w4a16": {"linear_int4": [4, 1], "gate_up_int4": [2, 2], "down_int4": [2, 1]}
    | {"shared_gate_up_int4": [4, 1], "shared_down_int4": [4, 1]},
}


@torch.inference_mode()
@pytest.mark.parametrize(("weight_format", "shape"), [("dense", SHAPE), ("w4a16", INT4_SHAPE)])
def test_tune_takes_the_fastest(weight_format, shape, table, monkeypatch, capsys):
    """All candidates give the same result; the table then holds the fastest one by the test's clock."""
    monkeypatch.setattr(tune, "CONTEXT", 128)
    monkeypatch.setattr(tune, "SHARED_TOKENS", 2)
    searches = tune.searches

    def shorter_searches(*arguments):
        for kernel, weight, num_tokens, candidates in searches(*arguments):
            assert wanted[kernel] in candidates[1:]
            other = next(size for size in candidates[1:] if size != wanted[kernel])
            searched.append((kernel, *weight))
            yield kernel, weight, num_tokens, [candidates[0], wanted[kernel], *([other] if len(searched) == 1 else [])]

    monkeypatch.setattr(tune, "searches", shorter_searches)
    results: dict[int, torch.Tensor] = {}
    searched, asked_for = [], set()
    sizes_of = tiles.sizes_of
    monkeypatch.setattr(tiles, "sizes_of", lambda *key: asked_for.add(key) or sizes_of(*key))
    wanted, first = WANTED[weight_format], next(iter(WANTED[weight_format]))

    def clock(work):
        asked_for.clear()
        result = work().clone()
        assert searched[-1] in asked_for  # otherwise the sizes have no effect
        earlier = results.setdefault(len(result), result)
        torch.testing.assert_close(result, earlier, rtol=2e-2, atol=2e-2)
        return 1.0 - sum(size == wanted[kernel] for kernel, sizes in table.items() for size in sizes.values()) / 100

    tune.tune(shape, 1, DEVICE, torch.bfloat16 if DEVICE == "cuda" else torch.float16, weight_format, clock)
    linears = {"dense": 4, "w4a16": 2}[weight_format]
    assert {kernel: list(sizes.values()) for kernel, sizes in table.items()} == {
        kernel: [best] * (linears if kernel == first else 1) for kernel, best in wanted.items()
    }
    assert capsys.readouterr().out.count("us a step") == linears + 4


@pytest.mark.parametrize(
    ("name", "why"),
    [("H100", None), ("80GB", "is called H100"), ("A100", "does not occur in"), ("", "does not occur in")],
)
def test_a_table_is_written_where_it_is_found(name, why):
    refusal = tune.refuses_name(name, "NVIDIA H100 80GB HBM3")
    assert refusal is None if why is None else why in refusal
    assert tune.refuses_name("A100", "NVIDIA A100-SXM4") is None


def test_shape_of_a_rank():
    whole = tune.Shape.read(REPOSITORY / "models/qwen3_moe/shapes/qwen3_30b_a3b/config.json")
    assert whole == tune.Shape(d=2048, h=32, g=4, c=128, e=128, k=8, f=768, v=151936)
    assert whole.of_rank(1) == whole
    assert whole.of_rank(8) == tune.Shape(d=2048, h=4, g=1, c=128, e=128, k=8, f=96, v=18992)
    for tp_size, what in ((0, "32 query heads"), (3, "32 query heads, 151936 vocabulary, 4 kv heads")):
        with pytest.raises(ValueError, match=f"^{tp_size} ranks cannot share {what}"):
            whole.of_rank(tp_size)
