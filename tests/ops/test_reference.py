# SPDX-License-Identifier: Apache-2.0
"""Compares the reference operations with formulas in float64."""

import math
import random

import pytest
import torch

from ops import OPERATIONS, DenseWeight, GroupedRows, Routing, load_ops
from ops.reference import ReferenceOps
from ops.step import Span, step_inputs

OPS = ReferenceOps()
BLOCK_SIZE = 16
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCES))


@pytest.fixture(autouse=True)
def fresh_inputs():
    torch.seed()


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Asserts equality up to the rounding of `dtype`, relative to the largest expected value."""
    assert found.shape == expected.shape
    atol = TOLERANCES[dtype] * expected.abs().max().item()
    torch.testing.assert_close(found.double(), expected.double(), atol=atol, rtol=0)


def normed(rows: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    rows = rows.double()
    return rows / (rows.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_every_operation_is_there(device_type):
    ops = load_ops(device_type)
    assert isinstance(ops, ReferenceOps) and ops.grouped_mm == (device_type != "cpu")


def test_fallbacks():
    """On a CPU the reference is the backend; on an accelerator every operation is a fallback."""
    assert ReferenceOps().fallbacks(torch.bfloat16) == []
    assert ReferenceOps(grouped_mm=True).fallbacks(torch.bfloat16) == OPERATIONS
    assert {"embedding", "norm_linear", "attention", "linear", "route", "experts"} <= set(OPERATIONS)


@DTYPES
def test_embedding(dtype):
    weight, token_ids = torch.randn(30, 8).to(dtype), torch.randint(0, 30, (11,))
    assert torch.equal(OPS.embedding(token_ids, weight), torch.stack([weight[i] for i in token_ids.tolist()]))


@DTYPES
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_add_norm(eps, has_residual, dtype):
    hidden_states, weight = torch.randn(5, 24).to(dtype), torch.rand(24).to(dtype) + 0.5
    residual = torch.randn(5, 24) if has_residual else None
    found, new_residual = OPS.add_norm(hidden_states, residual, weight, eps)
    expected_residual = hidden_states.double() + (residual.double() if has_residual else 0)
    assert found.dtype == dtype and new_residual.dtype == torch.float32
    assert_near(new_residual, expected_residual, torch.float32)
    assert_near(found, normed(expected_residual, weight, eps), dtype)


@DTYPES
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_and_norm_linear(has_bias, dtype):
    hidden_states, norm_weight, residual = torch.randn(4, 24).to(dtype), torch.rand(24).to(dtype), torch.randn(4, 24)
    weight, bias = torch.randn(10, 24).to(dtype), torch.randn(10).to(dtype) if has_bias else None
    plus = bias.double() if has_bias else 0
    found = OPS.linear(hidden_states, DenseWeight(weight), bias)
    assert_near(found, hidden_states.double() @ weight.double().T + plus, dtype)
    found, new_residual = OPS.norm_linear(hidden_states, residual, norm_weight, 1e-6, DenseWeight(weight), bias)
    total = hidden_states.double() + residual.double()
    assert_near(new_residual, total, torch.float32)
    assert_near(found, normed(total, norm_weight, 1e-6) @ weight.double().T + plus, dtype)


@DTYPES
def test_silu_and_mul(dtype):
    gate_up = torch.randn(6, 20).to(dtype)
    gate, up = gate_up[:, :10].double(), gate_up[:, 10:].double()
    assert_near(OPS.silu_and_mul(gate_up), gate / (1 + (-gate).exp()) * up, dtype)


# Attention


def rotated(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [T, H, C] by `angles` [T, C / 2]: (i, i + C / 2) of a head form a complex number."""
    half = heads.shape[-1] // 2
    turned = torch.complex(heads[..., :half], heads[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


def attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of one query token [H, C] over its visible keys and values [t, G, C] -> [H * C]."""
    per_kv_head = query.shape[0] // key.shape[1]
    outputs = []
    for head, row in enumerate(query):
        scores = key[:, head // per_kv_head] @ row / math.sqrt(row.shape[0])
        outputs.append(
            (scores - scores.max()).exp() / (scores - scores.max()).exp().sum() @ value[:, head // per_kv_head]
        )
    return torch.cat(outputs)


class Attention:
    """Random attention inputs of a step: sequences (cached, new tokens) in shuffled cache blocks; expected output."""

    def __init__(
        self,
        parts: list[tuple[int, int]],
        num_heads: int,
        num_kv_heads: int,
        dtype: torch.dtype,
        is_decode: bool = False,
    ):
        head_dim, self.num_heads, self.num_kv_heads = 8, num_heads, num_kv_heads
        num_tokens, most = sum(new for _, new in parts), sum(-(-sum(part) // BLOCK_SIZE) + 1 for part in parts)
        blocks = (1 + torch.randperm(most)).tolist()
        self.rows = [[blocks.pop() for _ in range(-(-sum(part) // BLOCK_SIZE))] for part in parts]
        spans = [Span(cached, new, row, cached + new) for (cached, new), row in zip(parts, self.rows, strict=True)]
        _, self.step = step_inputs(spans, [[]] * len(spans), "cpu", is_decode=is_decode)
        self.caches = [torch.randn(most + 1, BLOCK_SIZE, num_kv_heads, head_dim).to(dtype) for _ in range(2)]
        self.qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
        self.norm_weights = [(torch.rand(head_dim) + 0.5).to(dtype) for _ in range(2)]
        self.angles = self.step.positions[:, None].double() * torch.rand(head_dim // 2).double()

    def slots(self, row: int, count: int) -> torch.Tensor:
        """Cache slots of a sequence's first tokens."""
        return torch.tensor([self.rows[row][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(count)])

    def run(self) -> torch.Tensor:
        cos_sin = tuple(torch.cat((part, part), dim=-1).float() for part in (self.angles.cos(), self.angles.sin()))
        return OPS.attention(self.qkv, *self.norm_weights, 1e-6, cos_sin, *self.caches, self.step)

    def expected(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Computes expected output and caches from the inputs; call it before `run`."""
        heads = self.qkv.double().unflatten(-1, (-1, 8))
        h, g = self.num_heads, self.num_kv_heads
        query = rotated(normed(heads[:, :h], self.norm_weights[0], 1e-6), self.angles)
        key = rotated(normed(heads[:, h : h + g], self.norm_weights[1], 1e-6), self.angles)
        caches = [cache.double().flatten(0, 1) for cache in self.caches]
        for cache, new in zip(caches, (key, heads[:, h + g :]), strict=True):
            for token, slot in enumerate(self.step.slot_mapping.tolist()):
                cache[slot] = new[token]
        rows = [row for row, n in enumerate(self.step.query_lens_list) for _ in range(n)]
        outputs = []
        for token, (row, position) in enumerate(zip(rows, self.step.positions.tolist(), strict=True)):
            seen = self.slots(row, position + 1)
            outputs.append(attended(query[token], caches[0][seen], caches[1][seen]))
        return torch.stack(outputs), caches

    def check(self, dtype: torch.dtype) -> None:
        """Compares the output, what is written to the cache, and that nothing else is."""
        expected, expected_caches = self.expected()
        before = [cache.clone() for cache in self.caches]
        found = self.run()
        assert found.dtype == dtype
        assert_near(found, expected, dtype)
        written = torch.zeros(len(expected_caches[0]), dtype=torch.bool)
        written[self.step.slot_mapping] = True
        for cache, old, new in zip(self.caches, before, expected_caches, strict=True):
            assert_same(cache.flatten(0, 1)[~written], old.flatten(0, 1)[~written])
            assert_near(cache.flatten(0, 1)[written], new[written], dtype)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=0, rtol=0, equal_nan=True)


def parts_of(kind: str, seq_lens: list[int]) -> list[tuple[int, int]]:
    """(cached, new tokens) of sequences of these lengths in a step."""
    if kind == "prefill":
        return [(0, seq_len) for seq_len in seq_lens]
    if kind == "decode":
        return [(seq_len - 1, 1) for seq_len in seq_lens]
    new = [random.randint(1, seq_len) for seq_len in seq_lens]
    return [(seq_len - count, count) for seq_len, count in zip(seq_lens, new, strict=True)]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr("ops.step.BLOCK_SIZE", BLOCK_SIZE)


LENGTHS = [[1], [BLOCK_SIZE + 3], [5, 1, 2 * BLOCK_SIZE, BLOCK_SIZE + 1, BLOCK_SIZE - 1]]


@DTYPES
@pytest.mark.parametrize("kind", ["prefill", "decode", "chunks"])
@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (4, 4), (8, 1)])
@pytest.mark.parametrize("seq_lens", LENGTHS)
def test_attention(seq_lens, heads, kind, dtype, small_blocks):
    case = Attention(parts_of(kind, seq_lens), *heads, dtype, is_decode=kind == "decode")
    assert kind != "prefill" or case.step.starts_fresh
    case.check(dtype)


@pytest.mark.parametrize("kind", ["decode", "chunks"])
def test_attention_reads_no_more_than_the_sequence_has(kind, small_blocks):
    """The table is part of a wider one whose other entries are stale; stale blocks and the null block hold NaN."""
    seq_lens = [5, 1, 2 * BLOCK_SIZE, BLOCK_SIZE + 1]
    case = Attention(parts_of(kind, seq_lens), 4, 2, torch.float32, is_decode=kind == "decode")
    used = {block for row in case.rows for block in row}
    stale = [block for block in range(len(case.caches[0])) if block not in used]
    for cache in case.caches:
        cache[stale] = torch.nan
    wide = torch.full((9, 7), stale[-1], dtype=torch.int32)
    width = case.step.block_table.shape[1]
    for row, blocks in enumerate(case.rows):
        wide[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    case.step = type(case.step)(**{**vars(case.step), "block_table": wide[: len(case.rows), :width]})
    case.check(torch.float32)


def test_attention_in_chunks_equals_attention_of_the_whole_prompt(small_blocks):
    """The cache, too, whatever the chunks."""
    length = 3 * BLOCK_SIZE
    whole = Attention([(0, length)], 6, 2, torch.float32)
    caches = [cache.clone() for cache in whole.caches]
    expected, done, found = whole.run(), 0, []
    while done < length:
        count = random.randint(1, length - done)
        chunk = Attention([(done, count)], 6, 2, torch.float32)
        _, chunk.step = step_inputs([Span(done, count, whole.rows[0], length)], [[]], "cpu")
        part = slice(done, done + count)
        chunk.qkv, chunk.angles, chunk.caches = whole.qkv[part], whole.angles[part], caches
        chunk.norm_weights = whole.norm_weights
        found.append(chunk.run())
        done += count
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-5, rtol=0)
    for cache, other in zip(caches, whole.caches, strict=True):
        assert_same(cache[whole.rows[0]], other[whole.rows[0]])


def test_attention_without_tokens():
    """A rank whose sequences have nothing to compute in this step."""
    _, step = step_inputs([], [], "cpu", dp_num_tokens=[0, 5], is_decode=False)
    caches = [torch.randn(3, 128, 2, 8) for _ in range(2)]
    before = [cache.clone() for cache in caches]
    cos_sin = torch.empty(0, 8), torch.empty(0, 8)
    found = OPS.attention(torch.empty(0, 8 * 8), torch.ones(8), torch.ones(8), 1e-6, cos_sin, *caches, step)
    assert found.shape == (0, 4 * 8) and all(map(torch.equal, caches, before))


# Experts


@DTYPES
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("top_k", [1, 3, 7])
def test_route(top_k, renormalize, dtype):
    hidden_states, residual = torch.randn(9, 24).to(dtype), torch.randn(9, 24)
    norm_weight, router_weight = torch.rand(24).to(dtype), torch.randn(7, 24).to(dtype)
    found, new_residual, routing = OPS.route(
        hidden_states, residual, norm_weight, 1e-6, router_weight, top_k, renormalize
    )
    total = hidden_states.double() + residual.double()
    assert_near(new_residual, total, torch.float32)
    assert_near(found, normed(total, norm_weight, 1e-6), dtype)
    # Uses the rounded normed states, so that near ties resolve the same way.
    probabilities = (found @ router_weight.T).double().softmax(dim=-1)
    assert routing.topk_weights.dtype == torch.float32 and routing.topk_ids.dtype == torch.int64
    for token, row in enumerate(probabilities.tolist()):
        ids = routing.topk_ids[token].tolist()
        assert len(set(ids)) == top_k
        chosen = [row[i] for i in ids]
        assert sorted(chosen, reverse=True) == sorted(row, reverse=True)[:top_k]
        share = sum(chosen) if renormalize else 1.0
        assert routing.topk_weights[token].tolist() == pytest.approx([p / share for p in chosen], rel=1e-5)


class Experts:
    """Random experts, a routing to the first `used` of them, and the expected output."""

    def __init__(self, num_tokens: int, num_experts: int, top_k: int, used: int, dtype: torch.dtype):
        hidden, width = 32, 16
        self.hidden_states = torch.randn(num_tokens, hidden).to(dtype)
        self.gate_up = torch.randn(num_experts, 2 * width, hidden).to(dtype) / hidden**0.5
        self.down = torch.randn(num_experts, hidden, width).to(dtype) / width**0.5
        scores = torch.rand(num_tokens, num_experts)
        scores[:, used:] = -1
        self.topk_ids = scores.topk(top_k).indices[:, torch.randperm(top_k)]
        self.topk_weights = torch.rand(num_tokens, top_k)

    def run(self, ops: ReferenceOps, has_elsewhere: bool = False) -> torch.Tensor:
        routing = Routing(self.topk_weights, self.topk_ids, has_elsewhere)
        return ops.experts(self.hidden_states, routing, DenseWeight(self.gate_up), DenseWeight(self.down))

    def expected(self) -> torch.Tensor:
        output = torch.zeros_like(self.hidden_states, dtype=torch.float64)
        for token, row in enumerate(self.hidden_states.double()):
            for weight, expert in zip(self.topk_weights[token].double(), self.topk_ids[token].tolist(), strict=True):
                if expert == len(self.gate_up):  # expert on another rank
                    continue
                gate, up = (self.gate_up[expert].double() @ row).chunk(2)
                output[token] += weight * (self.down[expert].double() @ (gate / (1 + (-gate).exp()) * up))
        return output


@DTYPES
@pytest.mark.parametrize("grouped_mm", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "used"),
    [(1, 8, 1, 8), (1, 8, 3, 8), (13, 8, 3, 8), (13, 8, 8, 8), (13, 8, 1, 1), (20, 8, 2, 3), (3, 64, 2, 64)],
)
def test_experts(num_tokens, num_experts, top_k, used, grouped_mm, dtype):
    case = Experts(num_tokens, num_experts, top_k, used, dtype)
    found = case.run(ReferenceOps(grouped_mm))
    assert found.dtype == dtype
    assert_near(found, case.expected(), dtype)


@DTYPES
@pytest.mark.parametrize("max_gathered_rows", [0, 1024])
def test_grouped_products_of_any_number_of_rows(max_gathered_rows, dtype, monkeypatch):
    monkeypatch.setattr("ops.reference.MAX_GATHERED_ROWS", max_gathered_rows)
    monkeypatch.setattr("ops.reference.GATHER_CHUNK", 4)
    case = Experts(11, 6, 3, 5, dtype)
    assert_near(case.run(ReferenceOps(grouped_mm=True)), case.expected(), dtype)


@DTYPES
@pytest.mark.parametrize("grouped_mm", [False, True])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_experts_elsewhere_add_nothing(share, grouped_mm, dtype):
    case = Experts(12, 6, 3, 6, dtype)
    case.topk_ids[torch.rand(case.topk_ids.shape) < share] = 6
    case.hidden_states[(case.topk_ids == 6).all(dim=1)] = torch.nan  # unused here
    found, expected = case.run(ReferenceOps(grouped_mm), has_elsewhere=True), case.expected()
    assert_near(found, expected, dtype)


@pytest.mark.parametrize("grouped_mm", [False, True])
def test_experts_of_a_rank_in_the_middle(grouped_mm):
    case = Experts(12, 6, 3, 6, torch.float32)
    case.topk_ids[torch.rand(case.topk_ids.shape) < 0.5] = 6
    expected = case.expected()
    others = torch.where(torch.rand(case.topk_ids.shape) < 0.5, 3, 11)
    ids = torch.where(case.topk_ids == 6, others, case.topk_ids + 4)  # experts 4 to 9 are local
    routing = Routing(case.topk_weights, ids).of_rank(4, 6)
    weights = DenseWeight(case.gate_up), DenseWeight(case.down)
    assert_near(ReferenceOps(grouped_mm).experts(case.hidden_states, routing, *weights), expected, torch.float32)


@DTYPES
def test_experts_leave_their_inputs_alone(dtype):
    case = Experts(5, 6, 2, 6, dtype)
    before = [value.clone() for value in vars(case).values()]
    for grouped_mm in (False, True):
        case.run(ReferenceOps(grouped_mm))
    assert all(torch.equal(old, new) for old, new in zip(before, vars(case).values(), strict=True))


@DTYPES
@pytest.mark.parametrize("grouped_mm", [False, True])
@pytest.mark.parametrize("counts", [[3, 0, 1, 5], [0, 0, 0, 0], [0, 0, 9, 0]])
@pytest.mark.parametrize("spare", [0, 2])
def test_grouped_rows(counts, spare, grouped_mm, dtype):
    """Each row goes through its expert; rows without an expert are undefined."""
    case = Experts(sum(counts) + spare, 4, 1, 4, dtype)
    case.topk_ids = torch.arange(4).repeat_interleave(torch.tensor(counts))[:, None]
    case.topk_weights = torch.ones(sum(counts), 1)
    case.hidden_states[sum(counts) :] = torch.nan
    weights = DenseWeight(case.gate_up), DenseWeight(case.down)
    found = ReferenceOps(grouped_mm).experts(case.hidden_states, GroupedRows(torch.tensor(counts)), *weights)
    assert found.shape == case.hidden_states.shape and found.dtype == dtype
    case.hidden_states = case.hidden_states[: sum(counts)]
    if sum(counts):
        assert_near(found[: sum(counts)], case.expected(), dtype)


@pytest.mark.parametrize("num_tokens", [0, 1, 13])
def test_rows_sorted_by_expert_come_back(num_tokens):
    hidden_states, weights = torch.randn(num_tokens, 8), torch.rand(num_tokens, 3)
    ids = torch.rand(num_tokens, 6).topk(3).indices
    rows, row_index, counts = OPS.sort_by_expert(hidden_states, ids, 6)
    assert counts.tolist() == [(ids == expert).sum() for expert in range(6)] and counts.dtype == torch.int64
    by_expert = [hidden_states[(ids == expert).any(dim=1)] for expert in range(6)]  # in the order of the tokens
    assert torch.equal(rows, torch.cat(by_expert))
    scaled = rows * torch.arange(6.0).repeat_interleave(counts)[:, None]
    expected = hidden_states * (weights * ids).sum(dim=1, keepdim=True)
    torch.testing.assert_close(OPS.weighted_sum(scaled, row_index, weights), expected)


def test_regroup():
    """Rows of three ranks; one rank sends none, one expert receives none."""
    counts = torch.tensor([[2, 0, 1], [0, 0, 0], [1, 0, 3]])
    names = [f"{rank}{expert}" for rank in range(3) for expert in range(3) for _ in range(counts[rank, expert])]
    rows = torch.randn(len(names), 4)
    found, order, per_expert = OPS.regroup(rows, counts)
    assert [names[row] for row in order] == sorted(names, key=lambda name: name[::-1])
    assert torch.equal(found, rows[order]) and per_expert.tolist() == [3, 0, 4]
    none, order, per_expert = OPS.regroup(rows[:0], torch.zeros(2, 3, dtype=torch.int64))
    assert none.shape == (0, 4) and order.shape == (0,) and per_expert.tolist() == [0, 0, 0]
