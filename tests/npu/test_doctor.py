# SPDX-License-Identifier: Apache-2.0
"""The doctor passes an emulated NPU, reports a broken operation, and refuses a machine without an NPU."""

import subprocess
import sys

import pytest

from executor.config import REPOSITORY
from tests.npu.doctor_runs import run_doctor
from tests.npu.wheels import VERSIONS, wheel
from tests.parallel.ranks import run_ranks

HEALTHY = ("", "")
WRONG = {
    "npu_add_rms_norm": "add_norm",
    "npu_swiglu": "silu_and_mul",
    "npu_moe_init_routing_v2": "sort_by_expert",
    "npu_grouped_matmul": "grouped_linear",
    "npu_scatter_pa_kv_cache": "attention",
    "npu_rotary_mul": "attention",  # this and the next are fallbacks
    "npu_moe_token_unpermute": "experts",
    "npu_moe_re_routing": "regroup",
}
BROKEN = [
    HEALTHY,
    *((name, "wrong") for name in WRONG),
    ("npu_scatter_pa_kv_cache", "raises"),
    ("npu_swiglu", "raises"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    path = wheel(VERSIONS[0])
    if path is None:
        pytest.skip(f"torch_npu {VERSIONS[0]} is neither in the cache folder nor to be had from a package index")
    folder = tmp_path_factory.mktemp("doctor")
    return dict(zip(BROKEN, run_ranks(1, run_doctor, folder, str(path), BROKEN, folder)[0], strict=True))


def verdicts(run) -> dict[tuple[str, str], set[str]]:
    found = {}
    for finding in run["report"]["findings"]:
        found.setdefault((finding["operation"], finding["variant"]), set()).add(finding["verdict"])
    return found


def test_healthy_npu_passes(runs):
    run = runs[HEALTHY]
    assert run["code"] == 0 and run["report"]["fine"], run["output"]
    found = verdicts(run)
    for undocumented in ("npu_scatter_pa_kv_cache, slot -1", "npu_fused_infer_attention_score_v2, shared blocks"):
        assert found.pop(("attention", undocumented)) == {"not usable"}
    assert set.union(*found.values()) == {"ok"}
    assert "all agree" in run["output"] and "npu_fused_infer_attention_score_v2" in run["output"]
    assert {"torch", "CANN", "product", "free memory", "environment"} <= run["report"]["machine"].keys()


def test_every_variant_is_compared(runs):
    named = {variant for _, variant in verdicts(runs[HEALTHY])}
    in_use = set(runs[HEALTHY]["report"]["bindings"].values())
    assert in_use < named
    assert {"npu_rotary_mul", "npu_scatter_nd_update_", "npu_fused_infer_attention_score, graph"} <= named


@pytest.mark.parametrize("name", WRONG)
def test_a_broken_operation_is_reported(runs, name):
    run = runs[name, "wrong"]
    assert run["code"] == 1
    assert "DIFFERS" in verdicts(run)[WRONG[name], name]
    assert f"DIFFERS: {WRONG[name]}, {name}, small, " in run["output"]


def test_a_failing_variant_with_a_fallback_passes(runs):
    run = runs["npu_scatter_pa_kv_cache", "raises"]
    assert run["code"] == 0, run["output"]
    assert verdicts(run)["attention", "npu_scatter_pa_kv_cache"] == {"not usable"}
    assert run["report"]["bindings"]["cache write"] == "npu_scatter_nd_update_"
    assert "npu_scatter_pa_kv_cache is not supported here" in run["output"]


def test_a_failing_operation_without_a_fallback_fails(runs):
    run = runs["npu_swiglu", "raises"]
    assert run["code"] == 1
    assert verdicts(run)["silu_and_mul", "npu_swiglu"] == {"FAILS"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["npu"], "error: device: npu is not available"),
        (["tpu"], "invalid choice: 'tpu'"),
        (["npu", "--json", "no/such/a.json"], "error: --json: no/such/a.json cannot be written: No such file"),
    ],
)
def test_invalid_arguments(arguments, named):
    command = [sys.executable, "-m", "executor.doctor", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and named in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1 or "usage:" in done.stderr
