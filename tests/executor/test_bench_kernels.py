# SPDX-License-Identifier: Apache-2.0
"""`bench kernels`: valid calls of every operation, and correct counts of bytes moved and FLOPs."""

import json
import sys
import time

import pytest
import torch

from executor.bench.__main__ import main
from executor.bench.kernels import row, time_us
from executor.bench.op_cases import COLD_BYTES, LAYER, OpCase, OpCases
from executor.config import ParallelSettings, resolve_path
from executor.loading.before_loading import load_config
from models.quantization.scheme import Scheme
from ops import OPERATIONS, load_ops

TWO_BYTES = 2


def cases(sequences: int, new_tokens: int, cached_tokens: int, scheme: Scheme | None = None, **sizes: int) -> OpCases:
    config = load_config(resolve_path("models/qwen3_moe/demo"))
    cpu = torch.device("cpu")
    shape = (sequences, new_tokens, cached_tokens)
    return OpCases(load_ops("cpu"), config, ParallelSettings(**sizes), torch.bfloat16, cpu, *shape, scheme or Scheme())


def test_report(monkeypatch, tmp_path, capsys):
    output = tmp_path / "report.json"
    sizes = (
        "--batch-size",
        "2",
        "--cached-tokens",
        "130",
        "--prompt-tokens",
        "9",
        "--extend",
        "2x3@5",
        "--output",
        str(output),
    )
    monkeypatch.setattr(sys, "argv", ["bench", "kernels", "--yaml", "demo", "--set", "device=cpu", *sizes])
    assert main() == 0
    report = json.loads(output.read_text())
    rates = {"bytes": report["read_ceiling"]["gb_per_s"] * 1e3, "flops": report["matmul_ceiling"]["tflop_per_s"] * 1e6}
    for phase, tokens in (("decode", 2), ("prefill", 9)):
        rows = [result for result in report["results"] if (result["phase"], result["tokens"]) == (phase, tokens)]
        assert {result["operation"].split()[0] for result in rows} == set(OPERATIONS)
        assert ("norm_linear (lm_head)" in {result["operation"] for result in rows}) == (phase == "decode")
        for result in rows:
            floors = [result["moved_bytes"] / rates["bytes"], result["flops"] / rates["flops"]]
            assert result["floor_us"] == pytest.approx(max(floors), rel=1e-2, abs=1e-3)
            assert result["bound_by"] == ("bytes" if floors[0] >= floors[1] else "flops")
            assert result["cached"] == (result["bound_by"] == "bytes")  # the demo fits into the cache
            if result["cached"]:
                assert result["fraction"] is None
            else:
                assert result["fraction"] == pytest.approx(result["floor_us"] / result["us"], rel=1e-2, abs=1e-3)
    assert [row["operation"] for row in report["results"] if row["phase"] == "extend"] == [
        "attention (2 x 3 on 5 cached)"
    ]
    assert report["model_name"] == "qwen3_moe_demo"
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(report["results"])


def test_time_is_per_call():
    case = OpCase(name="sleep", calls=[lambda: time.sleep(2e-2)] * 4, moved_bytes=6000, flops=0)
    us = time_us(case, load_ops("cpu"), torch.device("cpu"), captured=True)
    assert 20000 <= us < 60000
    ceilings = {"read_ceiling": {"gb_per_s": 2.0}, "matmul_ceiling": {"tflop_per_s": 1.0}}
    measured = row(case, us, ceilings, "cpu")
    assert (measured["floor_us"], measured["bound_by"]) == (3.0, "bytes")


@pytest.mark.parametrize(
    ("moved_bytes", "distinct_bytes", "flops", "fraction"),
    [
        (COLD_BYTES["cpu"] // 4, None, 0, 0.5),
        (COLD_BYTES["cpu"] // 4 - 1, None, 0, None),
        (COLD_BYTES["cpu"], COLD_BYTES["cpu"] // 2, 0, None),  # all calls read the same rows
        (8, None, COLD_BYTES["cpu"] // 8, 0.5),  # compute-bound: no matter where the bytes are
    ],
)
def test_no_fraction_for_reads_from_cache(moved_bytes, distinct_bytes, flops, fraction):
    case = OpCase(name="x", calls=[int] * 4, moved_bytes=moved_bytes, flops=flops, distinct_bytes=distinct_bytes)
    ceilings = {"read_ceiling": {"gb_per_s": 1.0}, "matmul_ceiling": {"tflop_per_s": 0.0005}}
    us = COLD_BYTES["cpu"] // 4 / 1e3 * 2
    assert row(case, us, ceilings, "cpu")["fraction"] == (fraction and pytest.approx(fraction, rel=1e-3))


@pytest.mark.parametrize("tokens", [3, 5000])
def test_embedding_counts_each_row_once(tokens, monkeypatch):
    """The demo has 2,048 rows: 5,000 tokens read each once and write 5,000; calls read different rows."""
    built = cases(1, tokens, 0)
    taken = []
    monkeypatch.setattr(built.ops, "embedding", lambda token_ids, table: taken.append(token_ids))
    case = built.embedding()
    for call in case.calls:
        call()
    vocab, row_bytes = built.config.vocab_size, TWO_BYTES * built.hidden
    assert case.moved_bytes == (min(tokens, vocab) + tokens) * row_bytes
    assert case.distinct_bytes == torch.cat(taken).unique().numel() * row_bytes
    assert case.distinct_bytes == min(len(case.calls) * tokens, vocab) * row_bytes


@pytest.mark.parametrize(("sequences", "new_tokens", "cached_tokens"), [(3, 1, 299), (1, 150, 0), (3, 5, 200)])
def test_calls(sequences, new_tokens, cached_tokens):
    """Outputs have the right number of tokens and are finite; cache slots are valid and distinct."""
    built = cases(sequences, new_tokens, cached_tokens)
    tokens = sequences * new_tokens
    with torch.inference_mode():
        for case in built.all():
            for call in case.calls:
                output = call()
                first = output[0] if isinstance(output, tuple) else output
                assert first.shape[0] == tokens and first.isfinite().all(), case.name
    step = built.step()
    assert step.slot_mapping.unique().numel() == tokens
    assert step.block_table.shape[0] == sequences and step.seq_lens_list == [cached_tokens + new_tokens] * sequences
    assert step.is_decode == (new_tokens == 1) and step.starts_fresh == (cached_tokens == 0)


def test_bytes_and_flops_of_a_decode_step():
    """Hand-computed, in bfloat16 with float32 residual and half of the heads."""
    built = cases(3, 1, 299, attn_tp_size=2)
    config = built.config
    hidden, q, kv = config.hidden_size, built.q_size, built.kv_heads * config.head_dim
    assert (2 * q, 2 * kv) == (
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )
    qkv = built.norm_linear("qkv", f"{LAYER}.self_attn.q_proj", q + 2 * kv)
    weight, inputs, outputs = (q + 2 * kv) * hidden, 3 * hidden, 3 * (q + 2 * kv)
    assert qkv.moved_bytes == TWO_BYTES * (weight + inputs + outputs) + 2 * 4 * inputs
    assert qkv.flops == 2 * 3 * weight
    attention = built.attention()
    assert attention.moved_bytes == TWO_BYTES * (outputs + 3 * q + 3 * 300 * 2 * kv)
    assert attention.flops == 3 * 300 * 2 * 2 * q
    experts = built.experts()
    one_expert = 3 * config.moe_intermediate_size * hidden
    assert experts.flops == 2 * 3 * config.num_experts_per_tok * one_expert
    read = (experts.moved_bytes / TWO_BYTES - 2 * inputs) / one_expert
    assert config.num_experts_per_tok < read <= 3 * config.num_experts_per_tok


def test_bytes_of_4_bit_weights():
    """Half a byte per number, and per group of 64 a scale (bfloat16) and a zero point; lm_head stays as it is."""
    built = cases(1, 1, 9, Scheme(method="awq", group_size=64))
    config = built.config
    hidden, width = config.hidden_size, config.moe_intermediate_size
    assert hidden % 64 == 0 and width % 64 == 0
    o = built.linear()
    activations = TWO_BYTES * (built.q_size + hidden)
    assert o.moved_bytes == hidden * built.q_size // 2 + hidden * built.q_size // 64 * 3 + activations
    experts = built.experts()
    numbers = config.num_experts_per_tok * 3 * width * hidden
    assert experts.moved_bytes == pytest.approx(numbers / 2 + numbers / 64 * 3 + 2 * TWO_BYTES * hidden, abs=1)
    [lm_head] = [case for case in built.all() if "lm_head" in case.name]
    assert lm_head.moved_bytes > TWO_BYTES * config.vocab_size * hidden
    with torch.inference_mode():
        for case in (o, experts, lm_head):
            assert all(torch.isfinite(out[0] if isinstance(out := call(), tuple) else out).all() for call in case.calls)


def test_bytes_and_flops_of_a_prefill():
    """Token n attends to n + 1 tokens."""
    built = cases(1, 150, 0)
    assert built.attention().flops == sum(range(1, 151)) * 2 * 2 * built.q_size


def test_bytes_and_flops_of_new_tokens_on_cached_ones():
    """Every key and value is read once for all new tokens of its sequence."""
    built = cases(3, 5, 200)
    attention = built.attention()
    kv = built.kv_heads * built.config.head_dim
    assert attention.moved_bytes == TWO_BYTES * (15 * (2 * built.q_size + 2 * kv) + 3 * 205 * 2 * kv)
    assert attention.flops == 3 * sum(range(201, 206)) * 2 * 2 * built.q_size
