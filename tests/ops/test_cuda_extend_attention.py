# SPDX-License-Identifier: Apache-2.0
"""Compares attention of new tokens over the paged cache with float32 torch, and checks how it is split and tiled."""

import os
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch.nn import functional as F

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
triton = pytest.importorskip("triton", reason="the kernels need triton")

import triton.language as tl  # noqa: E402

from ops import StepMetadata  # noqa: E402
from ops.cuda import CudaOps, extend_attention  # noqa: E402
from ops.cuda.extend_attention import MAX_PARTS, MAX_SPLITS, find_tile, plan_extend  # noqa: E402
from ops.reference import apply_rotary, rms_norm  # noqa: E402
from ops.step import BLOCK_SIZE, Span, blocks_for, step_inputs  # noqa: E402
from tests.logits import relative_error  # noqa: E402
from tests.ops.test_cuda_kernels import DEVICE, EPS, TOLERANCE, attention_inputs, decode_inputs  # noqa: E402

NAN = float("nan")
# query heads, kv heads, head dim
HEADS = [(4, 2, 32)] if not ON_GPU else [(32, 4, 128), (8, 8, 64), (6, 2, 128), (16, 1, 32), (5, 1, 256), (12, 1, 128)]
# cached and new tokens of each sequence
STEPS = (
    [[(127, 1), (128, 2), (0, 5)], [(100, 40)], [(1, 34), (300, 3), (0, 65)]]
    if not ON_GPU
    else [
        *([(1, 1)], [(63, 1)], [(64, 1), (127, 1), (128, 1), (129, 1)], [(4000, 8)], [(4096, 4)] * 8, [(500, 2)] * 130),
        *([(100, 17)], [(128, 128)], [(1, 700)], [(4000, 300)], [(0, 2049)], [(3000, 1500)]),
        [(5000, 1), (0, 1300), (127, 1), (1, 9), (0, 1), (1600, 16), (2000, 65), (300, 8)],
    ]
)


@pytest.fixture(autouse=True)
def seed(request):
    torch.manual_seed(sum(map(ord, request.node.name)))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles, and with `many_splits` splits, of sizes that the interpreter computes in seconds."""
    if not ON_GPU:
        monkeypatch.setattr(extend_attention, "FEW_ROWS", 16)
        monkeypatch.setattr(extend_attention, "MANY_ROWS", 32)


@pytest.fixture
def many_splits(monkeypatch):
    monkeypatch.setattr(extend_attention, "MIN_SPLIT", 64)
    monkeypatch.setattr(extend_attention, "PROGRAMS", 10**6)
    monkeypatch.setattr("ops.cuda.extend_attention.extend_block", lambda *sizes: 64 if sizes[1] <= 128 else 32)


@pytest.fixture
def unwritten_is_nan(monkeypatch):
    """Fills what `new_empty` allocates with NaN."""
    empty = torch.Tensor.new_empty

    def filled(*args, **options):
        tensor = empty(*args, **options)
        return tensor.fill_(NAN) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


def extend_inputs(spans: list[tuple[int, int]], heads: tuple[int, int, int]):
    """Inputs of a step, which is no decode step, of sequences with (cached, new) tokens."""
    seq_lens, query_lens = [sum(span) for span in spans], [num_new for _, num_new in spans]
    return attention_inputs(seq_lens, query_lens, heads, is_decode=False)


def expected_attention(
    qkv: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor],
    cos_sin: tuple[torch.Tensor, torch.Tensor],
    caches: list[torch.Tensor],
    step: StepMetadata,
) -> torch.Tensor:
    """Attention in float32, one sequence after the other; writes the new keys and values to `caches`."""
    num_kv_heads, head_dim = caches[0].shape[2:]
    heads = qkv.float().unflatten(1, (-1, head_dim))
    *rotated, value = heads.split([heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    query, key = (
        apply_rotary(rms_norm(part, norm.float(), EPS), *cos_sin) for part, norm in zip(rotated, norms, strict=True)
    )
    for cache, new in zip(caches, (key, value), strict=True):
        cache.flatten(0, 1)[step.slot_mapping] = new
    outputs = []
    for row, (q, length) in enumerate(zip(query.split(step.query_lens_list), step.seq_lens_list, strict=True)):
        blocks = step.block_table[row, : blocks_for(length)]
        k, v = (cache[blocks].flatten(0, 1)[:length].transpose(0, 1) for cache in caches)
        positions = torch.arange(length, device=DEVICE)
        seen = positions <= positions[length - len(q) :, None]
        output = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k[None], v[None], seen, enable_gqa=True)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs).flatten(1)


def check_extend(heads: tuple[int, int, int], spans: list[tuple[int, int]]) -> None:
    """Compares outputs, row by row too, and what is written to the caches."""
    qkv, norms, cos_sin, caches, step = extend_inputs(spans, heads)
    expected_caches = [cache.float() for cache in caches]
    expected = expected_attention(qkv, norms, cos_sin, expected_caches, step)
    output = CudaOps().attention(qkv, *norms, EPS, cos_sin, *caches, step)
    assert relative_error(output, expected) < TOLERANCE
    assert max(map(relative_error, output, expected)) < 3 * TOLERANCE
    for cache, expected_cache in zip(caches, expected_caches, strict=True):
        assert torch.equal(cache.isnan(), expected_cache.isnan())
        assert relative_error(cache.nan_to_num(), expected_cache.nan_to_num()) < TOLERANCE


@pytest.mark.parametrize("spans", STEPS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_extend(heads, spans, unwritten_is_nan):
    check_extend(heads, spans)


MANY_NEW = {(4, 2, 32): 12, (3, 1, 32): 12, (16, 1, 32): 4, (2, 2, 64): 20, (5, 1, 256): 8}  # for large tiles


@pytest.mark.parametrize("heads", HEADS if ON_GPU else MANY_NEW, ids=str)
def test_splits(heads, many_splits, unwritten_is_nan):
    """Of both kinds of tiles and of different numbers, where some rows precede a whole split; all kinds of groups."""
    check_extend(heads, [(130, 3), (255, 1), (125, 200 if ON_GPU else MANY_NEW[heads]), (1, 2)])


@pytest.mark.parametrize("num_new", [1, 8, 200] if ON_GPU else [1, 20])
def test_long_context(num_new):
    """With the splits of real sizes."""
    length = 131072 if ON_GPU else 600
    qkv, norms, cos_sin, caches, step = extend_inputs([(length - num_new, num_new), (40, 2)], HEADS[0])
    expected = expected_attention(qkv, norms, cos_sin, [cache.float() for cache in caches], step)
    output = CudaOps().attention(qkv, *norms, EPS, cos_sin, *caches, step)
    assert relative_error(output, expected) < TOLERANCE


def test_chunks_equal_a_whole_prefill():
    """A prompt in chunks, the first without cached tokens, leaves the same cache and computes the same."""
    lengths = [20, 1, 7, 20]
    heads, length = HEADS[0], sum(lengths)
    qkv, norms, cos_sin, caches, step = attention_inputs([length], [length], heads)
    chunk_caches = [cache.clone() for cache in caches]
    whole = CudaOps().attention(qkv, *norms, EPS, cos_sin, *caches, step)
    ops, outputs = CudaOps(), []
    for end, num_new in zip(accumulate(lengths), lengths, strict=True):
        span = Span(end - num_new, num_new, step.block_table[0].tolist(), length)
        _, chunk = step_inputs([span], [[]], DEVICE, is_decode=False)
        rows = slice(end - num_new, end)
        parts = (qkv[rows], *norms, EPS, tuple(part[rows] for part in cos_sin), *chunk_caches, chunk)
        outputs.append(ops.attention(*parts))
    assert relative_error(torch.cat(outputs), whole) < TOLERANCE
    for cache, chunk_cache in zip(caches, chunk_caches, strict=True):
        assert torch.equal(cache.nan_to_num(7), chunk_cache.nan_to_num(7))


def test_sequences_do_not_see_each_others_numbers(many_splits):
    """Nor what blocks and the padding block hold beyond a sequence's tokens, which is NaN here."""
    qkv, norms, cos_sin, caches, step = extend_inputs([(70, 3), (1, 20), (127, 1)], HEADS[0])
    ops = CudaOps()
    expected = ops.attention(qkv, *norms, EPS, cos_sin, *caches, step)
    assert expected.isfinite().all()
    sequence_of = torch.repeat_interleave(torch.arange(3), torch.tensor(step.query_lens_list)).to(DEVICE)
    for failing, length in enumerate(step.seq_lens_list):
        damaged, damaged_caches = qkv.clone(), [cache.clone() for cache in caches]
        damaged[sequence_of == failing] = NAN
        for cache in damaged_caches:
            cache[step.block_table[failing, : blocks_for(length)]] = NAN
        found = ops.attention(damaged, *norms, EPS, cos_sin, *damaged_caches, step)
        assert torch.equal(found[sequence_of != failing], expected[sequence_of != failing])
        assert not found[sequence_of == failing].isfinite().any()


@pytest.mark.parametrize("kind", ["decode", "fresh", "extend"])
def test_no_tokens(kind):
    """A rank without sequences in a step of others."""
    num_heads, num_kv_heads, head_dim = HEADS[0]
    qkv, norms, cos_sin, caches, _ = extend_inputs([(3, 2)], HEADS[0])
    _, step = step_inputs([], [], DEVICE, is_decode=kind == "decode")
    step = replace(step, starts_fresh=kind == "fresh")
    before = [cache.clone() for cache in caches]
    cos_sin = tuple(part[:0] for part in cos_sin)
    output = CudaOps().attention(qkv[:0], *norms, EPS, cos_sin, *caches, step)
    assert output.shape == (0, num_heads * head_dim)
    assert all(torch.equal(old.nan_to_num(7), new.nan_to_num(7)) for old, new in zip(before, caches, strict=True))


@pytest.mark.parametrize(
    "inputs", [lambda: decode_inputs([130, 3], HEADS[0]), lambda: extend_inputs([(129, 2), (3, 40)], HEADS[0])]
)
def test_block_table_may_be_a_view(inputs):
    """Rows and columns of a wider table, whose other entries are the padding block."""
    qkv, norms, cos_sin, caches, step = inputs()
    num_sequences, width = step.block_table.shape
    wide = torch.zeros(num_sequences + 3, width + 5, dtype=torch.int32, device=DEVICE)
    view = wide[1 : 1 + num_sequences, :width].copy_(step.block_table)
    outputs = [
        CudaOps().attention(qkv, *norms, EPS, cos_sin, *caches, replace(step, block_table=table)).clone()
        for table in (step.block_table, view)
    ]
    assert outputs[0].isfinite().all() and torch.equal(*outputs)


@triton.jit
def find_tile_kernel(
    query_starts, seq_lens, found, num_sequences, TOKENS: tl.constexpr, FEW: tl.constexpr, IS_FEW: tl.constexpr
):
    tile = tl.program_id(0)
    sequence, row, num_tokens, position = find_tile(query_starts, seq_lens, num_sequences, tile, TOKENS, FEW, IS_FEW)
    tl.store(found + tile * 4, sequence)
    tl.store(found + tile * 4 + 1, row)
    tl.store(found + tile * 4 + 2, num_tokens)
    tl.store(found + tile * 4 + 3, position)


@pytest.mark.parametrize("num_sequences", [1, 128, 150])
@pytest.mark.parametrize("is_few", [True, False])
def test_tiles_cover_their_sequences(is_few, num_sequences):
    """Every token of the sequences of a kind is in one tile, whatever sequences of the other kind are between."""
    few, tokens = 8, 8 if is_few else 16
    lens = torch.where(
        torch.rand(num_sequences) < 0.5,
        torch.randint(0, few + 1, (num_sequences,)),
        torch.randint(0, 40, (num_sequences,)),
    )
    lens[-1] = few + (not is_few)
    starts = F.pad(lens.cumsum(0), (1, 0))
    seq_lens = lens + torch.randint(0, 1000, (num_sequences,))
    expected = [
        [sequence, int(starts[sequence]) + first, min(length - first, tokens), int(seq_lens[sequence]) - length + first]
        for sequence, length in enumerate(lens.tolist())
        if (length <= few) == is_few
        for first in range(0, length, tokens)
    ]
    found = torch.full((len(expected), 4), -1, device=DEVICE)
    find_tile_kernel[(len(expected),)](
        starts.to(DEVICE), seq_lens.to(DEVICE), found, num_sequences, TOKENS=tokens, FEW=few, IS_FEW=is_few
    )
    assert found.tolist() == expected


def test_plans_cover_the_longest_sequence_in_bounded_memory():
    for _ in range(300):
        count = int(torch.randint(1, 300, ()))
        query_lens = torch.randint(1, int(torch.randint(2, 3000, ())), (count,))
        sequences = [(q, q + int(torch.randint(0, 131072, ()))) for q in query_lens.tolist()]
        tile_tokens, num_kv_heads = (int(torch.randint(1, high, ())) for high in (129, 17))
        plan = plan_extend(sequences, tile_tokens, num_kv_heads)
        longest = max(seq_len for _, seq_len in sequences)
        assert plan.tiles == sum(-(-q // tile_tokens) for q, _ in sequences)
        assert plan.per_split % BLOCK_SIZE == 0
        assert (plan.splits - 1) * plan.per_split < longest <= plan.splits * plan.per_split
        assert plan.splits <= MAX_SPLITS
        assert plan.splits == 1 or plan.tiles * plan.splits * num_kv_heads <= MAX_PARTS


def test_plans_fill_the_gpu():
    """Few tokens of long sequences spread over all programs; whatever fills them anyway, or is short, is not split."""
    plans = {
        32: ([(8, 32768)], 8),
        16: ([(2, 2048)], 8),
        4: ([(4, 32768)] * 8, 8),
        3: ([(640, 30000)], 16),
        1: ([(2048, 32768)], 16),
    }
    for splits, (sequences, tile_tokens) in plans.items():
        assert plan_extend(sequences, tile_tokens, 4).splits == splits
    assert plan_extend([(1, 200)], 8, 4).splits == 1
