# SPDX-License-Identifier: Apache-2.0
"""The grouped matmul against one float64 product for each expert."""

import pytest
import torch

BF16 = torch.bfloat16
E, K, N = 4, 64, 24
COUNTS = [3, 0, 5, 1]


def bf16(*shape):
    return torch.randn(*shape).to(BF16)


def close(have, want, tolerance=2e-2):
    torch.testing.assert_close(have.double(), want.double(), rtol=tolerance, atol=tolerance * want.abs().max().item())


def matmul(x, weight, group_list=None, **settings):
    groups = torch.tensor(COUNTS) if group_list is None else group_list
    settings = {"group_list": groups, "group_type": 0, "group_list_type": 1, "split_item": 3} | settings
    return torch.ops.npu.npu_grouped_matmul([x], [weight], **settings)[0]


def reference(x, weight):
    experts = torch.arange(E).repeat_interleave(torch.tensor(COUNTS))
    return torch.stack([row.double() @ weight[e].double() for row, e in zip(x, experts, strict=True)])


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_groups_without_rows(dtype):
    x, weight, bias = torch.randn(9, K).to(dtype), torch.randn(E, K, N).to(dtype), torch.randn(E, N)
    want = reference(x, weight)
    out = matmul(x, weight)
    close(out, want)
    assert out.dtype == dtype
    assert torch.equal(out, matmul(x, weight, torch.tensor(COUNTS).cumsum(0), group_list_type=0))
    close(matmul(x, weight.transpose(1, 2).contiguous().transpose(1, 2)), want)
    bias = bias.half() if dtype == torch.float16 else bias
    experts = torch.arange(E).repeat_interleave(torch.tensor(COUNTS))
    close(matmul(x, weight, bias=[bias]), want + bias[experts].double())


def test_rows_past_the_groups_are_undefined():
    x = torch.full((12, K), torch.nan).to(BF16)
    x[:9] = bf16(9, K)
    weight = bf16(E, K, N)
    out = matmul(x, weight)
    close(out[:9], reference(x[:9], weight))
    assert out[9:].isnan().all()


def test_one_expert_with_cumulative_ends():
    x, weight = bf16(5, K), bf16(1, K, N)
    close(matmul(x, weight, torch.tensor([5]), group_list_type=0), x.double() @ weight[0].double())


def test_lists():
    x, weight = bf16(9, K), bf16(E, K, N)
    ends = torch.tensor(COUNTS).cumsum(0).tolist()
    one = torch.ops.npu.npu_grouped_matmul([x], list(weight), group_list=ends, split_item=3)
    close(one[0], reference(x, weight))
    parts = torch.ops.npu.npu_grouped_matmul([x[:4], x[4:]], list(weight[:2]), group_type=-1, split_item=0)
    close(parts[1], x[4:].double() @ weight[1].double())


def test_int8():
    x, weight = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((9, K), (E, K, N)))
    scale, tokens = torch.rand(E, N), torch.rand(9)
    experts = torch.arange(E).repeat_interleave(torch.tensor(COUNTS))
    exact = reference(x, weight)
    assert torch.equal(matmul(x, weight, output_dtype=torch.int32).double(), exact)
    want = exact * scale.to(BF16).double()[experts] * tokens.double()[:, None]
    out = matmul(x, weight, scale=[scale.to(BF16)], per_token_scale=[tokens], output_dtype=BF16)
    close(out, want)
    assert out.dtype == BF16


def test_int4_groups():
    x, values = bf16(9, K), torch.randint(-8, 8, (E, K, N))
    packed = torch.zeros(E, K, N // 8, dtype=torch.int64)
    for place in range(8):
        packed |= (values[..., place::8] & 15) << (4 * place)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    scale, offset = torch.rand(E, 2, N).to(BF16), torch.randint(-8, 8, (E, 2, N)).to(BF16)
    wide = (values.double() + offset.double().repeat_interleave(32, 1)) * scale.double().repeat_interleave(32, 1)
    out = matmul(x, packed, antiquant_scale=[scale], antiquant_offset=[offset])
    close(out, reference(x, wide.to(BF16)))


X, W = bf16(9, K), bf16(E, K, N)
INT = torch.ones(9, K, dtype=torch.int8), torch.ones(E, K, N, dtype=torch.int8)
REFUSED = {
    "K": (lambda: matmul(bf16(9, K + 1), W), "K differs"),
    "dtype": (lambda: matmul(X.half(), W), "dtypes"),
    "no group_type": (lambda: matmul(X, W, group_type=None), "group_type"),
    "split_item": (lambda: matmul(X, W, split_item=0), "split_item"),
    "int32 groups": (lambda: matmul(X, W, torch.tensor(COUNTS).int()), "group_list"),
    "groups' length": (lambda: matmul(X, W, torch.tensor([9, 0])), "group_list"),
    "too many rows": (lambda: matmul(X, W, torch.tensor([3, 0, 5, 2])), "sums to 10"),
    "counts as ends": (lambda: matmul(X, W, group_list_type=0), "cumulative"),
    "negative": (lambda: matmul(X, W, torch.tensor([3, -1, 5, 2])), "negative"),
    "one count": (lambda: matmul(X, W[:1], torch.tensor([9])), "length 1"),
    "no group_list": (lambda: torch.ops.npu.npu_grouped_matmul([X], [W], group_type=0, split_item=3), ""),
    "strided x": (lambda: matmul(bf16(K, 9).t(), W), "contiguous"),
    "strided weight": (lambda: matmul(X, bf16(E, K, 2 * N)[..., ::2]), "strides"),
    "empty": (lambda: matmul(X[:0], W, torch.zeros(E, dtype=torch.int64)), "empty"),
    "2-D weight": (lambda: matmul(X, W[0], torch.tensor([9])), "weight"),
    "bias dtype": (lambda: matmul(X, W, bias=[bf16(E, N)]), "bias"),
    "bias shape": (lambda: matmul(X, W, bias=[torch.ones(N)]), "bias"),
    "output": (lambda: matmul(X, W, output_dtype=torch.float32), "output_dtype"),
    "int8 output": (lambda: matmul(*INT), "int32"),
    "int8 scale": (lambda: matmul(*INT, scale=[torch.ones(E, N)], output_dtype=BF16), "scale"),
    "token scale": (
        lambda: matmul(*INT, scale=[bf16(E, N)], per_token_scale=[bf16(9)], output_dtype=BF16),
        "per_token_scale",
    ),
    "int weight alone": (lambda: matmul(X, INT[1]), "antiquant"),
    "wide": (lambda: matmul(bf16(9, 8), torch.empty(E, 8, 65536, dtype=BF16)), "65536"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, message = REFUSED[case]
    with pytest.raises((ValueError, RuntimeError), match=message or None):
        call()
