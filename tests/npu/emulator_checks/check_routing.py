# SPDX-License-Identifier: Apache-2.0
"""Gating, sorting and combine of tokens against sums per token in float64."""

import pytest
import torch

BF16 = torch.bfloat16
T, H, E, K = 11, 32, 16, 3


def bf16(*shape):
    return torch.randn(*shape).to(BF16)


def close(have, want, tolerance=2e-2):
    torch.testing.assert_close(have.double(), want.double(), rtol=tolerance, atol=tolerance)


def npu(name, *args, **kwargs):
    return getattr(torch.ops.npu, name)(*args, **kwargs)


def choose(tokens=T, experts=E, k=K):
    """Distinct experts of each token; the last quarter of the experts is never chosen."""
    ids = torch.stack([torch.randperm(experts - experts // 4)[:k] for _ in range(tokens)])
    return ids.to(torch.int32)


def route(x, ids, bounds=(0, E), **settings):
    fixed = {"active_num": ids.numel(), "expert_num": E, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True}
    return npu("npu_moe_init_routing_v2", x, ids, **(fixed | {"active_expert_range": list(bounds)} | settings))


def test_gating_does_not_renormalise():
    logits = torch.randn(T, E)
    logits[0, :] = 0  # ties go to the lower expert
    weights, ids, rows = npu("npu_moe_gating_top_k_softmax", logits, None, k=K)
    full = logits.double().softmax(-1)
    for token in range(T):
        best = sorted(range(E), key=lambda expert, token=token: (-full[token, expert].item(), expert))[:K]
        assert token > 0 or best == [0, 1, 2]
        assert ids[token].tolist() == best
        close(weights[token], full[token, best], 1e-6)
    assert rows[4, 2] == 2 * T + 4 and ids.dtype == rows.dtype == torch.int32
    assert npu("npu_moe_gating_top_k_softmax", logits.to(BF16), None, k=K)[0].dtype == BF16
    done = torch.arange(T) == 3
    assert npu("npu_moe_gating_top_k_softmax", logits, done, k=K)[1][3].tolist() == [E] * K


def test_gating_v2_renormalises():
    logits = torch.randn(T, E)
    weights, ids, _ = npu("npu_moe_gating_top_k_softmax_v2", logits, k=K, renorm=1)
    first, same, full = npu("npu_moe_gating_top_k_softmax_v2", logits, k=K, output_softmax=True)
    assert torch.equal(ids, same)
    close(full, logits.double().softmax(-1), 1e-6)
    close(first, full.gather(1, ids.long()), 1e-6)
    close(weights, first / first.sum(-1, keepdim=True), 1e-6)


@pytest.mark.parametrize("bounds", [(0, E), (4, 9), (12, 16)])
def test_routing_of_a_range(bounds):
    x, ids = bf16(T, H), choose()
    out, index, counts, _ = route(x, ids, bounds)
    pairs = [(ids[t, k].item(), t, k) for t in range(T) for k in range(K) if bounds[0] <= ids[t, k] < bounds[1]]
    pairs.sort(key=lambda pair: pair[:2])
    valid = len(pairs)
    assert valid == 0 or torch.equal(out[:valid], x[[t for _, t, _ in pairs]])
    assert out.shape == (T * K, H) and out[valid:].isnan().all()
    want = torch.full((T, K), -1, dtype=torch.int32)
    for row, (_, t, k) in enumerate(pairs):
        want[t, k] = row
    assert torch.equal(index, want.flatten())
    assert counts.tolist() == [sum(pair[0] == expert for pair in pairs) for expert in range(*bounds)]
    scatter = route(x, ids, bounds, row_idx_type=1)[1]
    assert scatter[:valid].tolist() == [t * K + k for _, t, k in pairs]
    assert (scatter[valid:].abs() > T * K).all()
    table = route(x, ids, bounds, expert_tokens_num_type=2)[2]
    used = sorted({pair[0] for pair in pairs})
    assert table[: len(used)].tolist() == [[e, counts[e - bounds[0]].item()] for e in used]
    assert table[len(used)].tolist() == [0, 0] and table.shape == (E, 2)


def test_routing_with_scales_and_quantised():
    x, ids, scale = bf16(T, H), choose(), torch.rand(T)
    plain, index, _, undefined = route(x, ids)
    assert undefined.isnan().all()
    order = index.argsort()
    assert torch.equal(route(x, ids, scale=scale)[3], scale[order // K])
    out, _, _, scales = route(x, ids, quant_mode=1)
    close(out.double() * scales.double()[:, None], plain, 0.05)
    close(scales, plain.double().abs().amax(-1) / 127, 1e-6)


def test_return_to_tokens():
    x, ids, weights = bf16(T, H), choose(), torch.rand(T, K).to(BF16)
    rows, index, _, _ = route(x, ids)
    rows = rows + torch.arange(T * K)[:, None].to(BF16) / 8
    skip, bias = bf16(T, H), bf16(E, H)
    want = torch.zeros(T, H, dtype=torch.float64)
    for t in range(T):
        for k in range(K):
            want[t] += weights[t, k].double() * rows[index[t * K + k].item()].double()
    close(npu("npu_moe_finalize_routing", rows, None, None, None, weights, index, None, drop_pad_mode=2), want, 3e-2)
    by_column = index.view(T, K).t().flatten().contiguous()
    out = npu("npu_moe_finalize_routing", rows, None, None, None, weights, by_column, None)
    close(out, want, 3e-2)
    close(npu("npu_moe_token_unpermute", rows, index, probs=weights), want, 3e-2)
    out = npu("npu_moe_finalize_routing", rows, skip, skip, bias, weights, index, ids, drop_pad_mode=2)
    biased = (weights.double()[..., None] * bias.double()[ids.long()]).sum(1)
    close(out, want + biased + 2 * skip.double(), 4e-2)
    padded, dropped = rows.expand(K, -1, -1), index.clone()
    dropped[0] = -1
    out = npu("npu_moe_finalize_routing", padded, None, None, None, weights, dropped, None, drop_pad_mode=3)
    want[0] -= weights[0, 0].double() * rows[index[0].item()].double()
    close(out, want, 3e-2)


def test_permute_and_unpermute():
    x, ids = bf16(T, H), choose()
    rows, index = npu("npu_moe_token_permute", x, ids.long())
    plain, same, _, _ = route(x, ids)
    assert torch.equal(rows, plain) and torch.equal(index, same)
    weights = torch.full((T, K), 1 / K)
    close(npu("npu_moe_token_unpermute", rows, index, probs=weights), x)
    assert len(npu("npu_moe_token_permute", x, ids, num_out_tokens=5)[0]) == 5
    assert torch.equal(npu("npu_moe_token_unpermute", plain, torch.arange(T * K).flip(0).int()), plain.flip(0))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_re_routing(dtype):
    counts = torch.tensor([[2, 0, 3], [0, 0, 4], [1, 0, 0]], dtype=dtype)
    labels = [(e, r, i) for r in range(3) for e in range(3) for i in range(counts[r, e])]
    tokens, scales = bf16(10, H), torch.rand(10)
    order = sorted(range(10), key=lambda row: labels[row])
    out, out_scales, index, sums = npu("npu_moe_re_routing", tokens, counts, per_token_scales=scales)
    assert index.tolist() == order and index.dtype == torch.int32
    assert torch.equal(out, tokens[order]) and torch.equal(out_scales, scales[order])
    assert sums.tolist() == [3, 0, 7] and sums.dtype == dtype
    assert npu("npu_moe_re_routing", tokens, counts)[1].isnan().all()


X, IDS = bf16(2, H), torch.tensor([[0, 1], [2, 1]], dtype=torch.int32)
ROWS, WEIGHTS, INDEX = bf16(4, H), torch.ones(2, 2, dtype=BF16), torch.tensor([0, 2, 3, 1], dtype=torch.int32)
COUNTS = torch.tensor([[1, 1], [2, 0]])


def finalize(rows=ROWS, skip1=None, skip2=None, bias=None, weights=WEIGHTS, index=INDEX, experts=None, mode=2):
    npu("npu_moe_finalize_routing", rows, skip1, skip2, bias, weights, index, experts, drop_pad_mode=mode)


REFUSED = {
    "gating: k": (lambda: npu("npu_moe_gating_top_k_softmax", torch.ones(2, 4), None, k=5), "k 5"),
    "gating: dtype": (lambda: npu("npu_moe_gating_top_k_softmax", torch.ones(2, 4).double(), None, k=1), "float64"),
    "gating v2: renorm": (lambda: npu("npu_moe_gating_top_k_softmax_v2", torch.ones(2, 4), k=1, renorm=2), "renorm"),
    "init: no range": (lambda: route(X, IDS, ()), "active_expert_range is not given"),
    "init: range": (lambda: route(X, IDS, (0, E + 1)), "active_expert_range"),
    "init: empty range": (lambda: route(X, IDS, (3, 3)), "active_expert_range"),
    "init: expert past the end": (lambda: route(X, IDS + E, (0, E)), "expert_idx leaves"),
    "init: int64": (lambda: route(X, IDS.long()), "expert_idx"),
    "init: no expert_num": (lambda: route(X, IDS, expert_num=-1), "expert_num"),
    "init: rows": (lambda: route(X[:1], IDS), "rows"),
    "init: cumulative": (lambda: route(X, IDS, expert_tokens_num_type=0), "expert_tokens_num_type"),
    "init: no counts": (lambda: route(X, IDS, expert_tokens_num_flag=False), "expert_tokens_num_flag"),
    "init: drop": (lambda: route(X, IDS, drop_pad_mode=1), "drop_pad_mode"),
    "init: static": (lambda: route(X, IDS, quant_mode=0), "quant_mode"),
    "init: scale": (lambda: route(X, IDS, scale=torch.ones(3)), "scale"),
    "init: scale dtype": (lambda: route(X, IDS, scale=torch.ones(2).half()), "scale"),
    "finalize: scales' dtype": (lambda: finalize(weights=WEIGHTS.float()), "dtypes"),
    "finalize: scales": (lambda: finalize(weights=WEIGHTS[:1]), "scales"),
    "finalize: -1": (lambda: finalize(index=INDEX - 1), "leaves"),
    "finalize: past the end": (lambda: finalize(index=INDEX + 1), "leaves"),
    "finalize: int64": (lambda: finalize(index=INDEX.long()), "int64"),
    "finalize: skip2 alone": (lambda: finalize(skip2=bf16(2, H)), "skip2"),
    "finalize: skip1": (lambda: finalize(skip1=bf16(1, H)), "skip1"),
    "finalize: bias alone": (lambda: finalize(bias=bf16(4, H)), "export_for_source_row"),
    "finalize: few experts": (lambda: finalize(rows=ROWS[None], mode=3), "E under K"),
    "finalize: mode": (lambda: finalize(mode=4), "drop_pad_mode"),
    "finalize: rows": (lambda: finalize(rows=bf16(5, H)), "5 rows"),
    "permute: fp32": (lambda: npu("npu_moe_token_permute", X.float(), IDS), "float32"),
    "permute: negative": (lambda: npu("npu_moe_token_permute", X, IDS - 1), "indices"),
    "permute: padded": (lambda: npu("npu_moe_token_permute", X, IDS, padded_mode=True), "padded_mode"),
    "unpermute: -1": (lambda: npu("npu_moe_token_unpermute", ROWS, INDEX - 1), "leave"),
    "unpermute: int64": (lambda: npu("npu_moe_token_unpermute", ROWS, INDEX.long()), "int64"),
    "unpermute: probs": (lambda: npu("npu_moe_token_unpermute", ROWS, INDEX, probs=WEIGHTS[:1]), "probs"),
    "re_routing: sum": (lambda: npu("npu_moe_re_routing", ROWS, COUNTS + 1), "sums to 8"),
    "re_routing: flat": (lambda: npu("npu_moe_re_routing", ROWS, COUNTS.flatten()), "ranks"),
    "re_routing: none": (lambda: npu("npu_moe_re_routing", ROWS[:0], COUNTS * 0), "no tokens"),
    "re_routing: fp32": (lambda: npu("npu_moe_re_routing", ROWS.float(), COUNTS), "float32"),
    "re_routing: cumulative": (
        lambda: npu("npu_moe_re_routing", ROWS, COUNTS, expert_token_num_type=0),
        "type 1",
    ),
    "re_routing: scales": (
        lambda: npu("npu_moe_re_routing", ROWS, COUNTS, per_token_scales=torch.ones(4).half()),
        "per_token_scales",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()
