# SPDX-License-Identifier: Apache-2.0
"""Compares the Triton kernels with the float32 reference: small shapes in the interpreter, real ones on a GPU."""

import os
from dataclasses import replace
from functools import partial

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton", reason="the kernels need triton")

from ops import OPERATIONS, DenseWeight, GroupedRows, RouterLogits, Routing  # noqa: E402
from ops.cuda import CudaOps, launch  # noqa: E402
from ops.cuda.expert_order import ExpertOrder  # noqa: E402
from ops.cuda.linear import SMALL_BYTES, LinearCall, NormLinearCall, RouteCall  # noqa: E402
from ops.cuda.matmul import MatmulCall, NormMatmulCall, matmul_supports  # noqa: E402
from ops.cuda.tiles import ATTENTION_BLOCK  # noqa: E402
from ops.cuda.triton_internals import COMPILES_NARROW_DOT  # noqa: E402
from ops.reference import ReferenceOps  # noqa: E402
from ops.step import BLOCK_SIZE, Span, blocks_for, slots, step_inputs  # noqa: E402
from tests.logits import relative_error  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float16  # the interpreter treats bfloat16 matrices as integers in tl.dot
EPS = 1e-6
TOLERANCE = 1e-2
TOKEN_COUNTS = [1, 2, 5, 8] if ON_GPU else [1, 3]
SIZES = [(2048, 5120), (4096, 2048), (2048, 128), (128, 1024)] if ON_GPU else [(64, 48), (32, 7)]
REFERENCE = ReferenceOps()


@pytest.fixture(autouse=True)
def seed(request):
    torch.manual_seed(sum(map(ord, request.node.name)))


def random(*shape, std=1.0, dtype=DTYPE):
    return (torch.randn(shape, device=DEVICE) * std).to(dtype)


def poison(ops: CudaOps) -> None:
    """Fills all output buffers with NaN, so that unwritten elements are detected."""
    for call in ops.calls.values():
        for name in ("output", "residual", "normed", "activated", "partial"):
            buffer = getattr(call, name, None)
            if buffer is not None and buffer.dtype.is_floating_point:
                buffer.fill_(float("nan"))


def test_fallbacks():
    """For supported dtypes no operation falls back."""
    ops = CudaOps()
    assert [ops.fallbacks(dtype) for dtype in (torch.bfloat16, torch.float16)] == [[], []]
    assert ops.fallbacks(torch.float32) == OPERATIONS


def kind_of_product(weight: DenseWeight, num_tokens: int, by_rows: type, on_tensor_cores: type) -> type:
    """Expected kernel: for several tokens the skinny GEMM unless the matrix is small; torch if unsupported."""
    if num_tokens == 1 or weight.data.nbytes <= SMALL_BYTES:
        return by_rows
    return on_tensor_cores if COMPILES_NARROW_DOT else partial


def run_twice(ops: CudaOps, run, *kinds: type):
    """Runs a call twice, at binding and with poisoned buffers; the results must be bitwise equal.

    Exactly the call types `kinds` must be bound; by default any except torch's.
    """
    first = [tensor.clone() for tensor in run()]
    bound = {type(call) for call in ops.calls.values()}
    assert bound == set(kinds) if kinds else partial not in bound, "not the kernel expected"
    poison(ops)
    second = run()
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    return second


def float_weight(weight: DenseWeight) -> DenseWeight:
    return DenseWeight(weight.data.float())


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_tokens", TOKEN_COUNTS)
@pytest.mark.parametrize("k, n", SIZES)
def test_linear(k, n, num_tokens, has_bias):
    ops, x, weight = CudaOps(), random(num_tokens, k), DenseWeight(random(n, k, std=k**-0.5))
    bias = random(n) if has_bias else None
    kind = kind_of_product(weight, num_tokens, LinearCall, MatmulCall)
    [y] = run_twice(ops, lambda: [ops.linear(x, weight, bias)], kind)
    expected = REFERENCE.linear(x.float(), float_weight(weight), None if bias is None else bias.float())
    assert relative_error(y, expected) < TOLERANCE


@pytest.mark.skipif(not COMPILES_NARROW_DOT, reason="torch's products with this Triton")
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("num_tokens", [2, 3, 5, 8])
@pytest.mark.parametrize("k, n", [(1536, 2000), (8192, 1024), (2560, 264)] if ON_GPU else [(64, 48), (96, 8), (32, 24)])
def test_products_on_tensor_cores(k, n, num_tokens, has_residual, monkeypatch):
    """Includes widths that are not powers of two; padding rows do not change other rows."""
    monkeypatch.setattr("ops.cuda.linear.SMALL_BYTES", 0)
    padded_x, weight, bias = random(8, k), DenseWeight(random(n, k, std=k**-0.5)), random(n)
    x, gain = padded_x[:num_tokens], 1 + random(k, std=0.2)
    residual = random(num_tokens, k, std=3, dtype=torch.float32) if has_residual else None
    ops = CudaOps()
    [y] = run_twice(ops, lambda: [ops.linear(x, weight, bias)], MatmulCall)
    assert relative_error(y, REFERENCE.linear(x.float(), float_weight(weight), bias.float())) < TOLERANCE
    rows = {2: 2, 3: 4, 5: 8, 8: 8}[num_tokens]
    assert torch.equal(CudaOps().linear(padded_x[:rows], weight, bias)[:num_tokens], y)
    ops = CudaOps()
    y, summed = run_twice(ops, lambda: ops.norm_linear(x, residual, gain, EPS, weight, bias), NormMatmulCall)
    expected = REFERENCE.norm_linear(x.float(), residual, gain.float(), EPS, float_weight(weight), bias.float())
    assert relative_error(y, expected[0]) < TOLERANCE
    assert relative_error(summed, expected[1]) < 1e-6


@pytest.mark.parametrize(
    ("num_tokens", "k", "n"),
    [(1, 64, 8), (9, 64, 8), (2, 64, 4), (2, 24, 8), (2, 16 * 17, 8), (2, 16384, 8), (2, 2048, 6152)],
)
def test_what_tensor_cores_do_not_take(num_tokens, k, n):
    """One or many tokens, few rows, odd columns, too many parts, long rows, a matrix too large for shared memory."""
    assert not matmul_supports(random(num_tokens, k), torch.empty(n, k, dtype=DTYPE, device=DEVICE))


def test_the_router_of_several_tokens_may_be_large(monkeypatch):
    monkeypatch.setattr("ops.cuda.linear.SMALL_BYTES", 0)
    ops = CudaOps()
    ops.route(random(2, 64), None, random(64), EPS, random(16, 64), 4, True)
    assert [type(call) for call in ops.calls.values()] == [RouteCall]


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("num_tokens", TOKEN_COUNTS)
@pytest.mark.parametrize("k, n", SIZES)
def test_norm_linear(k, n, num_tokens, has_residual):
    ops, x, weight = CudaOps(), random(num_tokens, k), DenseWeight(random(n, k, std=k**-0.5))
    residual = random(num_tokens, k, std=3, dtype=torch.float32) if has_residual else None
    gain = 1 + random(k, std=0.2)
    kind = kind_of_product(weight, num_tokens, NormLinearCall, NormMatmulCall)
    y, summed = run_twice(ops, lambda: ops.norm_linear(x, residual, gain, EPS, weight), kind)
    expected = REFERENCE.norm_linear(x.float(), residual, gain.float(), EPS, float_weight(weight))
    assert relative_error(y, expected[0]) < TOLERANCE
    assert relative_error(summed, expected[1]) < 1e-6


@pytest.mark.parametrize("d", [2048, 1536] if ON_GPU else [64, 48])
@pytest.mark.parametrize("has_residual", [False, True])
def test_add_norm_of_many_tokens(d, has_residual):
    x = random(19, d)
    residual = random(19, d, dtype=torch.float32) if has_residual else None
    gain = 1 + random(d, std=0.2)
    normed, summed = CudaOps().add_norm(x, residual, gain, EPS)
    expected = REFERENCE.add_norm(x.float(), residual, gain.float(), EPS)
    assert relative_error(normed, expected[0]) < TOLERANCE
    assert relative_error(summed, expected[1]) < 1e-6


def test_silu_and_mul():
    gate_up = random(21, 1536 if ON_GPU else 80)
    assert relative_error(CudaOps().silu_and_mul(gate_up), REFERENCE.silu_and_mul(gate_up.float())) < TOLERANCE


def attention_inputs(
    seq_lens: list[int], query_lens: list[int], heads: tuple[int, int, int], is_decode: bool | None = None
):
    """Sequences of `seq_lens` tokens, of which `query_lens` are new: qkv, norms, cos and sin, caches, step.

    heads: H, G, C. The cache blocks are shuffled, with NaN in every cache entry that must be masked.
    """
    num_heads, num_kv_heads, head_dim = heads
    blocks_of = list(map(blocks_for, seq_lens))
    order = (torch.randperm(sum(blocks_of)) + 1).split(blocks_of)
    spans = [
        Span(length - query_len, query_len, blocks.tolist(), length)
        for length, query_len, blocks in zip(seq_lens, query_lens, order, strict=True)
    ]
    _, step = step_inputs(spans, [[]] * len(spans), DEVICE, is_decode=is_decode)
    cached = [slot for span in spans for slot in slots(replace(span, num_computed=0, num_new=span.num_computed))]
    caches = []
    for _ in range(2):
        cache = torch.full((sum(blocks_of) + 1, BLOCK_SIZE, num_kv_heads, head_dim), float("nan"))
        cache.flatten(0, 1)[cached] = torch.randn(len(cached), num_kv_heads, head_dim)
        caches.append(cache.to(DEVICE, DTYPE))
    angles = step.positions[:, None] * 1e4 ** (-torch.arange(head_dim // 2, device=DEVICE) / (head_dim // 2))
    angles = torch.cat((angles, angles), dim=-1)
    qkv = random(step.num_tokens, (num_heads + 2 * num_kv_heads) * head_dim)
    norms = (1 + random(head_dim, std=0.2), 1 + random(head_dim, std=0.2))
    return qkv, norms, (angles.cos().float(), angles.sin().float()), caches, step


def decode_inputs(seq_lens: list[int], heads: tuple[int, int, int]):
    """Inputs of a decode step: one new token per sequence."""
    return attention_inputs(seq_lens, [1] * len(seq_lens), heads, is_decode=True)


HEADS = [(32, 4, 128), (8, 8, 64), (6, 2, 128)] if ON_GPU else [(4, 2, 32), (3, 1, 32)]
LENGTHS = (
    [[1], [129], [130], [1, 300, 64]]
    if not ON_GPU
    else [
        *([1], [2], [64], [65], [128], [129], [1024], [4081], [1, 4000]),
        *([3, 500, 128, 1000], [700, 1, 64, 65, 128, 129, 2000, 31], [40] * 13),
        # exactly two splits; so long that no split is left for the new token
        *([130], [16000], [8000, 129, 130, 1], [1, 1600] * 9),
    ]
)


@pytest.mark.parametrize("seq_lens", LENGTHS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_decode_attention(heads, seq_lens):
    qkv, norms, cos_sin, caches, step = decode_inputs(seq_lens, heads)
    # the reference gathers whole blocks: weight 0 times NaN is NaN
    expected_caches = [cache.float().nan_to_num() for cache in caches]
    expected = REFERENCE.attention(qkv.float(), *(n.float() for n in norms), EPS, cos_sin, *expected_caches, step)
    ops = CudaOps()
    [output] = run_twice(ops, lambda: [ops.attention(qkv, *norms, EPS, cos_sin, *caches, step)])
    assert relative_error(output, expected) < TOLERANCE
    for cache, expected_cache in zip(caches, expected_caches, strict=True):
        assert relative_error(cache.nan_to_num(), expected_cache) < TOLERANCE


def test_combination_is_compiled_with_the_first_token():
    """Not when a sequence outgrows one tile, where compiling would stall generation; until then it is not called."""
    qkv, norms, cos_sin, caches, step = decode_inputs([7], HEADS[0])
    ops = CudaOps()
    ops.attention(qkv, *norms, EPS, cos_sin, *caches, step)
    [call] = ops.calls.values()
    calls = []
    call.combine = calls.append
    ops.attention(qkv, *norms, EPS, cos_sin, *caches, step)
    assert not calls
    call.table_width = -1  # as before the first token
    ops.attention(qkv, *norms, EPS, cos_sin, *caches, step)
    assert len(calls) == 1


@pytest.mark.parametrize("num_tiles", [2, 3, 5, 8, 9])
def test_splits_of_a_sequence_do_not_depend_on_the_grid(num_tiles, monkeypatch):
    """Results are correct, and the same with a wider block table, as splits and then tiles per split grow.

    With eight tiles no split is left for the new token.
    """
    monkeypatch.setattr("ops.cuda.tiles.ATTENTION_SPLITS", ((1, 4, 2, 4),))
    monkeypatch.setattr("ops.cuda.attention.ATTENTION_MAX_ROUNDS", 2)
    length = num_tiles * ATTENTION_BLOCK - int(torch.randint(0, 3, ()))
    qkv, norms, cos_sin, caches, step = decode_inputs([length], HEADS[0])
    expected_caches = [cache.float().nan_to_num() for cache in caches]
    expected = REFERENCE.attention(qkv.float(), *(n.float() for n in norms), EPS, cos_sin, *expected_caches, step)
    ops, outputs = CudaOps(), []
    for unused in (0, 30, 0):
        wider = replace(step, block_table=torch.nn.functional.pad(step.block_table, (0, unused)))
        outputs.append(ops.attention(qkv, *norms, EPS, cos_sin, *caches, wider).clone())
        poison(ops)
    assert relative_error(outputs[0], expected) < TOLERANCE
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(
    "seq_lens",
    [[1], [130, 3], [64] * 3, [3, 61, 1, 70]] + ([[512], [700, 1024], [4080], [1000, 3000]] if ON_GPU else []),
    ids=str,
)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_prefill_attention(heads, seq_lens):
    qkv, norms, cos_sin, caches, step = attention_inputs(seq_lens, seq_lens, heads)
    expected_caches = [cache.float().nan_to_num() for cache in caches]
    expected = REFERENCE.attention(qkv.float(), *(n.float() for n in norms), EPS, cos_sin, *expected_caches, step)
    output = CudaOps().attention(qkv, *norms, EPS, cos_sin, *caches, step)
    assert relative_error(output, expected) < TOLERANCE
    for cache, expected_cache in zip(caches, expected_caches, strict=True):
        assert relative_error(cache.nan_to_num(), expected_cache) < TOLERANCE


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("num_tokens", [*TOKEN_COUNTS, 9, 33])
def test_route(num_tokens, renormalize):
    num_experts, d, top_k = (128, 2048, 8) if ON_GPU else (10, 64, 3)
    ops, x, gain = CudaOps(), random(num_tokens, d), 1 + random(d, std=0.2)
    residual = random(num_tokens, d, dtype=torch.float32)
    router = random(num_experts, d, std=d**-0.5)
    normed, summed, routing = ops.route(x, residual, gain, EPS, router, top_k, renormalize)
    expected = REFERENCE.route(x.float(), residual, gain.float(), EPS, router.float(), top_k, renormalize)
    assert relative_error(normed, expected[0]) < TOLERANCE
    assert relative_error(summed, expected[1]) < 1e-6
    chosen = routing.chosen()
    # near-tied experts may swap; their weights then hardly differ
    assert relative_error(chosen.topk_weights, expected[2].topk_weights) < 2 * TOLERANCE
    assert all(len(set(ids)) == top_k and max(ids) < num_experts for ids in chosen.topk_ids.tolist())
    assert isinstance(routing, RouterLogits if num_tokens <= 8 else Routing)


def expert_weights(num_experts: int, d: int, f: int) -> tuple[DenseWeight, DenseWeight]:
    return (
        DenseWeight(random(num_experts, 2 * f, d, std=d**-0.5)),
        DenseWeight(random(num_experts, d, f, std=f**-0.5)),
    )


if ON_GPU:
    EXPERT_SIZES = [(128, 2048, 768, 8), (16, 128, 128, 4), (6, 512, 96, 1)]
else:
    EXPERT_SIZES = [(10, 64, 48, 3), (5, 32, 16, 1)]


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("num_tokens", TOKEN_COUNTS)
@pytest.mark.parametrize("num_experts, d, f, top_k", EXPERT_SIZES)
def test_experts_of_few_tokens(num_experts, d, f, top_k, num_tokens, renormalize):
    ops, x = CudaOps(), random(num_tokens, d)
    gate_up, down = expert_weights(num_experts, d, f)
    routing = RouterLogits(random(num_tokens, num_experts, std=2, dtype=torch.float32), top_k, renormalize)
    [output] = run_twice(ops, lambda: [ops.experts(x, routing, gate_up, down)])
    expected = REFERENCE.experts(x.float(), routing, float_weight(gate_up), float_weight(down))
    assert relative_error(output, expected) < TOLERANCE


def test_experts_that_all_of_eight_tokens_chose():
    """A slot of the plan is then full."""
    num_experts, d, f, top_k = EXPERT_SIZES[0]
    ops, x = CudaOps(), random(8, d)
    gate_up, down = expert_weights(num_experts, d, f)
    logits = random(8, num_experts, dtype=torch.float32)
    logits[:, 1 : top_k + 1] += 100
    routing = RouterLogits(logits, top_k, True)
    [output] = run_twice(ops, lambda: [ops.experts(x, routing, gate_up, down)])
    expected = REFERENCE.experts(x.float(), routing, float_weight(gate_up), float_weight(down))
    assert relative_error(output, expected) < TOLERANCE


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("num_tokens", TOKEN_COUNTS)
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_experts_of_few_tokens_on_one_of_three_ranks(rank, num_tokens, renormalize):
    """The last rank has only experts without tokens and returns zeros."""
    num_experts, d, f, top_k = (96, 2048, 768, 8) if ON_GPU else (9, 64, 48, 3)
    count = num_experts // 3
    ops, x = CudaOps(), random(num_tokens, d)
    gate_up, down = expert_weights(count, d, f)
    logits = random(num_tokens, num_experts, std=2, dtype=torch.float32)
    logits[:, 2 * count :] -= 100
    routing = RouterLogits(logits, top_k, renormalize).of_rank(rank * count, count)
    [output] = run_twice(ops, lambda: [ops.experts(x, routing, gate_up, down)])
    expected = REFERENCE.experts(x.float(), routing, float_weight(gate_up), float_weight(down))
    if rank == 2:
        assert not output.any() and not expected.any()
    else:
        assert relative_error(output, expected) < TOLERANCE


def test_equal_logits_choose_the_lower_expert():
    ops, x = CudaOps(), random(2, 32)
    gate_up, down = expert_weights(8, 32, 16)
    logits = torch.tensor([[1.0, -1, 1, 0, 1, -0.0, 1, 0], [-3.0] * 8], device=DEVICE)
    weights = torch.full((2, 3), 1 / 3, device=DEVICE)
    expected_routing = Routing(weights, torch.tensor([[0, 2, 4], [0, 1, 2]], device=DEVICE))
    output = ops.experts(x, RouterLogits(logits, 3, True), gate_up, down)
    expected = REFERENCE.experts(x.float(), expected_routing, float_weight(gate_up), float_weight(down))
    assert relative_error(output, expected) < TOLERANCE


@pytest.mark.parametrize("num_tokens", [1, 9, 200, 4080] if ON_GPU else [1, 9, 300])
@pytest.mark.parametrize("has_elsewhere", [False, True])
@pytest.mark.parametrize("num_experts, d, f, top_k", EXPERT_SIZES)
def test_experts_of_many_tokens(num_experts, d, f, top_k, has_elsewhere, num_tokens):
    ops, x = CudaOps(), random(num_tokens, d)
    gate_up, down = expert_weights(num_experts, d, f)
    logits = random(num_tokens, num_experts, std=2, dtype=torch.float32)
    logits[:, 1] = -1e4  # one expert without rows, one with many
    logits[:, 2] += 4
    routing = RouterLogits(logits, top_k, True).chosen()
    if has_elsewhere:
        elsewhere = torch.rand(num_tokens, top_k, device=DEVICE) < 0.3
        elsewhere[0, 0] = False
        routing = routing._replace(topk_ids=routing.topk_ids.masked_fill(elsewhere, num_experts), has_elsewhere=True)
    [output] = run_twice(ops, lambda: [ops.experts(x, routing, gate_up, down)])
    expected = REFERENCE.experts(x.float(), routing, float_weight(gate_up), float_weight(down))
    assert relative_error(output, expected) < TOLERANCE


@pytest.mark.parametrize("d, f", [(2048, 768), (64, 48)] if ON_GPU else [(32, 16)])
def test_experts_that_fill_their_tiles(d, f):
    counts = [64, 65, 0, 127, 128, 129, 1, 193]
    ops, x = CudaOps(), random(sum(counts), d)
    gate_up, down = expert_weights(len(counts), d, f)
    ids = torch.arange(len(counts), device=DEVICE).repeat_interleave(torch.tensor(counts, device=DEVICE))
    ids = ids[torch.randperm(len(ids), device=DEVICE)][:, None]
    routing = Routing(torch.rand(len(ids), 1, device=DEVICE) + 0.1, ids)
    [output] = run_twice(ops, lambda: [ops.experts(x, routing, gate_up, down)])
    expected = REFERENCE.experts(x.float(), routing, float_weight(gate_up), float_weight(down))
    assert relative_error(output, expected) < TOLERANCE


@pytest.mark.parametrize("num_pairs", [1, 64, 1000, 32640, 131072] if ON_GPU else [1, 64, 300])
@pytest.mark.parametrize("num_experts, tile_rows", [(100, 128), (128, 128)] if ON_GPU else [(5, 16), (8, 16)])
def test_expert_order(num_experts, tile_rows, num_pairs):
    expert_ids = torch.randint(0, num_experts + 1, (num_pairs,), device=DEVICE)  # last id: expert on another rank
    expert_ids[expert_ids == 1] = 3
    order, slots = ExpertOrder(num_experts, tile_rows)(expert_ids)
    counts = torch.bincount(expert_ids, minlength=num_experts + 1)[:num_experts]
    here = int(counts.sum())
    assert order[:here].tolist() == expert_ids.argsort(stable=True)[:here].tolist()
    expected, end = [], 0
    for expert, count in enumerate(counts.tolist()):
        tiles, start, end = -(-count // tile_rows), end, end + count
        expected += [[expert, start, end, len(expected), tiles]] * tiles
    assert slots[: len(expected)].tolist() == expected
    assert (slots[len(expected) :, 0] == -1).all()


@pytest.mark.parametrize("spare_rows", [0, 70])
def test_experts_of_grouped_rows(spare_rows):
    d, f = (2048, 768) if ON_GPU else (32, 16)
    rows = GroupedRows(torch.tensor([64, 0, 65, 130, 0], device=DEVICE))
    here = int(rows.tokens_per_expert.sum())
    ops, x = CudaOps(), random(here + spare_rows, d)
    x[here:] = float("nan")  # rows without an expert
    gate_up, down = expert_weights(len(rows.tokens_per_expert), d, f)
    [output] = run_twice(ops, lambda: [ops.experts(x, rows, gate_up, down)[:here]])
    expected = REFERENCE.experts(x[:here].float(), rows, float_weight(gate_up), float_weight(down))
    assert relative_error(output, expected) < TOLERANCE


def test_what_kernels_do_not_take_goes_to_the_reference():
    ops, x = CudaOps(), random(2, 48)
    weight = DenseWeight(random(10, 48))
    assert torch.equal(ops.linear(x, weight), REFERENCE.linear(x, weight))
    exact = DenseWeight(weight.data.float())
    assert torch.equal(ops.linear(x.float(), exact), REFERENCE.linear(x.float(), exact))


@pytest.mark.parametrize(
    ("capability", "compiles", "early"), [((9, 0), True, True), ((9, 0), False, False), ((8, 9), True, False)]
)
def test_only_hopper_and_later_start_kernels_early(capability, compiles, early, monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "COMPILES_PDL", compiles)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert launch.has_pdl() == early


def test_old_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    ops = CudaOps()
    ops.check_model(DTYPE, 128)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ValueError, match="^device: cuda: Tesla T4 has compute capability 7.5, the kernels need 8.0"):
        ops.check_model(DTYPE, 128)
