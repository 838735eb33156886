# SPDX-License-Identifier: Apache-2.0
"""Quantised matmuls, and SwiGLU between them, against their formulas in float64, one row and one group at a time."""

import numpy as np
import pytest
import torch

from tests.npu.emulator_checks.quant_golden import (
    BF16,
    COUNTS,
    EXPERTS,
    INT8,
    bf16,
    close,
    int8,
    npu,
    nz,
    packed,
    quantised,
    rows_of,
    swiglu,
)

HIDDEN = 2048
WIDTHS = (96, 192, 768)  # an expert's width of Qwen3-MoE at several tensor-parallel sizes


@pytest.mark.parametrize("scale_dtype", [torch.float32, BF16])
@pytest.mark.parametrize("rows", [1, 7])
def test_quant_matmul(rows, scale_dtype):
    x, weight = int8(rows, 512), int8(512, 768)
    scale, tokens = torch.rand(768).to(scale_dtype), torch.rand(rows)
    exact = x.double() @ weight.double()
    want = exact * scale.double() * tokens.double()[:, None]
    settings = {"pertoken_scale": tokens, "output_dtype": BF16}
    out = npu("npu_quant_matmul", x, weight, scale, **settings)
    close(out, want)
    assert out.dtype == BF16
    turned = weight.t().contiguous().t()
    for same in (turned, nz(weight)):
        assert torch.equal(npu("npu_quant_matmul", x, same, scale, **settings), out)
    bias = torch.randint(-(2**20), 2**20, (768,), dtype=torch.int32)
    static = npu("npu_quant_matmul", x, weight, scale, bias=bias, output_dtype=BF16)
    close(static, (exact + bias.double()) * scale.double())
    close(npu("npu_quant_matmul", x, weight, scale[:1], output_dtype=BF16), exact * scale[0].double())
    late = npu("npu_quant_matmul", x, weight, scale, bias=torch.ones(768), **settings)
    close(late, want + 1)
    product = npu("npu_quant_matmul", x, weight, scale, bias=bias, output_dtype=torch.int32)
    assert torch.equal(product.double(), exact + bias.double())


def test_quant_matmul_to_fp16_keeps_19_bits_of_the_scale():
    x, weight = torch.ones(1, 16, dtype=INT8), torch.ones(16, 32, dtype=INT8)
    scale = torch.full((32,), 1 + 2.0**-10 + 2.0**-11)
    close(npu("npu_quant_matmul", x, weight, scale, output_dtype=torch.float16), [[16 * (1 + 2.0**-10)] * 32], 1e-6)
    tokens = torch.ones(1)
    out = npu("npu_quant_matmul", x, weight, scale, pertoken_scale=tokens, output_dtype=torch.float16)
    assert out.dtype == torch.float16 and (out > 16 * (1 + 2.0**-10)).all()


def grouped(x, weight, counts=COUNTS, **settings):
    fixed = {"group_list": torch.tensor(counts), "group_type": 0, "group_list_type": 1, "split_item": 3}
    return npu("npu_grouped_matmul", [x], [weight], **(fixed | settings))[0]


@pytest.mark.parametrize("counts", [COUNTS, [0, 0, 0, 1, 0, 0]])
@pytest.mark.parametrize("width", WIDTHS)
def test_grouped_int8(width, counts):
    rows = rows_of(counts)
    x, weight = int8(len(rows), width), int8(EXPERTS, width, 256)
    scale, tokens = torch.rand(EXPERTS, 256) / 50, torch.rand(len(rows))  # within fp16
    exact = np.stack([x[i].double() @ weight[e].double() for i, e in enumerate(rows)])
    for same in (weight, nz(weight), weight.mT.contiguous().mT):
        product = grouped(x, same, counts, output_dtype=torch.int32, tuning_config=[0])
        assert product.dtype == torch.int32 and np.array_equal(product.numpy(), exact)
    want = exact * tokens.double().numpy()[:, None]
    low = scale.to(BF16)
    out = grouped(x, weight, counts, scale=[low], per_token_scale=[tokens], output_dtype=BF16)
    close(out, want * low.double().numpy()[rows])
    half = grouped(x, weight, counts, scale=[scale], per_token_scale=[tokens], output_dtype=torch.float16)
    close(half, want * scale.double().numpy()[rows])
    bias = torch.randint(-(2**18), 2**18, (EXPERTS, 256), dtype=torch.int32)
    static = grouped(x, weight, counts, scale=[low], bias=[bias], output_dtype=BF16)
    close(static, (exact + bias.numpy()[rows]) * low.double().numpy()[rows])


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("depth, group, width", [(HIDDEN, 128, 192), (96, 32, 256), (192, 64, 256), (768, 0, 64)])
def test_grouped_int4(depth, group, width, dtype):
    rows = rows_of(COUNTS)
    x, values = torch.randn(len(rows), depth).to(dtype), torch.randint(-8, 8, (EXPERTS, depth, width))
    shape = (EXPERTS, depth // group, width) if group else (EXPERTS, width)
    scale, offset = (torch.rand(shape) + 0.5).to(dtype), torch.randint(-7, 9, shape).to(dtype)
    out = grouped(x, packed(values), antiquant_scale=[scale], antiquant_offset=[offset])
    want = np.zeros((len(rows), width))
    for i, e in enumerate(rows):
        for first in range(0, depth, group or depth):
            part = slice(first, first + (group or depth))
            own = (e, first // group) if group else (e,)
            weight = (values[e, part].double() + offset[own].double()) * scale[own].double()
            want[i] += (x[i, part].double() @ weight.to(dtype).double()).numpy()
    close(out, want)
    assert out.dtype == dtype


def gate_up(counts, width, depth=256):
    rows = rows_of(counts)
    x, weight = int8(len(rows), depth), int8(EXPERTS, depth, 2 * width)
    scale, tokens = torch.rand(EXPERTS, 2 * width) / 50, torch.rand(len(rows)) / 50
    exact = np.stack([x[i].double() @ weight[e].double() for i, e in enumerate(rows)])
    wide = exact * scale.double().numpy()[rows] * tokens.double().numpy()[:, None]
    return x, weight, scale, tokens, wide


@pytest.mark.parametrize("counts", [COUNTS, [0, 0, 1, 0, 0, 0]])
@pytest.mark.parametrize("width", WIDTHS)
def test_grouped_swiglu_quant(width, counts):
    x, weight, scale, tokens, wide = gate_up(counts, width)
    call = ("npu_grouped_matmul_swiglu_quant_v2", x, [nz(weight)], [scale], tokens)
    values, scales = npu(*call, torch.tensor(counts), group_list_type=1)
    quantised(values, scales, swiglu(wide))
    by_ends = npu(*call, torch.tensor(counts).cumsum(0))
    assert torch.equal(values, by_ends[0]) and torch.equal(scales, by_ends[1])
    low = scale.to(BF16)
    narrow = npu(call[0], x, [nz(weight)], [low], tokens, torch.tensor(counts), group_list_type=1)
    ratio = (low.double() / scale.double()).numpy()[rows_of(counts)]
    quantised(*narrow, swiglu(wide * ratio))


def test_grouped_swiglu_quant_leaves_the_tail_and_zeros():
    x, weight, scale, tokens, wide = gate_up(COUNTS, 96)
    x[2], wide[2] = 0, 0
    counts = torch.tensor(COUNTS)
    longer = torch.cat((x, int8(4, 256))), torch.cat((tokens, torch.rand(4)))
    name = "npu_grouped_matmul_swiglu_quant_v2"
    values, scales = npu(name, longer[0], [nz(weight)], [scale], longer[1], counts, group_list_type=1)
    quantised(values[:9], scales[:9], swiglu(wide))
    assert scales[9:].isnan().all() and scales[2] == 0
    one = npu(name, x[:3], [nz(weight[:1])], [scale[:1]], tokens[:3], torch.tensor([3]), group_list_type=1)
    quantised(*one, swiglu(wide[:3]))


@pytest.mark.parametrize("counts", [COUNTS, [1, 0, 0, 0, 0, 0]])
@pytest.mark.parametrize("width", [192, 768])
def test_dequant_swiglu_quant(width, counts):
    x, weight, scale, tokens, wide = gate_up(counts, width)
    product = grouped(x, weight, counts, output_dtype=torch.int32)
    product = torch.cat((product, torch.ones(2, 2 * width, dtype=torch.int32)))
    tokens = torch.cat((tokens, torch.ones(2)))
    name, groups = "npu_dequant_swiglu_quant", torch.tensor(counts)
    settings = {"weight_scale": scale, "group_index": groups, "quant_mode": 1}
    for activation in (tokens, tokens[:, None]):
        values, scales = npu(name, product, activation_scale=activation, activate_left=True, **settings)
        quantised(values[:-2], scales[:-2], swiglu(wide))
        assert scales[-2:].isnan().all()
    swapped = npu(name, product, activation_scale=tokens, **settings)
    quantised(swapped[0][:-2], swapped[1][:-2], swiglu(np.roll(wide, width, -1)))
    smooth = torch.rand(EXPERTS, width) + 0.5
    more = npu(name, product, activation_scale=tokens, activate_left=True, quant_scale=smooth, **settings)
    quantised(more[0][:-2], more[1][:-2], swiglu(wide) * smooth.double().numpy()[rows_of(counts)])
    plain = bf16(len(wide), 2 * width)
    halves = npu(name, plain, group_index=groups, quant_mode=1, activate_left=True)
    quantised(*halves, swiglu(plain.double().numpy()))


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("depth, group", [(HIDDEN, 128), (768, 32), (96, 64), (192, 0)])
def test_weight_quant_matmul(depth, group, dtype):
    width, rows = 256, 3
    x, values = torch.randn(rows, depth).to(dtype), torch.randint(-8, 8, (depth, width))
    groups = -(-depth // group) if group else 1
    scale = (torch.rand(groups, width) + 0.5).to(dtype)
    offset, bias = torch.randint(-7, 9, (groups, width)).to(dtype), torch.randn(width)
    bias = bias.half() if dtype == torch.float16 else bias
    place = torch.arange(depth) // group if group else torch.zeros(depth, dtype=torch.int64)
    wide = (values.double() + offset.double()[place]) * scale.double()[place]
    want = x.double() @ wide.to(dtype).double()
    name, settings = "npu_weight_quant_batchmatmul", {"antiquant_group_size": group}
    out = npu(name, x, packed(values), scale, offset, **settings)
    close(out, want)
    assert out.dtype == dtype
    close(npu(name, x, packed(values), scale, offset, bias=bias, **settings), want + bias.double())
    turned = packed(values.t().contiguous()).t()
    assert torch.equal(npu(name, x, turned, scale, offset, **settings), out)
    assert torch.equal(npu(name, x, values.to(INT8), scale, offset, **settings), out)
    symmetric = x.double() @ (values.double() * scale.double()[place]).to(dtype).double()
    close(npu(name, x, packed(values), scale, **settings), symmetric)
    if not group:
        assert torch.equal(npu(name, x, packed(values), scale[0], offset[0]), out)


X8, W8 = int8(9, 64), int8(EXPERTS, 64, 128)
SCALE, TOKENS, LIST = torch.rand(EXPERTS, 128), torch.rand(9), torch.tensor(COUNTS)
X16, W4 = bf16(9, 64), torch.zeros(EXPERTS, 64, 16, dtype=torch.int32)
GROUPS = torch.ones(EXPERTS, 2, 128).to(BF16)
WHOLE = torch.ones(128).to(BF16)
PRODUCT = torch.ones(9, 256, dtype=torch.int32)
ONE = torch.ones(1)


def matmul8(x=X8, weight=W8[0], scale=SCALE[0], output_dtype=BF16, **settings):
    return npu("npu_quant_matmul", x, weight, scale, output_dtype=output_dtype, **settings)


def scaled(**settings):
    fixed = {"scale": [SCALE.to(BF16)], "per_token_scale": [TOKENS], "output_dtype": BF16}
    return grouped(X8, W8, **(fixed | settings))


def antiquant(x=X16, weight=W4, scale=GROUPS, offset=GROUPS, **settings):
    return grouped(x, weight, antiquant_scale=[scale], antiquant_offset=[offset], **settings)


def fused(x=X8, weight=W8, scale=SCALE, tokens=TOKENS, groups=LIST, cast=True, **settings):
    matrix = [nz(weight) if cast else weight]
    settings = {"group_list_type": 1} | settings
    return npu("npu_grouped_matmul_swiglu_quant_v2", x, matrix, [scale], tokens, groups, **settings)


def dequant(x=PRODUCT, **settings):
    fixed = {"weight_scale": torch.ones(EXPERTS, x.shape[1]), "activation_scale": TOKENS, "group_index": LIST}
    return npu("npu_dequant_swiglu_quant", x, **(fixed | {"quant_mode": 1} | settings))


def weight_only(x=X16, weight=W4[0], scale=WHOLE, offset=None, **settings):
    return npu("npu_weight_quant_batchmatmul", x, weight, scale, offset, **settings)


REFUSED = {
    "matmul: default output": (lambda: matmul8(output_dtype=None), "default is int8"),
    "matmul: fp32 output": (lambda: matmul8(output_dtype=torch.float32), "output_dtype"),
    "matmul: bf16 scale to fp16": (lambda: matmul8(scale=WHOLE, output_dtype=torch.float16), "scale of"),
    "matmul: fp16 scale": (lambda: matmul8(scale=WHOLE.half()), "scale of"),
    "matmul: 2-D scale": (lambda: matmul8(scale=SCALE[:1]), "scale"),
    "matmul: short scale": (lambda: matmul8(scale=SCALE[0, :64]), "scale"),
    "matmul: token scale": (lambda: matmul8(pertoken_scale=TOKENS[:, None]), "pertoken_scale"),
    "matmul: bf16 token scale": (lambda: matmul8(pertoken_scale=TOKENS.to(BF16)), "pertoken_scale"),
    "matmul: int32 with tokens": (
        lambda: matmul8(pertoken_scale=TOKENS, output_dtype=torch.int32),
        "takes no pertoken_scale",
    ),
    "matmul: fp16 bias to bf16": (lambda: matmul8(bias=WHOLE.half()), "bias of"),
    "matmul: fp32 bias, fp16": (lambda: matmul8(bias=SCALE[0], output_dtype=torch.float16), "bias of"),
    "matmul: bias shape": (lambda: matmul8(bias=torch.ones(1, 128)), "bias"),
    "matmul: bf16 x": (lambda: matmul8(x=X16), "x1"),
    "matmul: K": (lambda: matmul8(x=int8(9, 32)), "K differs"),
    "matmul: empty": (lambda: matmul8(x=X8[:0]), "empty"),
    "matmul: sliced": (lambda: matmul8(x=int8(9, 128)[:, :64]), "strides"),
    "matmul: lm_head": (lambda: matmul8(int8(1, 8), int8(8, 65536), ONE), "65535"),
    "matmul: transposed NZ": (lambda: matmul8(weight=nz(W8[0].t().contiguous()).t()), "x2 is not contiguous"),
    "matmul: NZ of one": (lambda: matmul8(weight=nz(W8[0, :, :1].contiguous()), scale=ONE), "size 1"),
    "matmul: NZ scale": (lambda: matmul8(scale=nz(SCALE.to(BF16))), "FRACTAL_NZ"),
    "grouped: fp32 scale to bf16": (lambda: scaled(scale=[SCALE]), "scale"),
    "grouped: no output_dtype": (lambda: scaled(output_dtype=None), "gives"),
    "grouped: 1-D scale": (lambda: scaled(scale=[WHOLE]), "scale"),
    "grouped: int32 with scale": (lambda: scaled(output_dtype=torch.int32), "gives"),
    "grouped: int32 with tokens": (lambda: scaled(scale=None, output_dtype=torch.int32), "int32"),
    "grouped: token scale": (lambda: scaled(per_token_scale=[TOKENS[:, None]]), "per_token_scale"),
    "grouped: fp32 bias": (lambda: scaled(bias=[torch.ones(EXPERTS, 128)]), "bias"),
    "grouped: hint": (lambda: scaled(tuning_config=[10]), "tuning_config"),
    "grouped: hint of bf16": (lambda: grouped(X16, W8.to(BF16), tuning_config=[1]), "tuning_config"),
    "grouped: no rows": (lambda: grouped(X8[:0], W8, [0] * EXPERTS, output_dtype=torch.int32), "empty"),
    "int4: NZ": (lambda: antiquant(weight=nz(W4)), "only ND"),
    "int4: transposed": (lambda: antiquant(weight=W4.mT.contiguous().mT), "transposed"),
    "int4: packed along K": (lambda: antiquant(weight=torch.zeros(EXPERTS, 8, 128, dtype=torch.int32)), "K differs"),
    "int4: no offset": (lambda: grouped(X16, W4, antiquant_scale=[GROUPS]), "antiquant_offset"),
    "int4: fp32 scale": (lambda: antiquant(scale=GROUPS.float()), "antiquant_scale"),
    "int4: offset shape": (lambda: antiquant(offset=GROUPS[:, 0]), "antiquant_offset"),
    "int4: uneven groups": (lambda: antiquant(scale=GROUPS[:, [0, 1, 1]], offset=GROUPS[:, [0, 1, 1]]), "scale"),
    "int4: int32 counts": (lambda: antiquant(group_list=LIST.int()), "group_list"),
    "int4: one count": (lambda: antiquant(weight=W4[:1], group_list=torch.tensor([9])), "length 1"),
    "int4: pairs": (lambda: antiquant(group_list_type=2), "group_list_type"),
    "int4: fp16 output": (lambda: antiquant(output_dtype=torch.float16), "output_dtype"),
    "int8 weight by groups": (lambda: antiquant(weight=W8), "int4"),
    "fused: ND": (lambda: fused(cast=False), "must be FRACTAL_NZ"),
    "fused: int64 scale": (lambda: fused(scale=SCALE.long()), "weight_scale"),
    "fused: 1-D scale": (lambda: fused(scale=SCALE[0]), "weight_scale"),
    "fused: bf16 tokens": (lambda: fused(tokens=TOKENS.to(BF16)), "x_scale"),
    "fused: token shape": (lambda: fused(tokens=TOKENS[:, None]), "x_scale"),
    "fused: bf16 x": (lambda: fused(x=X16), "x is"),
    "fused: int32 counts": (lambda: fused(groups=LIST.int()), "group_list"),
    "fused: counts as ends": (lambda: fused(group_list_type=0), "cumulative"),
    "fused: too many": (lambda: fused(groups=LIST + 1), "sums to 15"),
    "fused: no rows": (lambda: fused(x=X8[:0], tokens=TOKENS[:0], groups=LIST * 0), "empty"),
    "fused: wide": (lambda: fused(int8(1, 16), int8(1, 16, 10272), torch.ones(1, 10272), ONE, LIST[1:2]), "10240"),
    "fused: tiles": (lambda: fused(weight=W8[..., :80].contiguous(), scale=SCALE[:, :80]), "tiles"),
    "dequant: width 96": (lambda: dequant(PRODUCT[:, :192].contiguous()), "H 96"),
    "dequant: static": (lambda: dequant(quant_mode=0), "quant_mode"),
    "dequant: wide": (lambda: dequant(torch.ones(9, 7296, dtype=torch.int32)), "7232"),
    "dequant: no groups": (lambda: dequant(group_index=None), "group_index"),
    "dequant: int32 groups": (lambda: dequant(group_index=LIST.int()), "group_index"),
    "dequant: ends": (lambda: dequant(group_index=LIST.cumsum(0)), "takes counts"),
    "dequant: no tokens": (lambda: dequant(activation_scale=None), "activation_scale is needed"),
    "dequant: no scale": (lambda: dequant(weight_scale=None), "weight_scale is needed"),
    "dequant: bf16 scale": (lambda: dequant(weight_scale=torch.ones(EXPERTS, 256).to(BF16)), "weight_scale"),
    "dequant: scale shape": (lambda: dequant(weight_scale=torch.ones(256)), "weight_scale"),
    "dequant: scales of bf16": (lambda: dequant(PRODUCT.to(BF16)), "given with"),
    "dequant: int8": (lambda: dequant(PRODUCT.to(INT8)), "int8"),
    "weight only: NZ": (lambda: weight_only(weight=nz(W4[0])), "FRACTAL_NZ"),
    "weight only: groups of 48": (lambda: weight_only(antiquant_group_size=48), "antiquant_group_size"),
    "weight only: group of all": (lambda: weight_only(antiquant_group_size=64), "antiquant_group_size"),
    "weight only: no group size": (lambda: weight_only(scale=GROUPS[0]), "no groups"),
    "weight only: groups": (lambda: weight_only(scale=GROUPS[0, :1], antiquant_group_size=32), "antiquant_scale"),
    "weight only: scale dtype": (lambda: weight_only(scale=WHOLE.float()), "antiquant_scale"),
    "weight only: offset dtype": (lambda: weight_only(offset=WHOLE.float()), "antiquant_offset"),
    "weight only: offset shape": (lambda: weight_only(offset=WHOLE[None]), "antiquant_offset"),
    "weight only: bf16 bias": (lambda: weight_only(bias=WHOLE), "bias"),
    "weight only: K": (lambda: weight_only(x=X16[:, :32].contiguous()), "K differs"),
    "weight only: precise": (lambda: weight_only(inner_precise=1), "inner_precise"),
    "weight only: no rows": (lambda: weight_only(x=X16[:0]), "empty"),
    "weight only: 3-D": (lambda: weight_only(weight=W4), "two dimensions"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


UNEMULATED = {
    "offset": lambda: matmul8(offset=ONE),
    "smooth_scale": lambda: fused(smooth_scale=SCALE),
    "bias": lambda: dequant(bias=PRODUCT[0]),
    "quant_scale": lambda: weight_only(quant_scale=ONE),
}


@pytest.mark.parametrize("name", UNEMULATED)
def test_unemulated_arguments_raise(name):
    with pytest.raises(NotImplementedError, match=name):
        UNEMULATED[name]()
