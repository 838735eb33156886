# SPDX-License-Identifier: Apache-2.0
"""Quantised matmuls of the reference against whole-number arithmetic and dequantised matrices."""

import pytest
import torch

from models.quantization.rounding import round_fp8, round_int4, round_int8
from ops import DenseWeight, GroupedRows, Routing
from ops.int4 import pack_int4, unpack_int4
from ops.reference import ReferenceOps
from ops.weight import Fp8Weight, Int4Weight, Int8StaticWeight, Int8Weight, TransposedWeight, Weight, dequantize

E, D, F, K = 6, 64, 48, 3
FORMATS = {
    "w4a16": lambda matrix: round_int4(matrix, 16, symmetric=False),
    "w4a16_symmetric": lambda matrix: round_int4(matrix, 8, symmetric=True),
    "fp8": lambda matrix: round_fp8(matrix, (16, 8)),
    "w8a8": round_int8,
}


def static_weight(n: int, k: int, input_bias: bool) -> Int8StaticWeight:
    return Int8StaticWeight(
        data=torch.randint(-128, 128, (n, k)).to(torch.int8),
        scales=torch.rand(n, 1) / 1000,
        quant_bias=torch.randint(-5000, 5000, (n, 1)).int(),
        input_scale=torch.tensor([0.03]),
        input_offset=torch.tensor([-7.0]),
        input_bias=torch.randn(k) / 10 if input_bias else None,
    )


def integer_product(rows: torch.Tensor, weight: Int8Weight) -> torch.Tensor:
    """[T, K] x [N, K]: sums in int64."""
    row_scales = rows.abs().amax(1, keepdim=True) / 127
    values = (rows / row_scales).round().long()
    return (values @ weight.data.long().t()).float() * weight.scales.t() * row_scales


def exact(rows: torch.Tensor, weight: Weight) -> torch.Tensor:
    if isinstance(weight, Int8Weight):
        return integer_product(rows, weight)
    return rows @ dequantize(weight, torch.float32).t()


def test_packing():
    values = torch.randint(0, 16, (5, 7, 24), dtype=torch.uint8)
    packed = pack_int4(values)
    assert packed.shape == (5, 7, 3) and packed.dtype is torch.int32
    assert torch.equal(unpack_int4(packed), values)
    assert all(int(packed[0, 0, 0]) >> 4 * i & 15 == values[0, 0, i] for i in range(8))


@pytest.mark.parametrize("shape", [(40, 64), (3, 40, 64)])
@pytest.mark.parametrize("name", FORMATS)
def test_rounding_is_to_the_nearest(name, shape):
    matrix = torch.randn(shape)
    matrix[..., 3, :] = 0  # a row, and groups of others
    weight = FORMATS[name](matrix)
    assert weight.shape == shape
    found = dequantize(weight, torch.float32)
    blocks = matrix.view(*shape[:-1], weight.scales.shape[-1], -1)
    step = {"w4a16": 1 / 15, "w4a16_symmetric": 2 / 15, "fp8": 1 / 14, "w8a8": 1 / 127}[name]
    span = (blocks.amax(-1).clamp(min=0) - blocks.amin(-1).clamp(max=0)) if name == "w4a16" else blocks.abs().amax(-1)
    allowed = (span * step / 2).repeat_interleave(blocks.shape[-1], -1)
    if name == "w4a16":
        allowed *= 2  # the zero point is a whole number too
    if name == "fp8":  # half of the last of 3 bits of each number
        allowed = matrix.abs() / 16 + 0.01
    assert ((found - matrix).abs() <= allowed * 1.01 + 1e-6).all()
    assert (found[..., 3, :] == 0).all()


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("name", FORMATS)
def test_linear(name, num_tokens):
    weight, rows, bias = FORMATS[name](torch.randn(40, 64)), torch.randn(num_tokens, 64), torch.randn(40)
    torch.testing.assert_close(ReferenceOps().linear(rows, weight, bias), exact(rows, weight) + bias)
    assert ReferenceOps().linear(rows[:0], weight).shape == (0, 40)
    half = ReferenceOps().linear(rows.bfloat16(), weight)
    assert half.dtype is torch.bfloat16
    torch.testing.assert_close(half.float(), exact(rows, weight), atol=0.15, rtol=0.02)


@pytest.mark.parametrize("input_bias", [False, True])
def test_static_linear(input_bias):
    weight, rows = static_weight(40, 64, input_bias), torch.randn(5, 64) * 3  # some saturate
    shifted = rows + (weight.input_bias if input_bias else 0)
    values = ((shifted / 0.03).round().long() - 7).clamp(-128, 127)
    expected = (values @ weight.data.long().t() + weight.quant_bias.t()).float() * weight.scales.t()
    torch.testing.assert_close(ReferenceOps().linear(rows, weight), expected)


def test_sums_of_products_are_exact():
    """They exceed the whole numbers that float32 can hold; float32 rounds only the results."""
    weight = Int8Weight(torch.randint(0, 128, (50, 8192)).to(torch.int8), torch.ones(50, 1))
    rows = torch.randint(0, 128, (4, 8192)).float()
    rows[:, 0] = 127
    expected = rows.long() @ weight.data.long().t()
    assert expected.min() > 1 << 24
    torch.testing.assert_close(ReferenceOps().linear(rows, weight), expected.float(), atol=0, rtol=0)


@pytest.mark.parametrize("grouped_mm", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 9])
@pytest.mark.parametrize("name", FORMATS)
def test_experts(name, num_tokens, grouped_mm):
    """Also with an expert without tokens, and with experts on other ranks."""
    gate_up, down = FORMATS[name](torch.randn(E, 2 * F, D) / 8), FORMATS[name](torch.randn(E, D, F) / 7)
    rows = torch.randn(num_tokens, D)
    ids = torch.rand(num_tokens, E - 1).topk(K).indices  # never the last one
    routing = Routing(torch.rand(num_tokens, K), ids)
    ops = ReferenceOps(grouped_mm=grouped_mm)

    def expected(first: int, count: int) -> torch.Tensor:
        output = torch.zeros(num_tokens, D)
        for token in range(num_tokens):
            for factor, expert in zip(routing.topk_weights[token], ids[token].tolist(), strict=True):
                if first <= expert < first + count:
                    gate, up = exact(rows[token : token + 1], gate_up[expert]).chunk(2, dim=-1)
                    activated = torch.nn.functional.silu(gate) * up
                    output[token] += factor * exact(activated, down[expert])[0]
        return output

    torch.testing.assert_close(ops.experts(rows, routing, gate_up, down), expected(0, E), atol=1e-4, rtol=1e-4)
    part = slice(2, 5)
    found = ops.experts(rows, routing.of_rank(2, 3), gate_up[part], down[part])
    torch.testing.assert_close(found, expected(2, 3), atol=1e-4, rtol=1e-4)
    counts = torch.tensor([2, 0, 1, 0, 0, 3])
    grouped = ops.experts(torch.randn(8, D), GroupedRows(counts), gate_up, down)
    assert grouped[:6].isfinite().all() and grouped.shape == (8, D)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", [*FORMATS, "static"])
def test_what_is_not_finite_stays_so(name, value):
    weight = static_weight(40, 64, False) if name == "static" else FORMATS[name](torch.randn(40, 64))
    rows = torch.randn(3, 64)
    rows[1, 5] = value
    output = ReferenceOps().linear(rows, weight)
    assert not output[1].isfinite().any() and output[[0, 2]].isfinite().all()


class UnknownWeight(DenseWeight.__base__):
    """A weight of a format that no backend knows; square, so that a wrong product would go unnoticed."""

    format_name = "unknown"
    data = torch.randn(16, 16)
    shape = (16, 16)


@pytest.mark.parametrize(
    "weight", [TransposedWeight(torch.randn(16, 16)), UnknownWeight()], ids=["transposed", "other"]
)
@pytest.mark.parametrize("backend", ["reference", "cuda"])
def test_unknown_weights_are_refused_by_every_operation(weight, backend):
    if backend == "cuda":
        pytest.importorskip("triton")
        from ops.cuda import CudaOps

        ops = CudaOps()
    else:
        ops = ReferenceOps()
    rows, norm = torch.randn(2, 16), torch.ones(16)
    counts = GroupedRows(torch.tensor([2]))
    for operation in (
        lambda: ops.linear(rows, weight),
        lambda: ops.norm_linear(rows, None, norm, 1e-6, weight),
        lambda: ops.norm_linear(rows, rows, norm, 1e-6, weight),
        lambda: ops.experts(rows, counts, weight, weight),
        lambda: ops.experts(rows, Routing(torch.ones(2, 1), torch.zeros(2, 1).long()), weight, weight),
    ):
        with pytest.raises(TypeError, match=type(weight).__name__):
            operation()


def test_prepared_weights():
    ops = ReferenceOps()
    fp8, int8 = FORMATS["fp8"](torch.randn(32, 64)), FORMATS["w8a8"](torch.randn(32, 64))
    dense = ops.prepare_weight(fp8, torch.bfloat16)
    assert isinstance(fp8, Fp8Weight) and isinstance(dense, DenseWeight)
    assert torch.equal(dense.data, dequantize(fp8, torch.bfloat16))
    assert ops.prepare_weight(int8, torch.bfloat16) is int8
    assert isinstance(ops.prepare_weight(FORMATS["w4a16"](torch.randn(32, 64)), torch.bfloat16), Int4Weight)
