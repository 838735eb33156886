# SPDX-License-Identifier: Apache-2.0
"""Norms, routing and casts that quantise, against their formulas in float64."""

import pytest
import torch

from tests.npu.emulator_checks.quant_golden import (
    BF16,
    INT8,
    bf16,
    int8,
    npu,
    nz,
    packed,
    quantised,
)

HIDDEN = 2048


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 96), (5, 192), (2, 3, 768), (4, HIDDEN)])
def test_dynamic_quant(shape, dtype):
    x, smooth = torch.randn(shape).to(dtype), (torch.rand(shape[-1]) + 0.5).to(dtype)
    quantised(*npu("npu_dynamic_quant", x), x.double())
    quantised(*npu("npu_dynamic_quant", x, smooth_scales=smooth), x.double() * smooth.double())
    x[0] = 0
    quantised(*npu("npu_dynamic_quant", x), x.double())


def test_dynamic_quant_without_tokens():
    values, scales = npu("npu_dynamic_quant", bf16(0, 192))
    assert values.shape == (0, 192) and scales.shape == (0,)


def normalised(x1, x2, gamma, beta, epsilon):
    wide = x1.double() + x2.double()
    y = wide / (wide.square().mean(-1, keepdim=True) + epsilon).sqrt() * gamma.double()
    return y if beta is None else y + beta.double()


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize(
    "dtype, of_scales, of_points", [(BF16, BF16, BF16), (torch.float16, torch.float32, torch.int32)]
)
def test_add_rms_norm_quant(dtype, of_scales, of_points, rows):
    x1, x2, gamma, beta = (torch.randn(shape).to(dtype) for shape in ((rows, HIDDEN),) * 2 + ((HIDDEN,),) * 2)
    scales = (torch.rand(HIDDEN) / 20 + 0.01).to(of_scales)
    points = torch.randint(-10, 10, (HIDDEN,)).to(of_points)
    for shift in (beta, None):
        y = normalised(x1, x2, gamma, shift, 1e-5)
        call = ("npu_add_rms_norm_quant", x1, x2, gamma, scales, points, shift)
        first, second, x = npu(*call, scales2=scales, zero_points2=None, epsilon=1e-5)
        assert torch.equal(x, x1 + x2) and first.dtype == second.dtype == INT8
        for have, added in ((first, points.double()), (second, 0)):
            exact = (y / scales.double() + added).clamp(-128, 127)
            assert (have.double() - exact).abs().max() <= 0.5 + 0.02
        times = npu(*call, epsilon=1e-5, div_mode=False)[0]
        assert (times.double() - (y * scales.double() + points.double()).clamp(-128, 127)).abs().max() <= 0.5 + 0.02
    assert (npu("npu_add_rms_norm_quant", x1, x2, gamma, scales, None)[1] == -128).all()


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_add_rms_norm_dynamic_quant(dtype, rows):
    x1, x2 = (torch.randn(rows, HIDDEN).to(dtype) for _ in range(2))
    gamma, beta, smooth = (torch.rand(HIDDEN).to(dtype) for _ in range(3))
    name, first = "npu_add_rms_norm_dynamic_quant", {"output_mask": [True, False], "epsilon": 1e-5}
    for shift in (None, beta):
        y1, y2, x, scale1, scale2 = npu(name, x1, x2, gamma, beta=shift, **first)
        quantised(y1, scale1, normalised(x1, x2, gamma, shift, 1e-5))
        assert torch.equal(x, x1 + x2) and scale2.isnan().all() and y2.shape == scale2.shape == ()
    both = npu(name, x1, x2, gamma, smooth_scale2=smooth, output_mask=[True, True])
    y = normalised(x1, x2, gamma, None, 1e-6)
    quantised(both[0], both[3], y)
    quantised(both[1], both[4], y * smooth.double())


def test_the_mask_of_add_rms_norm_dynamic_quant_by_version():
    x, gamma = bf16(2, 64), bf16(64)
    name = "npu_add_rms_norm_dynamic_quant"
    mask = next(
        a for a in torch.ops.npu.npu_add_rms_norm_dynamic_quant.default._schema.arguments if a.name == "output_mask"
    )
    if mask.default_value is None:
        y1, _, _, scale1, scale2 = npu(name, x, x, gamma)
        quantised(y1, scale1, normalised(x, x, gamma, None, 1e-6))
        assert scale2.isnan().all()
        assert not npu(name, x, x, gamma, smooth_scale1=gamma, smooth_scale2=gamma)[4].isnan().any()
        with pytest.raises(ValueError, match="smooth_scale2 without"):
            npu(name, x, x, gamma, smooth_scale2=gamma)
    else:  # up to 2.12
        with pytest.raises(ValueError, match="output_mask"):
            npu(name, x, x, gamma)


def route(x, ids, bounds, **settings):
    fixed = {"active_num": ids.numel(), "expert_num": 8, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True}
    return npu("npu_moe_init_routing_v2", x, ids, **(fixed | {"active_expert_range": list(bounds)} | settings))


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("bounds", [(0, 8), (2, 5)])
def test_routing_quantises(bounds, tokens):
    x = bf16(tokens, 192)
    x[-1] = 0
    ids = torch.stack([torch.randperm(6)[:3] for _ in range(tokens)]).int()  # experts 6 and 7 stay empty
    chosen = [(ids[t, k].item(), t) for t in range(tokens) for k in range(3) if bounds[0] <= ids[t, k] < bounds[1]]
    chosen.sort()
    experts, sources = [e for e, _ in chosen], [t for _, t in chosen]
    count, wide = len(chosen), x.double()[sources]
    plain = route(x, ids, bounds)
    out, index, counts, scales = route(x, ids, bounds, quant_mode=1)
    quantised(out[:count], scales[:count], wide)
    assert scales[count:].isnan().all() and len(scales) == len(out) == ids.numel()
    assert torch.equal(index, plain[1]) and torch.equal(counts, plain[2])
    each = torch.rand(bounds[1] - bounds[0], 192) + 0.5
    out, _, _, scales = route(x, ids, bounds, quant_mode=1, scale=each)
    quantised(out[:count], scales[:count], wide * each.double()[[e - bounds[0] for e in experts]])
    out, _, _, scales = route(x, ids, bounds, quant_mode=1, scale=each[:1])
    quantised(out[:count], scales[:count], wide * each[0].double())
    values, token_scales = npu("npu_dynamic_quant", x)
    carried, _, _, scales = route(values, ids, bounds, scale=token_scales)
    assert carried.dtype == INT8 and torch.equal(carried[:count], values[sources])
    assert torch.equal(scales[:count], token_scales[sources])


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_quantise_with_a_given_scale(dtype):
    x = torch.randn(5, 512).to(dtype) * 4
    scale, point = torch.tensor([0.05]), torch.tensor([-3], dtype=torch.int32)

    def nearest(have, exact):
        assert have.dtype == INT8 and (have.double() - exact.clamp(-128, 127)).abs().max() <= 0.5 + 1e-3

    nearest(npu("npu_quantize", x, scale, point, torch.qint8, -1), x.double() / scale.double() - 3)
    nearest(npu("npu_quantize", x, scale, None, torch.qint8), x.double() / scale.double())
    own, own_point = torch.tensor([20.0]).to(dtype), torch.tensor([-3.0]).to(dtype)
    nearest(npu("npu_quantize", x, own, own_point, torch.qint8, -1, False), x.double() * 20 - 3)
    channels = (torch.rand(512) * 20).to(dtype)
    nearest(npu("npu_quantize", x, channels, None, torch.qint8, -1, False), x.double() * channels.double())
    heads = (torch.rand(5, 1) * 20).to(dtype)
    nearest(npu("npu_quantize", x, heads, None, torch.qint8, -2, False), x.double() * heads.double())
    assert npu("npu_quantize", x[:0], own, None, torch.qint8, -1, False).shape == (0, 512)
    if dtype == BF16:
        low = torch.tensor([0.05]).to(BF16)
        nearest(npu("npu_quantize", x, low, own_point, torch.qint8, -1), x.double() / low.double() - 3)


def test_int4_packing():
    values = torch.randint(-8, 8, (3, 16, 32), dtype=torch.int32)
    ones = torch.ones(1)
    by_quantize = npu("npu_quantize", values.float(), ones, None, torch.quint4x2, -1, False)
    assert torch.equal(by_quantize, packed(values)) and by_quantize.dtype == torch.int32
    for matrix, want in zip(values, packed(values), strict=True):
        assert torch.equal(npu("npu_convert_weight_to_int4pack", matrix), want)


def test_formats_of_ints():
    for weight in (int8(2, 32, 64), torch.zeros(2, 32, 8, dtype=torch.int32)):
        cast = nz(weight)
        assert npu("get_npu_format", cast) == 29 and torch.equal(cast, weight)


X8, X16, W4 = int8(9, 64), bf16(9, 64), torch.zeros(64, 16, dtype=torch.int32)
TOKENS = torch.rand(9)
GAMMA = torch.ones(64).to(BF16)
MASK = {"output_mask": [True, False]}


def static(x=X16, scales=GAMMA, points=GAMMA, **settings):
    return npu("npu_add_rms_norm_quant", x, x, GAMMA, scales, points, **settings)


def dynamic(x=X16, gamma=GAMMA, **settings):
    return npu("npu_add_rms_norm_dynamic_quant", x, x, gamma, **(MASK | settings))


def quantise(scales, points, dtype=torch.qint8, axis=-1, div_mode=True, x=X16):
    return npu("npu_quantize", x, scales, points, dtype, axis, div_mode)


IDS = torch.zeros(9, 1, dtype=torch.int32)
ONE = torch.ones(1)
REFUSED = {
    "dynamic: fp32": (lambda: npu("npu_dynamic_quant", torch.ones(2, 4)), "float32"),
    "dynamic: vector": (lambda: npu("npu_dynamic_quant", bf16(8)), "two dimensions"),
    "dynamic: smooth dtype": (lambda: npu("npu_dynamic_quant", X16, smooth_scales=torch.ones(64)), "smooth_scales"),
    "dynamic: smooth shape": (lambda: npu("npu_dynamic_quant", X16, smooth_scales=GAMMA[None]), "smooth_scales"),
    "static norm: fp32 scales": (lambda: static(scales=GAMMA.float()), "scales1"),
    "static norm: int32 points": (lambda: static(points=GAMMA.int()), "zero_points1"),
    "static norm: one scale": (lambda: static(scales=GAMMA[:1]), "scales1"),
    "static norm: zero scale": (lambda: static(scales=GAMMA * 0), "zero"),
    "static norm: beta": (lambda: static(beta=GAMMA.float()), "dtypes"),
    "static norm: axis": (lambda: static(axis=0), "axis"),
    "static norm: fp32": (lambda: static(x=X16.float()), "x1"),
    "static norm: points2": (lambda: static(zero_points2=GAMMA), "without scales2"),
    "static norm: no rows": (lambda: static(x=X16[:0]), "empty"),
    "dynamic norm: vector": (lambda: dynamic(x=X16[0]), "dimensions"),
    "dynamic norm: 2-D gamma": (lambda: dynamic(gamma=GAMMA[None]), "gamma"),
    "dynamic norm: fp32 gamma": (lambda: dynamic(gamma=GAMMA.float()), "dtypes"),
    "dynamic norm: smooth": (lambda: dynamic(smooth_scale1=GAMMA.float()), "dtypes"),
    "dynamic norm: masked smooth": (lambda: dynamic(smooth_scale2=GAMMA), "smooth_scale2"),
    "dynamic norm: nothing": (lambda: dynamic(output_mask=[False, False]), "output_mask"),
    "dynamic norm: no rows": (lambda: dynamic(x=X16[:0]), "empty"),
    "routing: int8 again": (lambda: route(X8, IDS, (0, 8), quant_mode=1), "int8 already"),
    "routing: 1-D smooth": (lambda: route(X16, IDS, (0, 8), quant_mode=1, scale=torch.ones(64)), "scale"),
    "routing: bf16 smooth": (lambda: route(X16, IDS, (0, 8), quant_mode=1, scale=GAMMA[None]), "scale"),
    "routing: 2-D scales": (lambda: route(X8, IDS, (0, 8), scale=TOKENS[:, None]), "scale"),
    "routing: static": (lambda: route(X16, IDS, (0, 8), quant_mode=0, scale=ONE), "quant_mode"),
    "quantise: int8": (lambda: quantise(ONE, None, torch.int8), "dtype"),
    "quantise: fp16 scale": (lambda: quantise(ONE.half(), None), "scales"),
    "quantise: bf16 scale of fp32": (lambda: quantise(ONE.to(BF16), None, x=X16.float()), "bfloat16"),
    "quantise: bf16 points": (lambda: quantise(ONE, ONE.to(BF16)), "zero_points"),
    "quantise: int points of bf16": (lambda: quantise(ONE.to(BF16), ONE.int()), "zero_points"),
    "quantise: 0-D scale": (lambda: quantise(ONE[0], None), "one dimension"),
    "quantise: axis": (lambda: quantise(torch.ones(64), None, axis=0), "scales"),
    "quantise: times fp32": (lambda: quantise(ONE, None, div_mode=False), "scales"),
    "quantise: times points": (lambda: quantise(GAMMA, ONE.to(BF16), div_mode=False), "zero_points"),
    "quantise: times, axis": (lambda: quantise(GAMMA, None, axis=-3, div_mode=False), "axis"),
    "quantise: times quint8": (lambda: quantise(GAMMA, None, torch.quint8, div_mode=False), "dtype"),
    "quantise: 12 columns": (
        lambda: quantise(ONE, None, torch.quint4x2, div_mode=False, x=torch.ones(2, 12)),
        "multiple of 8",
    ),
    "pack: experts": (lambda: npu("npu_convert_weight_to_int4pack", W4[None]), "two dimensions"),
    "pack: 8": (lambda: npu("npu_convert_weight_to_int4pack", W4 + 8), "leaves"),
    "pack: strided": (lambda: npu("npu_convert_weight_to_int4pack", W4.t()), "contiguous"),
    "pack: columns": (lambda: npu("npu_convert_weight_to_int4pack", W4[:, :4].contiguous()), "multiple of 8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name, value", [("group_index", torch.ones(1, dtype=torch.int32)), ("dst_type_max", 1.0)])
def test_unemulated_arguments_raise(name, value):
    with pytest.raises(NotImplementedError, match=name):
        npu("npu_dynamic_quant", X16, **{name: value})
