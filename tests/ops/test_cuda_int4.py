# SPDX-License-Identifier: Apache-2.0
"""Kernels on 4-bit weights against the float32 reference: small shapes in the interpreter, real ones on a GPU."""

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton", reason="the kernels need triton")

from models.quantization.rounding import by_expert, round_int4  # noqa: E402
from ops import RouterLogits, Weight  # noqa: E402
from ops.cuda import CudaOps  # noqa: E402
from ops.cuda.int4_calls import CudaInt4Weight, dequantized  # noqa: E402
from ops.reference import ReferenceOps  # noqa: E402
from ops.weight import Int4Weight, dequantize  # noqa: E402
from tests.logits import relative_error  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
D, F, N, E, TOP_K = (2048, 768, 5120, 128, 8) if ON_GPU else (128, 32, 16, 3, 2)
GROUPS = (32, 64, 128) if ON_GPU else (32,)
TOKENS = (1, 2, 5, 8, 12) if ON_GPU else (1, 2)
DTYPE = torch.bfloat16 if ON_GPU else torch.float16
TOLERANCE = 1e-2
REFERENCE = ReferenceOps()


def weight(*shape: int, group: int, symmetric: bool) -> Int4Weight:
    matrix = (torch.randn(shape, device=DEVICE) * shape[-1] ** -0.5).to(DTYPE)
    return by_expert(lambda one: round_int4(one, group, symmetric), matrix)


def random(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


@pytest.fixture(params=[(group, symmetric) for group in GROUPS for symmetric in (False, True)], ids=str)
def options(request):
    group, symmetric = request.param
    return {"group": group, "symmetric": symmetric}


def prepared(ops: CudaOps, *weights: Weight) -> list[CudaInt4Weight]:
    found = [ops.prepare_weight(one, DTYPE) for one in weights]
    assert all(isinstance(one, CudaInt4Weight) for one in found)
    assert [one.shape for one in found] == [one.shape for one in weights]
    return found


def test_matrix_in_memory(options):
    for shape in ((N, D), (E, D, F)):
        one = weight(*shape, **options)
        [int4] = prepared(CudaOps(), one)
        for dtype in (torch.float32, torch.float16):  # numbers become bfloat16 and float16 first
            assert torch.equal(dequantized(int4, dtype), dequantize(one, dtype))


@pytest.mark.parametrize("num_tokens", TOKENS)
def test_linear(num_tokens, options):
    ops, one = CudaOps(), weight(N, D, **options)
    [int4] = prepared(ops, one)
    x, bias, residual = random(num_tokens, D), random(N), random(num_tokens, D, dtype=torch.float32)
    for _ in range(2):  # the second call takes the bound kernel
        found = ops.linear(x, int4, bias)
        assert relative_error(found, REFERENCE.linear(x.float(), one, bias.float())) < TOLERANCE
    norm_weight = torch.rand(D, device=DEVICE).to(DTYPE) + 0.5
    for before in (None, residual):
        found, total = ops.norm_linear(x, before, norm_weight, 1e-6, int4)
        expected, expected_total = REFERENCE.norm_linear(x.float(), before, norm_weight.float(), 1e-6, one)
        assert relative_error(found, expected) < TOLERANCE and torch.allclose(total, expected_total, atol=1e-5)
    assert ops.linear(x[:0], int4).shape == (0, N)


@pytest.mark.parametrize(
    ("num_tokens", "renormalize"), [(count, count != TOKENS[1]) for count in TOKENS]
)  # one of them does not renormalise
def test_experts(num_tokens, renormalize, options):
    """All experts, and one rank's of three."""
    gate_up, down = weight(E, 2 * F, D, **options), weight(E, D, F, **options)
    x, logits = random(num_tokens, D), random(num_tokens, E, dtype=torch.float32)
    routing = RouterLogits(logits, TOP_K, renormalize)
    third = E // 3
    for first, count in ((0, E), (third, third)):
        part = slice(first, first + count)
        local = routing if count == E else routing.of_rank(first, count)
        ops = CudaOps()
        found = ops.experts(x, local, *prepared(ops, gate_up[part], down[part]))
        expected = REFERENCE.experts(x.float(), local, gate_up[part], down[part])
        assert found.isfinite().all() and (found.float() - expected).norm() <= TOLERANCE * expected.norm(), (
            first,
            count,
        )
    assert relative_error(CudaOps().experts(x, routing.chosen(), *prepared(ops, gate_up, down)),
                          REFERENCE.experts(x.float(), routing, gate_up, down)) < TOLERANCE  # fmt: skip


def test_what_experts_elsewhere_left_is_not_read():
    gate_up, down = (weight(*shape, group=32, symmetric=True) for shape in ((1, 2 * F, D), (1, D, F)))
    ops, x = CudaOps(), random(3, D)
    logits = torch.tensor([[5.0, 4.0], [4.0, 5.0], [5.0, 4.0]], device=DEVICE)
    routing = RouterLogits(logits, 2, True).of_rank(0, 1)
    int4 = prepared(ops, gate_up, down)
    ops.experts(x, routing, *int4)
    [call] = [call for (name, *_), call in ops.calls.items() if name == "experts"]
    call.partial.fill_(torch.nan)
    found, expected = ops.experts(x, routing, *int4), REFERENCE.experts(x.float(), routing, gate_up, down)
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize(("group", "k"), [(32, 96), (64, 192), (96, 192), (128, 128), (256, 256)])
def test_groups_beside_tiles(group, k):
    """Groups of parts of a tile, of whole tiles, across tiles; rows that end within a tile."""
    ops, one = CudaOps(), weight(N, k, group=group, symmetric=False)
    [int4] = prepared(ops, one)
    assert torch.equal(dequantized(int4, torch.float32), dequantize(one, torch.float32))
    x = random(3, k)
    assert relative_error(ops.linear(x, int4), REFERENCE.linear(x.float(), one)) < TOLERANCE


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(value):
    ops = CudaOps()
    one = weight(N, D, group=32, symmetric=False)
    x = random(3, D)
    x[1, 7] = value
    output = ops.linear(x, *prepared(ops, one))
    assert not output[1].isfinite().any() and output[[0, 2]].isfinite().all()


def test_groups_that_the_kernels_do_not_take_stay_as_they_are():
    one = weight(N, D, group=16, symmetric=False)
    ops = CudaOps()
    assert ops.prepare_weight(one, DTYPE) is one and ops.prepare_weight(one, torch.float32) is one
    assert ops.fallbacks(DTYPE) == []
    assert ops.fallbacks(DTYPE, ["w4a16"])[0] == "linear w4a16 (groups of 16 columns, no multiple of 32)"
    x = random(2, D)
    assert relative_error(ops.linear(x, one), REFERENCE.linear(x.float(), one)) < TOLERANCE
