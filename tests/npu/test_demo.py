# SPDX-License-Identifier: Apache-2.0
"""Token equality of the NPU backend on emulated operations with the reference, on one rank and in parallel layouts."""

from pathlib import Path

import pytest
import torch

from tests.checkpoints import make_model
from tests.npu.bindings import BEST, UNFUSED
from tests.npu.emulated import NEW_TOKENS, exchange_where_one_rank_fails, run_emulated, run_model
from tests.npu.wheels import VERSIONS, unzipped
from tests.parallel.ranks import run_ranks

LAYERS, PREFILLS = 5, 6  # of the demo; prefills of `run_model`
DECODES = 2 * (NEW_TOKENS - 1) + 1  # of the repeated prompt all but one token is cached
CHUNKS = {"max_step_tokens": 96, "chunk_tokens": 48}  # the longest prompt is computed beside others' decode tokens
GATHER, ALL_TO_ALL, FUSED = "GatherExchange", "AllToAllExchange", "FusedExchange"
# world size, settings, whether to force all-to-all in prefill, expected exchanges of prefill and decode, call counts
LAYOUTS = {
    "one": (1, {}, False, [GATHER, GATHER], {}),
    "chunks": (1, CHUNKS, False, [GATHER, GATHER], {}),
    "tp": (
        2,
        {"attn_tp_size": 2, "moe_tp_size": 2, "embed_tp_size": 2, "lmhead_tp_size": 2},
        False,
        [GATHER, GATHER],
        {},
    ),
    "ep": (2, {"attn_tp_size": 2, "moe_tp_size": 1}, False, [GATHER, GATHER], {}),
    "dp_ep": (
        2,
        {"attn_tp_size": 1, "moe_tp_size": 1},
        True,
        [ALL_TO_ALL, FUSED],
        {  # and one probe call each
            "npu_moe_re_routing": LAYERS * PREFILLS + 1,
            "npu_moe_distribute_dispatch_v2": LAYERS * DECODES + 1,
            "npu_moe_distribute_combine_v2": LAYERS * DECODES + 1,
        },
    ),
}
CASES = [*((VERSIONS[0], layout) for layout in LAYOUTS), *((VERSIONS[1], layout) for layout in ("chunks", "dp_ep"))]
COUNTED = {name for *_, counts in LAYOUTS.values() for name in counts}
WIDE = {  # A3 dispatch requires a hidden size of at least 1024
    "hidden_size": 1024,
    "head_dim": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
}


def needed_wheel(version: str) -> Path:
    path = unzipped(version)
    if path is None:
        pytest.skip(f"torch_npu {version} is neither in the cache folder nor to be had from a package index")
    return path


@pytest.fixture(scope="module")
def reference():
    return {dtype: run_model(dtype=dtype) for dtype in ("float32", "bfloat16", "float16")}


@pytest.mark.parametrize(("version", "layout"), CASES)
def test_tokens_equal_the_reference(version, layout, reference, tmp_path):
    path = needed_wheel(version)
    world_size, sizes, all_to_all, exchanges, counts = LAYOUTS[layout]
    settings = {"dtype": "float16", "world_size": world_size, **sizes}
    exact, rounded = reference["float32"], reference["float16"]
    assert exact["margin"] > 0.05, "rounding may flip a near-tie"
    rows = exact["decided"]  # likewise for experts: summation order may flip a near-tie
    assert rows.float().mean() > 0.7
    for found in run_ranks(world_size, run_emulated, tmp_path, str(path), "A2", settings, all_to_all):
        # of a token in the middle: a near-tie that flips changes those after it too
        error, rounding = ((logits["logits"] - exact["logits"])[rows].norm(dim=1) for logits in (found, rounded))
        assert error.median() <= 1.5 * rounding.median()
        assert found["tokens"] == exact["tokens"] and found["alone"] == exact["alone"]
        assert found["bindings"] == (BEST if version == VERSIONS[0] else UNFUSED)
        assert found["exchanges"] == exchanges
        assert found["dispatch_shares_with"] == []
        assert found["buffer"] == ("200" if exchanges[1] == FUSED else None)
        called = found["called"]
        # more than the probe calls: at least each rank's prefill runs on this backend
        assert called["npu_swiglu"] > LAYERS and called["npu_grouped_matmul"] == 2 * called["npu_swiglu"]
        trials = {"npu_moe_re_routing": 1}
        assert {name: called.get(name, 0) for name in COUNTED} == dict.fromkeys(COUNTED, 0) | trials | counts


def test_attn_tp_groups_shard_their_tokens(reference, tmp_path):
    """Two attn_tp groups of two ranks: a rank may have no token of a step to dispatch, a step none to sample."""
    path = needed_wheel(VERSIONS[0])
    settings = {"dtype": "float16", "world_size": 4, "attn_tp_size": 2, "moe_tp_size": 1, **CHUNKS}
    for found in run_ranks(4, run_emulated, tmp_path, str(path), "A2", settings, True):
        assert found["exchanges"] == [ALL_TO_ALL, FUSED]
        exact = reference["float32"]
        assert found["tokens"] == exact["tokens"] and found["alone"] == exact["alone"]


def test_all_ranks_fall_back_to_gather_if_one_cannot_dispatch(tmp_path):
    path = needed_wheel(VERSIONS[0])
    assert run_ranks(2, exchange_where_one_rank_fails, tmp_path, str(path)) == [GATHER] * 2


def make_decisive_checkpoint(folder: Path) -> None:
    """Saves a random model without near-ties between experts or tokens, which rounding may flip.

    A token's embedding determines its two experts, and makes the token id one higher the next token.
    """
    model = make_model(**WIDE)
    experts, vocabulary = WIDE["num_experts"], model.config.vocab_size
    with torch.no_grad():
        table = torch.randn(vocabulary, WIDE["hidden_size"])
        model.model.embed_tokens.weight.copy_(table)
        model.lm_head.weight.copy_(table.roll(1, 0) / WIDE["hidden_size"] ** 0.5)
        numbers = torch.arange(vocabulary)
        for layer in model.model.layers:
            for expert in range(experts):
                own = (numbers % experts == expert) | ((numbers + 1) % experts == expert)
                layer.mlp.gate.weight[expert] = table[own].sum(0) / WIDE["hidden_size"] ** 0.5
    model.save_pretrained(folder)


def test_dispatch_and_combine_of_a3(tmp_path):
    path = needed_wheel(VERSIONS[0])
    make_decisive_checkpoint(tmp_path)
    prompts = [torch.randint(0, 211, (length,)).tolist() for length in (3, 17, 130)]  # two groups: two and one
    exact, rounded = (run_model(tmp_path, prompts, dtype=dtype) for dtype in ("float32", "float16"))
    assert exact["margin"] > 1
    settings = {"dtype": "float16", "world_size": 2, "attn_tp_size": 1, "moe_tp_size": 1}
    for found in run_ranks(2, run_emulated, tmp_path, str(path), "A3", settings, False, tmp_path, prompts):
        assert found["exchanges"] == [ALL_TO_ALL, FUSED] and found["bindings"] == BEST
        # two layers and the probe call; of the repeated prompt two tokens are left, which is no decode step
        assert found["called"]["npu_moe_distribute_combine_v2"] == 2 * (DECODES - 1) + 1
        assert found["tokens"] == exact["tokens"] and found["alone"] == exact["alone"]
        error = (found["logits"] - exact["logits"]).norm()
        assert error <= 1.5 * (rounded["logits"] - exact["logits"]).norm()


def test_bfloat16(reference, tmp_path):
    path = needed_wheel(VERSIONS[0])
    [found] = run_ranks(1, run_emulated, tmp_path, str(path), "A2", {"dtype": "bfloat16"})
    exact, rounded = reference["float32"]["logits"], reference["bfloat16"]["logits"]
    # the residual is in bfloat16, as the vendor's add_rms_norm requires; the reference's is in float32
    assert (found["logits"] - exact).norm() <= 3 * (rounded - exact).norm()
    assert torch.isfinite(found["logits"]).all()
