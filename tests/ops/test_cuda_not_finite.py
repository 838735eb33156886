# SPDX-License-Identifier: Apache-2.0
"""Tests that NaN and infinity do not spread to other rows in the Triton kernels nor select invalid experts."""

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton", reason="the kernels need triton")

import triton  # noqa: E402

from ops import DenseWeight, RouterLogits  # noqa: E402
from ops.cuda import CudaOps  # noqa: E402
from ops.cuda.moe import topk_softmax_kernel  # noqa: E402
from ops.reference import ReferenceOps  # noqa: E402
from tests.logits import relative_error  # noqa: E402
from tests.ops.test_cuda_kernels import (  # noqa: E402
    DEVICE,
    EPS,
    HEADS,
    TOLERANCE,
    attention_inputs,
    decode_inputs,
    expert_weights,
    float_weight,
    random,
)

NAN, INF = float("nan"), float("inf")
NEGATIVE_NAN = torch.tensor([-1, 0xFFC00000 - 2**32], dtype=torch.int32).view(torch.float32)
REFERENCE = ReferenceOps()
SIZES = [(10, 3), (8, 8), (128, 8), (100, 8)] if ON_GPU else [(10, 3), (8, 8), (5, 1)]  # experts, top-k


@pytest.fixture(autouse=True)
def seed(request):
    torch.manual_seed(sum(map(ord, request.node.name)))


def special_logits(num_experts: int) -> dict[str, torch.Tensor]:
    """Router logits [E] by name: "sound", "tie" (experts may differ), and others, whose outputs are NaN."""
    rows = {name: torch.randn(num_experts) for name in ("one NaN", "one -NaN", "infinities", "sound random")}
    rows["one NaN"][1] = NAN
    rows["one -NaN"][2] = NEGATIVE_NAN[0]
    rows["infinities"][[0, 3]] = INF
    rows |= {"all NaN": torch.full((num_experts,), NAN), "all -NaN": NEGATIVE_NAN[1].expand(num_experts)}
    rows |= {f"all {value}": torch.full((num_experts,), value) for value in (INF, -INF)}
    rows |= {f"tie of {value}": torch.full((num_experts,), value) for value in (0.0, -0.0, -1e30, 3e38)}
    rows["sound and -inf"] = torch.full((num_experts,), -INF)
    rows["sound and -inf"][4] = -2.0
    rows["sound, very low"] = torch.linspace(-7e4, -6e4, num_experts)
    return {name: row.to(DEVICE) for name, row in rows.items()}


def assert_equal_where_sound(found: torch.Tensor, expected: torch.Tensor, names: list[str]) -> None:
    """Compares rows [N] by name: sound rows are close, ties finite, all other rows not finite in both."""
    for row, expected_row, name in zip(found, expected, names, strict=True):
        if name.startswith("sound"):
            assert relative_error(row, expected_row) < TOLERANCE, name
        elif name.startswith("tie"):
            assert row.isfinite().all(), name
        else:
            assert not row.isfinite().any() and not expected_row.isfinite().any(), name


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("num_experts, top_k", SIZES)
def test_choice_of_experts(num_experts, top_k, renormalize):
    names, rows = zip(*special_logits(num_experts).items(), strict=True)
    logits = torch.stack(rows)
    weights = torch.empty(len(rows), top_k, device=DEVICE)
    ids = torch.full((len(rows), top_k), -7, device=DEVICE)
    sizes = {"E": num_experts, "BLOCK_E": triton.next_power_of_2(num_experts), "TOP_K": top_k}
    topk_softmax_kernel[(len(rows),)](logits, weights, ids, **sizes, RENORMALIZE=renormalize, num_warps=1)
    for name, chosen in zip(names, ids.tolist(), strict=True):
        assert len(set(chosen)) == top_k and min(chosen) >= 0 and max(chosen) < num_experts, name
    expected = RouterLogits(logits, top_k, renormalize).chosen()
    assert_equal_where_sound(weights, expected.topk_weights, names)
    for name, own, theirs in zip(names, ids, logits.topk(top_k).indices, strict=True):
        if name in ("sound random", "sound, very low"):
            assert own.tolist() == theirs.tolist(), name


@pytest.mark.parametrize("num_tokens", [1, 3, 8])
@pytest.mark.parametrize(("ranks", "renormalize"), [(1, True), (2, False)])
def test_experts_of_few_tokens(ranks, num_tokens, renormalize):
    """On one rank or split over two: the same rows are not finite as in the reference."""
    num_experts, d, f, top_k = (100, 512, 128, 8) if ON_GPU else (10, 32, 16, 3)
    special = special_logits(num_experts)
    gate_up, down = expert_weights(num_experts, d, f)
    count = num_experts // ranks
    x = random(num_tokens, d)
    for first in range(0, len(special), num_tokens):
        names = [*special, *special][first : first + num_tokens]
        routing = RouterLogits(torch.stack([special[name] for name in names]), top_k, renormalize)
        found = 0
        for rank in range(ranks):
            here = slice(rank * count, (rank + 1) * count)
            weights = DenseWeight(gate_up.data[here].contiguous()), DenseWeight(down.data[here].contiguous())
            found = found + CudaOps().experts(x, routing.of_rank(rank * count, count), *weights).float()
        expected = REFERENCE.experts(x.float(), routing, float_weight(gate_up), float_weight(down))
        assert_equal_where_sound(found, expected, names)


def products() -> dict[str, tuple]:
    """Operations on several tokens: layer sizes and a function of x [T, D]."""
    d, n, num_experts, f = (1024, 512, 16, 128) if ON_GPU else (32, 48, 6, 16)
    weight, small = DenseWeight(random(n, d)), DenseWeight(random(8, d))
    router, gain = random(num_experts, d), random(d)
    gate_up, down = expert_weights(num_experts, d, f)

    def layer(ops, x):
        normed, _, routing = ops.route(x, None, gain, EPS, router, 2, True)
        return ops.experts(normed, routing, gate_up, down)

    return {
        "linear": (d, lambda ops, x: ops.linear(x, weight)),
        "small linear": (d, lambda ops, x: ops.linear(x, small)),
        "norm_linear": (d, lambda ops, x: ops.norm_linear(x, None, gain, EPS, weight)[0]),
        "add_norm": (d, lambda ops, x: ops.add_norm(x, x.float(), gain, EPS)[0]),
        "silu_and_mul": (2 * d, lambda ops, x: ops.silu_and_mul(x)),
        "layer": (d, layer),
    }


@pytest.mark.parametrize("num_tokens", [2, 8, 70])
@pytest.mark.parametrize("name", ["linear", "small linear", "norm_linear", "add_norm", "silu_and_mul", "layer"])
def test_other_rows_do_not_change(name, num_tokens, monkeypatch):
    """Including rows of tokens routed to the same experts."""
    monkeypatch.setattr("ops.cuda.linear.SMALL_BYTES", 32 * 48)
    d, run = products()[name]
    ops, x = CudaOps(), random(num_tokens, d)
    expected = run(ops, x).clone()
    assert expected.isfinite().all()
    for value in (NAN, INF, -INF):
        row = int(torch.randint(0, num_tokens, ()))
        damaged = x.clone()
        damaged[row] = value
        found = run(ops, damaged)
        others = torch.arange(num_tokens, device=DEVICE) != row
        assert torch.equal(found[others], expected[others])
        assert not found[row].isfinite().all()


@pytest.mark.parametrize(
    ("part", "seq_lens"),
    [("all", [5, 40, 30]), ("query", [1, 2, 3, 70, 1]), ("key", [5, 40, 30]), ("value", [1, 2, 3, 70, 1])],
)
def test_packed_prompts_do_not_see_each_others_numbers(seq_lens, part):
    """Neither other prompts in the same tile nor later tokens affect a row."""
    num_heads, num_kv_heads, head_dim = HEADS[0]
    qkv, norms, cos_sin, caches, step = attention_inputs(seq_lens, seq_lens, HEADS[0])
    first_key, first_value = num_heads * head_dim, (num_heads + num_kv_heads) * head_dim
    columns = {
        "all": slice(None),
        "query": slice(0, first_key),
        "key": slice(first_key, first_value),
        "value": slice(first_value, None),
    }
    ops = CudaOps()
    expected = ops.attention(qkv, *norms, EPS, cos_sin, *caches, step).clone()
    assert expected.isfinite().all()
    ends = torch.tensor(seq_lens).cumsum(0).tolist()
    for value in (NAN, INF if torch.rand(()) < 0.5 else -INF):
        damaged, token = qkv.clone(), int(torch.randint(0, len(qkv), ()))
        damaged[token, columns[part]] = value
        found = ops.attention(damaged, *norms, EPS, cos_sin, *caches, step)
        end = next(end for end in ends if end > token)
        touched = torch.zeros(len(qkv), dtype=torch.bool, device=DEVICE)
        touched[token : token + 1 if part == "query" else end] = True
        assert torch.equal(found[~touched], expected[~touched])
        assert not found[touched].isfinite().any()


def test_sequences_of_a_decode_step_do_not_see_each_others_numbers():
    seq_lens = [300, 5, 129]
    qkv, norms, cos_sin, caches, step = decode_inputs(seq_lens, HEADS[0])
    ops = CudaOps()
    expected = ops.attention(qkv, *norms, EPS, cos_sin, *caches, step).clone()
    for failing in range(len(seq_lens)):
        damaged, damaged_caches = qkv.clone(), [cache.clone() for cache in caches]
        damaged[failing] = NAN
        for cache in damaged_caches:
            cache[step.block_table[failing]] = NAN
        found = ops.attention(damaged, *norms, EPS, cos_sin, *damaged_caches, step)
        others = torch.arange(len(seq_lens), device=DEVICE) != failing
        assert torch.equal(found[others], expected[others])
        assert not found[failing].isfinite().any()
