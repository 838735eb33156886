# SPDX-License-Identifier: Apache-2.0
"""Norms, rotary embedding, SwiGLU and formats against their formulas in float64."""

import pytest
import torch

BF16 = torch.bfloat16


def bf16(*shape):
    return torch.randn(*shape).to(BF16)


def close(have, want, tolerance=2e-2):
    torch.testing.assert_close(have.double(), want.double(), rtol=tolerance, atol=tolerance)


def test_rms_norm_over_gamma():
    import torch_npu

    x, gamma = bf16(3, 4, 128), bf16(128)
    y, rstd = torch_npu.npu_rms_norm(x, gamma, epsilon=1e-5)
    want = (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    close(y, x.double() * want * gamma.double())
    close(rstd, want, 1e-6)
    assert y.dtype == BF16 and rstd.dtype == torch.float32 and rstd.shape == (3, 4, 1)


def test_add_rms_norm_gives_the_sum_last():
    x1, x2, gamma = bf16(5, 64), bf16(5, 64), bf16(64)
    y, _, x = torch.ops.npu.npu_add_rms_norm(x1, x2, gamma, 1e-6)
    assert torch.equal(x, x1 + x2)
    wide = (x1 + x2).double()
    close(y, wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gamma.double())


def rotated(x, cos, sin):
    half = x.shape[-1] // 2
    first, second = x[..., :half].double(), x[..., half:].double()
    cos, sin = cos.double()[..., :half], sin.double()[..., :half]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


@pytest.mark.parametrize("layout, lead", [("TND", (7,)), ("BSND", (2, 3))])
@pytest.mark.parametrize("width", [64, 128])
def test_rotary_in_place(layout, lead, width):
    angle = torch.rand(*lead, 1, width // 2)
    cos, sin = (torch.cat((part, part), -1).to(BF16) for part in (angle.cos(), angle.sin()))
    q, k = bf16(*lead, 4, width), bf16(*lead, 2, width)
    want_q, want_k = rotated(q, cos, sin), rotated(k, cos, sin)
    out_q, out_k = torch.ops.npu.npu_apply_rotary_pos_emb(q, k, cos, sin, layout=layout)
    assert out_q.data_ptr() == q.data_ptr() and out_k.data_ptr() == k.data_ptr()
    close(q, want_q)
    close(k, want_k)


def test_rotary_of_a_slice_without_gradients():
    qkv, angle = bf16(5, 6, 128), torch.rand(5, 1, 64)
    cos, sin = (torch.cat((part, part), -1).to(BF16) for part in (angle.cos(), angle.sin()))
    with torch.inference_mode():
        q, k, v = qkv.clone().split([3, 2, 1], 1)
        torch.ops.npu.npu_apply_rotary_pos_emb(q, k, cos, sin, layout="TND")
        close(q, rotated(qkv[:, :3], cos, sin))
        assert torch.equal(v, qkv[:, 5:])


def test_rotary_mul_is_functional():
    x, angle = bf16(5, 3, 64), torch.rand(5, 1, 32)
    cos, sin = (torch.cat((part, part), -1).to(BF16) for part in (angle.cos(), angle.sin()))
    before = x.clone()
    close(torch.ops.npu.npu_rotary_mul(x, cos, sin), rotated(x, cos, sin))
    assert torch.equal(x, before)


def test_swiglu_takes_the_first_half_as_gate():
    x = bf16(6, 32)
    gate, up = x.double().chunk(2, -1)
    close(torch.ops.npu.npu_swiglu(x), gate / (1 + (-gate).exp()) * up)


def test_formats():
    import torch_npu

    weight = bf16(2, 32, 16)
    with pytest.warns(UserWarning, match="stays ND"):
        assert torch_npu.get_npu_format(torch_npu.npu_format_cast(weight, 29)) == 2
    torch.npu.config.allow_internal_format = True
    try:
        cast = torch_npu.npu_format_cast(weight, 29)
    finally:
        torch.npu.config.allow_internal_format = False
    assert torch_npu.get_npu_format(cast) == 29 and torch.equal(cast, weight)
    assert torch_npu.get_npu_format(torch_npu.npu_format_cast(cast, 2)) == 2
    with pytest.raises(ValueError, match="FRACTAL_NZ"):
        torch_npu.npu_swiglu(cast)
    groups = {"group_list": torch.tensor([1, 3]), "group_type": 0, "split_item": 3}
    torch_npu.npu_grouped_matmul([bf16(3, 32)], [cast], **groups)
    with pytest.raises(ValueError, match="slice of a FRACTAL_NZ"):
        torch_npu.npu_grouped_matmul([bf16(3, 32)], [cast[:1]], **groups)


def npu(name, *args, **kwargs):
    return getattr(torch.ops.npu, name)(*args, **kwargs)


ROPE = bf16(4, 2, 128), bf16(4, 1, 128), bf16(4, 1, 128), bf16(4, 1, 128)
REFUSED = {
    "gamma length": (lambda: npu("npu_rms_norm", bf16(2, 8), bf16(4)), "gamma"),
    "gamma of one": (lambda: npu("npu_rms_norm", bf16(2, 8), bf16(1)), "gamma"),
    "gamma dtype": (lambda: npu("npu_rms_norm", bf16(2, 8), torch.ones(8).half()), "gamma"),
    "add: x2 shape": (lambda: npu("npu_add_rms_norm", bf16(2, 8), bf16(1, 8), bf16(8)), "x2"),
    "add: gamma": (lambda: npu("npu_add_rms_norm", bf16(2, 8), bf16(2, 8), bf16(4)), "gamma"),
    "add: dtype": (lambda: npu("npu_add_rms_norm", bf16(2, 8), bf16(2, 8), torch.ones(8)), "dtypes"),
    "add: empty": (lambda: npu("npu_add_rms_norm", bf16(0, 8), bf16(0, 8), bf16(8)), "empty"),
    "rotary: layout": (lambda: npu("npu_apply_rotary_pos_emb", *ROPE, layout="BSH"), "layout"),
    "rotary: dims": (lambda: npu("npu_apply_rotary_pos_emb", *ROPE, layout="BSND"), "dimensions"),
    "rotary: mode": (lambda: npu("npu_apply_rotary_pos_emb", *ROPE, "TND", "interleave"), "half"),
    "rotary: width": (lambda: npu("npu_apply_rotary_pos_emb", *(bf16(4, 1, 96),) * 4, layout="TND"), "width"),
    "rotary: cos rows": (lambda: npu("npu_apply_rotary_pos_emb", *ROPE[:2], bf16(1, 1, 128), ROPE[3], "TND"), "cos"),
    "rotary: cos width": (lambda: npu("npu_apply_rotary_pos_emb", *ROPE[:2], *(bf16(4, 1, 64),) * 2, "TND"), "cos"),
    "rotary: dtype": (lambda: npu("npu_apply_rotary_pos_emb", *ROPE[:2], ROPE[2].float(), ROPE[3], "TND"), "dtypes"),
    "rotary: empty": (lambda: npu("npu_apply_rotary_pos_emb", *(bf16(0, 1, 128),) * 4, layout="TND"), "empty"),
    "rotary_mul: shape": (lambda: npu("npu_rotary_mul", bf16(4, 2, 64), *(bf16(3, 1, 64),) * 2), "fit"),
    "rotary_mul: odd": (lambda: npu("npu_rotary_mul", bf16(4, 2, 63), *(bf16(4, 1, 63),) * 2), "width"),
    "gamma fp64": (lambda: npu("npu_rms_norm", torch.ones(2, 8).double(), torch.ones(8).double()), "float64"),
    "norm of a vector": (lambda: npu("npu_rms_norm", bf16(8), bf16(8)), "dimensions"),
    "rotary: key rows": (lambda: npu("npu_apply_rotary_pos_emb", ROPE[0], ROPE[1][:2], *ROPE[2:], "TND"), "key"),
    "rotary_mul: mode": (lambda: npu("npu_rotary_mul", ROPE[0], ROPE[2], ROPE[3], "quarter"), "rotary_mode"),
    "rotary_mul: dtype": (lambda: npu("npu_rotary_mul", ROPE[0], ROPE[2].float(), ROPE[3].float()), "dtypes"),
    "rotary_mul: sin": (lambda: npu("npu_rotary_mul", ROPE[0], ROPE[2], ROPE[3][:1]), "r2"),
    "rotary_mul: one row": (lambda: npu("npu_rotary_mul", ROPE[0], ROPE[2][:1], ROPE[3][:1]), "one row"),
    "swiglu: odd": (lambda: npu("npu_swiglu", bf16(2, 7)), "odd"),
    "swiglu: strided": (lambda: npu("npu_swiglu", bf16(8, 4).t()), "contiguous"),
    "swiglu: dtype": (lambda: npu("npu_swiglu", torch.ones(2, 4, dtype=torch.int32)), "int32"),
    "cast: format": (lambda: npu("npu_format_cast", bf16(16, 16), 3), "acl_format"),
    "cast: strided": (lambda: npu("npu_format_cast", bf16(16, 8).t(), 29), "contiguous"),
    "cast: fp32": (lambda: npu("npu_format_cast", torch.ones(16, 16), 29), "float32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_wrong_keyword_is_refused():
    with pytest.raises(RuntimeError, match="eps"):
        npu("npu_rms_norm", bf16(2, 8), bf16(8), eps=1e-6)
