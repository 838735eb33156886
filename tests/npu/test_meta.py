# SPDX-License-Identifier: Apache-2.0
"""Every call of the NPU backend at the real shapes, under the schemas and meta functions of real torch_npu wheels.

The meta functions accept calls that the vendor forbids, so `CONTRACTS` also checks each recorded call against the
operations' documentation, including defaults that silently compute something else.
"""

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from models.layers.padding import share_of
from tests.npu.bindings import BEST
from tests.npu.meta_run import UNFUSED, run_all
from tests.npu.wheels import VERSIONS, wheel
from tests.parallel.ranks import run_ranks

MODELS = {"30b": 2048, "235b": 4096}  # hidden sizes
TP, EP = (1, 2, 4, 8, 16), (8, 16, 128)
LAYOUTS = [*(f"{size}tp" for size in TP), *(f"{size}ep" for size in EP)]
DECODE_TOKENS = {"decode1": 1, "decode8": 8, "idle": 3}  # of the attention DP group with the most
FUSED = [f"{size}ep{product}" for size in EP for product in ("", "_a2")]  # layouts with fused dispatch in decode
MORE_LAYOUTS = [*(f"{size}ep_a2" for size in EP), "8ep_gather", "4tp_4dp_16ep"]
QUERY_LENS = {"prefill": [5, 300], "extend": [1, 200, 40, 1, 3], "decode1": [1], "decode8": [1] * 8}
SEQ_LENS = {"prefill": [5, 300], "extend": [301, 456, 40, 128, 133], "decode1": [200], "decode8": list(range(2, 10))}
RUNS = [*SEQ_LENS, "received"]
CASES = [f"{model}-{layout}-{run}" for model in MODELS for layout in LAYOUTS + MORE_LAYOUTS for run in RUNS]
CASES += [f"{model}-{layout}-idle" for model in MODELS for layout in [*FUSED, "8ep_gather"]]
CASES += [f"unfused-{layout}-{run}" for layout in UNFUSED for run in RUNS]
CASES += [f"fallback{level}{gather}-{run}" for level in (1, 2) for gather in ("", "-gather") for run in RUNS]
READS_BACK = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "bincount", "equal")


def run_meta(version: str, function: Callable[..., Any], folder: Path, *arguments: Any) -> Any:
    """Result of a function of meta_run.py under a wheel, in a process of its own."""
    file = wheel(version)
    if file is None:
        pytest.skip(f"torch_npu {version}: no wheel in the cache and no package index")
    return run_ranks(1, function, folder, file, *arguments)[0]


@pytest.fixture(params=VERSIONS, scope="module")
def results(request, tmp_path_factory) -> dict:
    return run_meta(request.param, run_all, tmp_path_factory.mktemp("meta"))


def calls_of(results: dict, case: str) -> list[dict]:
    assert isinstance(results[case], list), results[case]
    return results[case]


def is_tensor(value) -> bool:
    return isinstance(value, dict)


def tensors(value) -> list[dict]:
    if isinstance(value, list):
        return [tensor for item in value for tensor in tensors(item)]
    return [value] if is_tensor(value) else []


def check_rms_norm(given, run):
    assert given["gamma"]["shape"] == given["input"]["shape"][-1:]
    assert given["gamma"]["dtype"] == given["input"]["dtype"]
    assert given["epsilon"] == 1e-5


def check_add_rms_norm(given, run):
    assert given["x1"] == given["x2"]
    assert given["gamma"]["shape"] == given["x1"]["shape"][-1:] and given["gamma"]["dtype"] == given["x1"]["dtype"]
    assert given["epsilon"] == 1e-5


def check_rotary(given, run):
    query, key, cos, sin = (given[name] for name in ("query", "key", "cos", "sin"))
    assert given["layout"] in ("TND", "BSND") and given["rotary_mode"] == "half"
    tokens = query["shape"][:-2]
    assert len(query["shape"]) == (3 if given["layout"] == "TND" else 4)
    assert key["shape"][:-2] == tokens and cos["shape"] == sin["shape"] == [*tokens, 1, 128]
    assert query["shape"][-1] == key["shape"][-1] == 128
    assert all(part["dtype"] == query["dtype"] and part["contiguous"] for part in (query, key, cos, sin))


def check_rotary_mul(given, run):
    assert len(given["input"]["shape"]) == 4
    assert given["r1"]["shape"] == given["r2"]["shape"] == [1, given["input"]["shape"][1], 1, 128]
    assert given["r1"]["dtype"] == given["r2"]["dtype"] == given["input"]["dtype"]


def check_scatter_pa(given, run):
    key, value, key_cache, value_cache = (given[name] for name in ("key", "value", "key_cache", "value_cache"))
    slots = given["slot_mapping"]
    assert given["cache_mode"] == "Norm"  # the default is for caches of the tiled format
    assert key == value and key_cache == value_cache and key["dtype"] == key_cache["dtype"]
    assert len(key_cache["shape"]) == 4 and key_cache["shape"][1] == 128 and key["shape"][1:] == key_cache["shape"][2:]
    assert slots["shape"] == key["shape"][:1] and slots["dtype"] in ("int32", "int64")
    assert key["contiguous"] and key_cache["contiguous"] and slots["contiguous"]


def check_qkv(given, run):
    qkv, index, caches = given["qkv"], given["index"], (given["k_cache"], given["v_cache"])
    batch, length, heads, width = given["qkv_size"]
    num_heads, num_kv_heads, num_values = given["head_nums"]
    tokens = qkv["shape"][0]
    assert (batch, length, width) == (1, tokens, 128) and heads == num_heads + 2 * num_kv_heads
    assert num_kv_heads == num_values and num_heads % num_kv_heads == 0 and qkv["shape"] == [tokens, heads * 128]
    assert index["shape"] == [tokens] and index["dtype"] == "int64"
    assert given["q_out"]["shape"] == [tokens, num_heads * 128]
    assert all(cache["shape"] == [33, num_kv_heads * 8, 128, 16] for cache in caches)
    assert all(given[name]["shape"] == [tokens, 128] for name in ("cos", "sin"))
    assert all(given[name]["shape"] == [128] for name in ("q_gamma", "k_gamma"))
    floats = (qkv, given["q_out"], *caches, *(given[name] for name in ("q_gamma", "k_gamma", "cos", "sin")))
    assert all(part["dtype"] == qkv["dtype"] and part["contiguous"] for part in floats) and index["contiguous"]
    assert given["epsilon"] == 1e-5 and given["cache_mode"] == "PA_NZ" and given["is_output_qkv"] is False


def check_scatter_nd(given, run):
    cache, slots, updates = given["input"], given["indices"], given["updates"]
    assert slots["shape"] == [updates["shape"][0], 1] and slots["dtype"] in ("int32", "int64")
    assert cache["shape"][1:] == updates["shape"][1:] and cache["dtype"] == updates["dtype"] and cache["contiguous"]


def check_attention(given, run):
    """Checks a call by the argument names of version 2."""
    query, key, value, mask = given["query"], given["key"], given["value"], given["atten_mask"]
    query_ends, kv_lengths = given["actual_seq_qlen"], given["actual_seq_kvlen"]
    (tokens, heads, head_dim), kv_heads = query["shape"], given["num_key_value_heads"]
    assert given["softmax_scale"] == pytest.approx(128**-0.5)  # the default is 1
    assert given["input_layout"] == "TND" and head_dim == 128
    assert given["num_query_heads"] == heads and kv_heads >= 1 and heads % kv_heads == 0 and heads // kv_heads <= 64
    assert given["sparse_mode"] == 3 and mask["shape"] == [2048, 2048] and mask["dtype"] in ("int8", "uint8", "bool")
    assert all(part["contiguous"] and part["dtype"] == query["dtype"] for part in (query, key, value))
    assert all(type(length) is int for length in query_ends + kv_lengths)  # a device tensor would cost a host sync
    assert key == value and query["dtype"] in ("bfloat16", "float16")
    assert query_ends == list(accumulate(QUERY_LENS[run])) and query_ends[-1] == tokens
    if given["block_table"] is None:
        assert run == "prefill"
        assert kv_lengths == query_ends
        assert key["shape"] == [tokens, kv_heads, 128]
    else:
        assert kv_lengths == SEQ_LENS[run]  # per sequence, not cumulative, with a block table
        table = given["block_table"]
        assert table["dtype"] == "int32" and table["contiguous"]
        assert table["shape"] == [len(kv_lengths), -(-max(kv_lengths) // 128)]
        assert key["shape"][1:] in ([128, kv_heads * 128], [kv_heads, 8, 128, 16]) and given["block_size"] == 128


def check_attention_v1(given, run):
    names = {
        "num_heads": "num_query_heads",
        "scale": "softmax_scale",
        "actual_seq_lengths": "actual_seq_qlen",
        "actual_seq_lengths_kv": "actual_seq_kvlen",
    }
    check_attention({names.get(name, name): value for name, value in given.items()}, run)


def check_gating_v2(given, run):
    assert given["x"]["shape"][1] == 128 and given["k"] == 8
    assert given["renorm"] == 1  # else the weights of the chosen experts do not sum to 1


def check_gating(given, run):
    assert given["x"]["shape"][1] == 128 and given["k"] == 8 and given["finished"] is None


def check_init_routing(given, run):
    rows, ids = given["x"], given["expert_idx"]
    assert ids["dtype"] == "int32" and ids["shape"][0] == rows["shape"][0]
    assert given["active_num"] == ids["shape"][0] * ids["shape"][1]
    # explicit: the default is frozen at the first expert_num of the process
    bounds = given["active_expert_range"]
    assert bounds == [0, given["expert_num"]] or (len(bounds) == 2 and bounds[1] <= 128 < given["expert_num"] <= 10240)
    assert given["expert_tokens_num_type"] == 1 and given["expert_tokens_num_flag"] is True
    assert given["quant_mode"] == -1 and given["drop_pad_mode"] == 0
    assert given["row_idx_type"] == 0  # as the combine operations require


def check_grouped_matmul(given, run):
    [rows], [weight], counts = given["x"], given["weight"], given["group_list"]
    experts, inner, _ = weight["shape"]
    assert rows["shape"][1] == inner and rows["dtype"] == weight["dtype"] and rows["contiguous"]
    assert counts["shape"] == [experts] and counts["dtype"] == "int64" and counts["contiguous"]
    assert given["group_list_type"] == (0 if experts == 1 else 1)  # default: cumulative; a single count is rejected
    assert given["group_type"] == 0 and given["split_item"] in (2, 3)
    assert max(weight["shape"][1:]) < 65536 and experts <= 1024


def check_swiglu(given, run):
    assert given["input"]["contiguous"] and given["input"]["shape"][-1] % 2 == 0 and given["dim"] == -1


def check_finalize(given, run):
    rows, weights, index = (given[name] for name in ("expanded_permuted_rows", "scales", "expanded_src_to_dst_row"))
    tokens, top_k = weights["shape"]
    if given["drop_pad_mode"] == 3:  # takes the index -1 of rows of other ranks
        assert rows["shape"][:-1] == [top_k, tokens] and run != "received"
    else:
        assert given["drop_pad_mode"] == 2  # the default reads the index as k * T + t
        assert rows["shape"][:-1] == [tokens * top_k]
    assert given["skip1"] is given["skip2"] is given["bias"] is given["export_for_source_row"] is None
    assert weights["dtype"] == rows["dtype"] and index["dtype"] == "int32"
    assert index["shape"] == [tokens * top_k]


def check_unpermute(given, run):
    rows, weights, index = (given[name] for name in ("permuted_tokens", "probs", "sorted_indices"))
    assert index["dtype"] == "int32" and weights["dtype"] == rows["dtype"]
    assert index["shape"] == rows["shape"][:1] == [weights["shape"][0] * weights["shape"][1]]


def check_re_routing(given, run):
    rows, counts = given["tokens"], given["expert_token_num_per_rank"]
    assert len(counts["shape"]) == 2 and counts["dtype"] == "int64" and counts["contiguous"]  # valid as a group list
    assert len(rows["shape"]) == 2 and rows["shape"][1] < 16384 and rows["dtype"] in ("bfloat16", "float16")
    assert given["expert_token_num_type"] == 1 and given["idx_type"] == 0 and given["per_token_scales"] is None


def check_exchange(given, run, hidden, tokens):
    """Checks the arguments that dispatch and combine share; the algorithm determines the product."""
    ranks, experts, ids, weights = (
        given[name] for name in ("ep_world_size", "moe_expert_num", "expert_ids", "weights")
    )
    assert 0 <= given["ep_rank_id"] < ranks and experts % ranks == 0 and given["group_ep"] == "communicator of dispatch"
    assert ids["dtype"] == "int32" and ids["shape"][0] == tokens >= 1 and ids["shape"][1] == 8
    # those of the rank with the most, as all ranks send equally many rows; 4 ranks of attn_tp share their tokens
    assert tokens in [share_of(DECODE_TOKENS[run], attn_tp) for attn_tp in (1, 4)]
    assert given["global_bs"] == 0  # equal in all layers and steps
    mask = given["x_active_mask"]
    assert mask is not None and mask["shape"] == [tokens] and mask["dtype"] == "bool"
    assert given["shared_expert_rank_num"] == 0 and given["group_tp"] == ""
    assert given["tp_world_size"] == (0 if given["shared_expert_num"] else 1)  # fullmesh_v2 takes only 1, A2 only 0
    if given["shared_expert_num"]:  # A2
        assert given["comm_alg"] == "fullmesh" and ranks in (*range(2, 9), 16, 32, 64, 128, 256)
        assert weights is not None
        assert weights["shape"] == ids["shape"] and weights["dtype"] == "float32" and given["shared_expert_num"] == 1
        assert hidden % 32 == 0 and hidden <= 7168
    else:
        assert 1024 <= hidden <= 8192 and 2 <= ranks <= 768 and given["shared_expert_num"] == 0


def check_dispatch(given, run):
    tokens, hidden = given["x"]["shape"]
    assert given["x"]["dtype"] in ("bfloat16", "float16") and given["x"]["contiguous"]
    assert given["quant_mode"] == 0 and given["scales"] is None
    assert given["expert_token_nums_type"] == 1  # counts
    assert given["comm_alg"] in ("fullmesh", "hierarchy", "fullmesh_v1", "fullmesh_v2")
    if given["comm_alg"].startswith("fullmesh_v"):
        assert given["expert_scales"] is None  # A3 accepts them with hierarchy only
    check_exchange(given | {"weights": given["expert_scales"]}, run, hidden, tokens)


def check_combine(given, run):
    rows, ids, scales = given["expand_x"], given["expert_ids"], given["expand_scales"]
    per_rank = given["moe_expert_num"] // given["ep_world_size"]
    capacity = ids["shape"][0] * given["ep_world_size"] * min(per_rank, ids["shape"][1])
    assert rows["shape"][0] == capacity
    assert rows["dtype"] in ("bfloat16", "float16") and rows["contiguous"]
    assert given["expert_scales"]["dtype"] == "float32" and given["expert_scales"]["shape"] == ids["shape"]
    assert given["ep_send_counts"]["dtype"] == given["assist_info_for_combine"]["dtype"] == "int32"
    assert given["comm_alg"] in ("", "fullmesh", "hierarchy")
    if given["comm_alg"]:
        assert scales is not None  # required on A2
        assert scales["shape"] == rows["shape"][:1] and scales["dtype"] == "float32"
    else:
        assert scales is None
    check_exchange(given | {"weights": given["expert_scales"]}, run, rows["shape"][1], ids["shape"][0])


CONTRACTS = {
    "npu_qkv_rms_norm_rope_cache": check_qkv,
    "npu_moe_re_routing": check_re_routing,
    "npu_moe_distribute_dispatch_v2": check_dispatch,
    "npu_moe_distribute_combine_v2": check_combine,
    "npu_rms_norm": check_rms_norm,
    "npu_add_rms_norm": check_add_rms_norm,
    "npu_apply_rotary_pos_emb": check_rotary,
    "npu_rotary_mul": check_rotary_mul,
    "npu_scatter_pa_kv_cache": check_scatter_pa,
    "npu_scatter_nd_update_": check_scatter_nd,
    "npu_fused_infer_attention_score_v2": check_attention,
    "npu_fused_infer_attention_score": check_attention_v1,
    "npu_moe_gating_top_k_softmax_v2": check_gating_v2,
    "npu_moe_gating_top_k_softmax": check_gating,
    "npu_moe_init_routing_v2": check_init_routing,
    "npu_grouped_matmul": check_grouped_matmul,
    "npu_swiglu": check_swiglu,
    "npu_moe_finalize_routing": check_finalize,
    "npu_moe_token_unpermute": check_unpermute,
}


def check_case(results: dict, case: str, contracts: dict[str, Callable] = CONTRACTS) -> None:
    run = case.rpartition("-")[2]
    calls = calls_of(results, case)
    vendor = [call for call in calls if "given" in call]
    assert vendor
    for call in vendor:
        given = call["given"]
        assert all(size > 0 for value in given.values() for tensor in tensors(value) for size in tensor["shape"])
        contracts[call["name"].removeprefix("npu::")](given, run)
    if run.startswith("decode"):
        assert not [call["name"] for call in calls if call["name"].partition("::")[2] in READS_BACK]


@pytest.mark.parametrize("case", CASES)
def test_calls(results, case):
    check_case(results, case)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grouped_matmul_weight_shapes(results, layout, model):
    """[E, K, N] of every grouped matmul: the shard of one rank."""
    size = int(layout[:-2])
    hidden, width = MODELS[model], {"30b": 768, "235b": 1536}[model]
    experts = 128
    if layout.endswith("tp"):
        width //= size
    else:
        experts //= size
    products = [call for call in calls_of(results, f"{model}-{layout}-decode8") if call["name"].endswith("d_matmul")]
    shapes = [call["given"]["weight"][0]["shape"] for call in products]
    assert shapes == [[experts, hidden, 2 * width], [experts, width, hidden]] * 2


PREPARED = ["qkv_rms_norm_rope_cache"]
PARTS = "rms_norm rms_norm apply_rotary_pos_emb scatter_pa_kv_cache".split()
SLICED = (
    "copy rms_norm copy rms_norm clone apply_rotary_pos_emb scatter_pa_kv_cache".split()
)  # of several tokens: strided
ROUTED = "add_rms_norm mm moe_gating_top_k_softmax_v2".split()
EXPERTS = "moe_init_routing_v2 grouped_matmul swiglu grouped_matmul moe_finalize_routing".split()
# top-k weights are cast to float32; sorting and summation are part of dispatch and combine
EXCHANGED = "_to_copy moe_distribute_dispatch_v2 grouped_matmul swiglu grouped_matmul moe_distribute_combine_v2".split()
# model, batch size -> launches from q, k, v to attention; 30B in parts too
PREPARATIONS = {(model, batch): PREPARED for model in MODELS for batch in (1, 8)}
PREPARATIONS |= {("unfused", 1): PARTS, ("unfused", 8): SLICED}


def layer_of(prepared: list[str], experts: list[str]) -> list[str]:
    return ["add_rms_norm", "mm", *prepared, "fused_infer_attention_score_v2", "mm", *ROUTED, *experts]


def launches_of(results: dict, case: str) -> list[str]:
    """Kernel launches, including copies and casts, without collectives."""
    return [
        call["name"].partition("::")[2].removeprefix("npu_") for call in calls_of(results, case) if call["launches"]
    ]


LAUNCHED = [(layout, *key) for layout in LAYOUTS + MORE_LAYOUTS for key in PREPARATIONS if key[0] in MODELS]
LAUNCHED += [(layout, "unfused", batch_size) for layout in UNFUSED for batch_size in (1, 8)]


@pytest.mark.parametrize(("layout", "model", "batch_size"), LAUNCHED)
def test_launches_of_a_decode_layer(results, layout, model, batch_size):
    exchanged = "ep" in layout and layout != "8ep_gather"
    expected = layer_of(PREPARATIONS[model, batch_size], EXCHANGED if exchanged else EXPERTS)
    assert launches_of(results, f"{model}-{layout}-layer-decode{batch_size}") == expected
    count = {"unfused": {1: 16, 8: 19}[batch_size]}.get(model, 13)
    assert len(expected) == count + exchanged


def attention_of(results: dict, case: str) -> list[dict]:
    return [call["given"] for call in calls_of(results, case) if "fused_infer" in call["name"]]


def test_keys_of_prefill(results):
    """A prompt's attention reads the cache where only that has the normed and rotated keys."""
    assert all(given["block_table"] is None for given in attention_of(results, "unfused-1tp-prefill"))
    for run, batch in (("prefill", 2), ("extend", 5), ("decode8", 8)):
        for given in attention_of(results, f"30b-1tp-{run}"):
            assert len(given["key"]["shape"]) == 5 and given["block_table"]["shape"][0] == batch


@pytest.mark.parametrize("layout", FUSED)
def test_dispatch_algorithm(results, layout):
    """A2 does not use the hierarchy algorithm, which takes no mask."""
    expected = "fullmesh" if "a2" in layout else "fullmesh_v2"
    for name, algorithm in (("dispatch", expected), ("combine", expected if "a2" in layout else "")):
        calls = calls_of(results, f"30b-{layout}-decode8")
        found = [call["given"] for call in calls if call["name"] == f"npu::npu_moe_distribute_{name}_v2"]
        assert [given["comm_alg"] for given in found] == [algorithm] * 2


@pytest.mark.parametrize("run", ["prefill", "extend"])
def test_steps_that_prefill_regroup(results, run):
    """Each of two layers sorts rows by expert, regroups those received, and sums the results per token."""
    names = [call["name"] for call in calls_of(results, f"30b-8ep-{run}")]
    moe = ["init_routing_v2", "re_routing", "finalize_routing"]
    assert [name for name in names if name.startswith("npu::npu_moe_") and "gating" not in name] == [
        f"npu::npu_moe_{name}" for name in moe * 2
    ]


def test_launches_of_a_step(results):
    """Outside its two layers: the block table is copied only where it is strided; its dtype is the kernel's."""
    outside = {}
    for run in ("extend", "decode1", "decode8"):
        outside[run] = len(launches_of(results, f"30b-1tp-{run}")) - 2 * 13
    assert outside["extend"] == outside["decode8"] + 1
    assert outside["decode1"] == outside["decode8"]


def test_bindings(results):
    """The preferred variants are selected, and the next best where one fails."""
    assert results["bindings"] == BEST
    second = {
        "rotary": "npu_apply_rotary_pos_emb BSND",
        "cache write": "npu_scatter_nd_update_",
        "attention": "npu_fused_infer_attention_score",
        "gating": "npu_moe_gating_top_k_softmax",
        "combine": "npu_moe_token_unpermute",
        "local experts": "one more expert",
        "regroup": "sort",
        "qkv": "npu_rms_norm",
    }
    assert results["bindings-fallback1"] == second
    assert results["fallbacks"] == []
    assert results["fallbacks-fallback1"] == [f"{what} ({name})" for what, name in second.items() if what != "qkv"]
    assert results["bindings-fallback2"] == second | {"rotary": "npu_rotary_mul"}


def test_weights_are_fractal_nz(results):
    """All matmul weights, except an lm_head whose vocabulary exceeds the format's limit."""
    matrices = {name: kind for name, kind in results["weights"].items() if kind.endswith("Weight")}
    assert [name for name, kind in matrices.items() if kind != "TransposedWeight"] == ["lm_head.weight"]
    assert len(matrices) == 2 * 4 + 1
