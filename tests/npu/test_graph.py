# SPDX-License-Identifier: Apache-2.0
"""Graph mode of the NPU backend on emulated graphs: tokens equal the reference's, and wrong replays change them."""

import pytest

from tests.npu.graph_runs import run_graphs, run_layout
from tests.npu.wheels import VERSIONS, unzipped
from tests.parallel.ranks import run_ranks

V2, V1 = "npu_fused_infer_attention_score_v2", "npu_fused_infer_attention_score"
BATCH_SIZES = {VERSIONS[0]: {V2: [1, 2, 3, 4], V1: [4]}, VERSIONS[1]: {V2: [4], V1: [4]}}
CASES = [(version, *case) for version, of in BATCH_SIZES.items() for case in ((v, n) for v in of for n in of[v])]
BROKEN = ("no update", "another name", "lengths of padding", "no replay", "one slot for all padding")


def wheel_or_skip(version):
    path = unzipped(version)
    if path is None:
        pytest.skip(f"torch_npu {version} is neither in the cache folder nor to be had from a package index")
    return str(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results under each wheel, computed on first use."""
    found = {}

    def of(version):
        if version not in found:
            arguments = wheel_or_skip(version), BATCH_SIZES[version], version == VERSIONS[0]
            [found[version]] = run_ranks(1, run_graphs, tmp_path_factory.mktemp("graphs"), *arguments)
        return found[version]

    return of


@pytest.mark.parametrize(("version", "attention", "batch_size"), CASES)
def test_tokens_equal_the_reference(runs, version, attention, batch_size):
    assert runs(version)[attention, batch_size] == runs(version)["reference"]


@pytest.mark.parametrize("way", BROKEN)
def test_a_broken_replay_changes_the_tokens(runs, way):
    found = runs(VERSIONS[0])
    assert found["broken"]["nothing"] == found["reference"]
    assert found["broken"][way] != found["reference"]


def test_task_queue_2_is_refused_in_graph_mode(runs):
    assert runs(VERSIONS[0])["broken"]["task queue"].startswith("TASK_QUEUE_ENABLE: 2 is not possible with exe_mode: ")


@pytest.mark.parametrize(("product", "dispatches"), [("A3", False), ("A2", True)])  # hidden size too small for A3
def test_two_ranks(product, dispatches, tmp_path):
    """Attention data parallel, experts and vocabulary sharded: the collectives are captured in the graph."""
    sizes = {"attn_tp_size": 1, "moe_tp_size": 1, "embed_tp_size": 2, "lmhead_tp_size": 2}
    settings = {"world_size": 2, **sizes}
    for found in run_ranks(2, run_layout, tmp_path, wheel_or_skip(VERSIONS[0]), product, settings):
        assert found["graph"] == found["eager"]
        assert found["max_graphs"] == (6 if product == "A3" else None)
        assert found["graph"][3] == found["graph"][2]
        assert ("npu_moe_distribute_dispatch_v2" in found["called"]) == dispatches
