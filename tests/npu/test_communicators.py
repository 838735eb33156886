# SPDX-License-Identifier: Apache-2.0
"""Which HCCL communicators run in mode AIV, and what ranks tell each other before they have any."""

import subprocess
import sys

import pytest

from executor.config import REPOSITORY
from tests.npu.communicator_runs import Case, run_all, texts_of_ranks
from tests.npu.fake_runtime import Unavailable, fake_npu
from tests.npu.test_demo import needed_wheel
from tests.npu.wheels import VERSIONS
from tests.parallel.ranks import run_ranks

AIV = 3
TP, DP_EP = (4, 4, 4, 4, 4), (4, 2, 1, 4, 2)
MODE, TIMEOUT = "HCCL_OP_EXPANSION_MODE", "HCCL_EXEC_TIMEOUT"
CASES = {
    "A3": Case("A3", DP_EP),
    "A3, tensor parallel": Case("A3", TP),
    "A3, two super-nodes": Case("A3", DP_EP, "aabb"),
    "A3, long timeout": Case("A3", DP_EP, given={TIMEOUT: "3604"}),
    "A3, longest timeout": Case("A3", DP_EP, given={TIMEOUT: "1091"}),
    "A2": Case("A2", DP_EP),
    "A2, long timeout": Case("A2", DP_EP, given={TIMEOUT: "3604"}),
    "A2, AIV by the user, long timeout": Case("A2", DP_EP, given={TIMEOUT: "3604", MODE: "AIV"}),
    "A3, attn_tp between super-nodes": Case("A3", DP_EP, "abab"),
    "A3, AI_CPU by the user, long timeout": Case("A3", DP_EP, given={TIMEOUT: "3604", MODE: "AI_CPU"}),
    "A3, AIV by the user": Case("A3", DP_EP, given={MODE: "AIV"}),  # which HCCL reads
}
LEFT_AT_DEFAULT = list(CASES)[5:]
WARNED = ["A3, long timeout", "A2, AIV by the user, long timeout"]
ALGORITHMS = {
    "a" * 16 + "b" * 16: ["hierarchy"],
    "a" * 32: ["fullmesh_v2", "fullmesh_v1"],
    "aaaabbbb": [],
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = str(needed_wheel(VERSIONS[0]))
    arguments = path, list(CASES.values()), list(ALGORITHMS)
    [(modes, algorithms)] = run_ranks(1, run_all, tmp_path_factory.mktemp("modes"), *arguments)
    return dict(zip(CASES, modes, strict=True)), dict(zip(ALGORITHMS, algorithms, strict=True))


@pytest.mark.parametrize("case", ["A3", "A3, two super-nodes"])
def test_small_messages_of_a3_are_in_mode_aiv(found, case):
    """One communicator of a rank is in mode AIV; the all-to-all of prefill, and fused dispatch, are on others."""
    for rank, groups in enumerate(found[0][case].groups):
        own = (0, 1) if rank < 2 else (2, 3)
        assert groups["attn_tp"] == groups["lmhead_tp"] == (own, AIV)
        others = {name: mode for name, (_, mode) in groups.items() if name not in ("attn_tp", "lmhead_tp")}
        assert set(others.values()) == {None}
        assert {"world", "moe_ep", "attn_dp", "dispatch", "control"} <= set(others)


def test_pure_tensor_parallel_on_a3(found):
    for groups in found[0]["A3, tensor parallel"].groups:
        assert {name for name, (_, mode) in groups.items() if mode is None} == {"world", "dispatch"}
        assert {mode for name, (_, mode) in groups.items() if name not in ("world", "dispatch")} == {AIV}


@pytest.mark.parametrize("case", LEFT_AT_DEFAULT)
def test_default_mode(found, case):
    assert {mode for groups in found[0][case].groups for _, mode in groups.values()} == {None}


@pytest.mark.parametrize("case", CASES)
def test_timeout(found, case):
    warnings = found[0][case].warnings
    line = "HCCL_EXEC_TIMEOUT: 3604 s, but in mode AIV at most 1091 s apply; set HCCL_OP_EXPANSION_MODE=AI_CPU for a"
    assert bool(warnings) == (case in WARNED) and all(warning.startswith(line) for warning in warnings)


@pytest.mark.parametrize("super_nodes", ALGORITHMS)
def test_dispatch_between_super_nodes(found, super_nodes):
    assert found[1][super_nodes] == ALGORITHMS[super_nodes]


def test_ranks_exchange_texts_before_they_have_process_groups(tmp_path):
    for found in run_ranks(2, texts_of_ranks, tmp_path):
        assert found == [["of 0", "of 1"], ["", "Zürich"], ["2"]]


def test_torch_npu_takes_the_options(tmp_path):
    """The real torch_npu, on the fake runtime: the mode and the timeout reach the process group."""
    try:
        environment = fake_npu()
    except Unavailable as reason:
        pytest.skip(str(reason))
    program = """
import datetime, torch, torch_npu, torch.distributed as dist
from ops.npu.communicators import group_options
store = dist.HashStore()
torch.npu.set_device(0)
dist.init_process_group("hccl", store=store, rank=0, world_size=1)
for small in (True, False):
    group = dist.new_group([0], timeout=datetime.timedelta(hours=1), pg_options=group_options()((0,), small))
    options = group._get_backend(torch.device("npu")).options
    print(options.hccl_config, options._timeout)
"""
    environment = {name: value for name, value in environment.items() if not name.startswith("HCCL_")}
    environment |= {"RANK": "0", "WORLD_SIZE": "1", "PYTHONPATH": f"{REPOSITORY}:{environment['PYTHONPATH']}"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-2:] == ["{'hccl_op_expansion_mode': 3} 1:00:00", "{} 1:00:00"], done.stderr
