# SPDX-License-Identifier: Apache-2.0
"""The doctor passes an emulated NPU, reports a broken operation, and refuses a machine without an NPU."""

import functools
import subprocess
import sys

import pytest

from executor.config import REPOSITORY
from executor.doctor.findings import Finding
from executor.doctor.host import compare_ports, compare_versions, driver_version, installed_cann_version
from tests.npu.doctor_runs import run_doctor, run_doctor_on_ranks
from tests.npu.wheels import VERSIONS, unzipped
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
QUANTIZED = {  # operation -> families that cannot be used without it
    "npu_dynamic_quant": {"linear w8a8", "experts w8a8"},
    "npu_quant_matmul": {"linear w8a8", "linear w8a8-static"},
    "npu_add_rms_norm_dynamic_quant": {"norm_linear w8a8"},
    "npu_grouped_matmul_swiglu_quant_v2": {"silu_and_mul w8a8"},
    "npu_quantize": {"linear w8a8-static"},
    "npu_add_rms_norm_quant": {"norm_linear w8a8-static"},
    "npu_weight_quant_batchmatmul": {"linear w4a16"},
}
BROKEN = [
    HEALTHY,
    *((name, "wrong") for name in QUANTIZED),
    *((name, "wrong") for name in WRONG),
    ("npu_qkv_rms_norm_rope_cache", "wrong"),
    ("npu_scatter_pa_kv_cache", "raises"),
    ("npu_swiglu", "raises"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    path = unzipped(VERSIONS[0])
    if path is None:
        pytest.skip(f"torch_npu {VERSIONS[0]} is neither in the cache folder nor to be had from a package index")
    folder = tmp_path_factory.mktemp("doctor")
    return dict(
        zip(BROKEN, run_ranks(1, run_doctor, folder, str(path), BROKEN, folder, list(QUANTIZED))[0], strict=True)
    )


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
    assert found.pop(("attention", "Triton")) == {"not usable"}  # no backend for Ascend is installed here
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


def test_a_fused_operation_with_wrong_numbers_is_not_used(runs):
    run = runs["npu_qkv_rms_norm_rope_cache", "wrong"]
    assert run["code"] == 0, run["output"]
    assert verdicts(run)["attention", "npu_qkv_rms_norm_rope_cache"] == {"not usable"}
    assert run["report"]["bindings"]["qkv"] == "npu_rms_norm"
    assert "attention differs from the reference by" in run["output"]


@pytest.mark.parametrize("name", QUANTIZED)
def test_an_operation_on_quantised_weights_with_wrong_numbers_is_not_used(runs, name):
    """Weights are then dequantised when they are loaded, or the operation is composed of others."""
    run = runs[name, "wrong"]
    assert run["code"] == 0, run["output"]
    found = verdicts(run)
    unusable = {operation for (operation, _), verdict in found.items() if verdict == {"not usable"}}
    assert unusable - {"attention"} == QUANTIZED[name]
    assert "differs from the reference by" in run["output"]


def test_a_failing_operation_without_a_fallback_fails(runs):
    run = runs["npu_swiglu", "raises"]
    assert run["code"] == 1
    assert verdicts(run)["silu_and_mul", "npu_swiglu"] == {"FAILS"}


# Several ranks

BROKEN_ON_RANK_1 = [
    HEALTHY,
    *((name, "wrong") for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")),
    ("combine", "raises"),
    ("combine", "wrong"),
    ("combine", "wrong later"),  # not yet in the start-up call
    ("all_gather", "raises"),
]
DISPATCH = {
    product: [f"dispatch and combine ({name})" for name in names]
    for product, names in {"A2": ["fullmesh"], "A3": ["fullmesh_v2", "fullmesh_v1"]}.items()
}
COLLECTIVES = ["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    """Runs of both ranks on a product, by what is broken; several on A3 only."""
    path = unzipped(VERSIONS[0])
    if path is None:
        pytest.skip(f"torch_npu {VERSIONS[0]} is neither in the cache folder nor to be had from a package index")

    @functools.cache
    def runs_on(product):
        folder = tmp_path_factory.mktemp("doctor_on_ranks")
        broken = BROKEN_ON_RANK_1 if product == "A3" else [HEALTHY]
        found = run_ranks(2, run_doctor_on_ranks, folder, str(path), product, broken, folder)
        return [dict(zip(broken, runs, strict=True)) for runs in found]

    return runs_on


def communication(run) -> dict[str, list[dict]]:
    found = {}
    for finding in run["report"]["findings"]:
        if finding["operation"] == "communication":
            found.setdefault(finding["variant"], []).append(finding)
    return found


@pytest.mark.parametrize("product", DISPATCH)
def test_healthy_ranks_pass(on_ranks, product):
    run, other = (runs[HEALTHY] for runs in on_ranks(product))
    assert run["code"] == other["code"] == 0 and run["report"]["ranks"] == 2, run["output"]
    assert other["report"] is None and other["output"] == ""  # rank 0 reports for all
    found = communication(run)
    assert list(found) == [*COLLECTIVES, *DISPATCH[product]]
    for findings in found.values():
        assert len(findings) == 3
        assert all(finding["verdict"] == "ok" and finding["time_ms"] > 0 for finding in findings)
    same = {finding["variant"] for finding in run["report"]["findings"] if finding["operation"] == "ranks"}
    assert {"torch", "CANN", "driver", "product"} <= same


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_difference_on_another_rank_is_reported(on_ranks, name):
    run, other = (runs[name, "wrong"] for runs in on_ranks("A3"))
    assert run["code"] == other["code"] == 1
    differing = [finding for finding in communication(run)[name] if finding["verdict"] == "DIFFERS"]
    assert differing and all(finding["case"].endswith(", rank 1") for finding in differing)
    assert f"DIFFERS: communication, {name}, {differing[0]['case'].partition(',')[0]}, " in run["output"]
    others = {
        finding["verdict"] for variant, group in communication(run).items() if variant != name for finding in group
    }
    assert others == {"ok"}


def test_a_failing_collective_ends_the_comparisons(on_ranks):
    run = on_ranks("A3")[0]["all_gather", "raises"]
    assert run["code"] == 1
    found = communication(run)
    assert list(found) == ["all_reduce", "all_gather"]  # the other rank would wait for the rest
    assert found["all_gather"][0]["verdict"] == "FAILS" and "not supported here" in found["all_gather"][0]["problem"]


@pytest.mark.parametrize("how", ["raises", "wrong"])
def test_a_failing_start_up_call_is_no_failure(on_ranks, how):
    """The ranks then gather, as the recipe does."""
    run = on_ranks("A3")[0]["combine", how]
    assert run["code"] == 0, run["output"]
    for name in DISPATCH["A3"]:
        [finding] = communication(run)[name]
        assert finding["verdict"] == "not usable" and finding["problem"] == "the start-up call fails on rank 1"


def test_a_difference_that_the_start_up_call_misses_is_reported(on_ranks):
    run = on_ranks("A3")[0]["combine", "wrong later"]
    assert run["code"] == 1
    verdicts = {finding["case"]: finding["verdict"] for finding in communication(run)[DISPATCH["A3"][0]]}
    differs = dict.fromkeys(["small, 1 token, rank 1", "small, 8 tokens, rank 1"], "DIFFERS")
    assert verdicts == differs | {"small, 0 to 8 tokens": "ok"}  # of which rank 1 has none


# Versions and ports


def versions(**given: str) -> dict[str, Finding]:
    machine = {"torch": "2.12.0+cpu", "torch_npu": "2.12.0", "CANN": "9.1.0", "driver": "25.5.1"} | given
    return {finding.variant: finding for finding in compare_versions(machine)}


def test_versions_that_fit():
    found = versions()
    names = ["torch and torch_npu", "torch_npu and CANN", "CANN and driver", "graph mode and driver"]
    assert list(found) == names and all(finding.verdict == "ok" for finding in found.values())


@pytest.mark.parametrize(
    ("given", "which", "verdict", "said"),
    [
        ({"torch": "2.13.0"}, "torch and torch_npu", "FAILS", "2.13.0 needs its own torch_npu, this is 2.12.0"),
        ({"CANN": "9.0.1"}, "torch_npu and CANN", "FAILS", "2.12.0 needs CANN 9.1 or later, this is 9.0.1"),
        (
            {"torch_npu": "2.13.0", "CANN": "9.0.1"},
            "torch_npu and CANN",
            "not usable",
            "2.13.0 needs CANN 9.1 or later",
        ),
        ({"CANN": "8.5.0"}, "torch_npu and CANN", "FAILS", "this is 8.5.0"),
        ({"driver": "25.0.RC1.1"}, "CANN and driver", "FAILS", "9.1.0 needs Ascend HDK 25.2 or later"),
        ({"driver": "25.5.0"}, "graph mode and driver", "not usable", "graph needs Ascend HDK 25.5.1"),
    ],
)
def test_versions_that_do_not_fit(given, which, verdict, said):
    finding = versions(**given)[which]
    assert finding.verdict == verdict and said in finding.problem


def test_versions_that_are_unknown_are_not_compared():
    assert versions(torch_npu="unknown", CANN="unknown", driver="unknown") == {}
    assert list(versions(torch_npu="2.99.0", torch="2.99.0", CANN="10.0.0")) == [
        "torch and torch_npu",
        "graph mode and driver",
    ]
    assert versions(driver="26.0.RC1")["CANN and driver"].verdict == "ok"


def test_version_files(tmp_path):
    assert driver_version(tmp_path / "version.info") == installed_cann_version(str(tmp_path)) == "unknown"
    assert installed_cann_version("") == "unknown"
    (tmp_path / "version.info").write_text("Version=25.5.1\nInnerversion=V100R001C23\n", encoding="utf-8")
    assert driver_version(tmp_path / "version.info") == "25.5.1"
    (tmp_path / "aarch64-linux").mkdir()
    info = "package_name=Ascend-cann-toolkit\nversion=9.1.0\ninnerversion=V100R001C25\n"
    (tmp_path / "aarch64-linux" / "ascend_toolkit_install.info").write_text(info, encoding="utf-8")
    assert installed_cann_version(str(tmp_path)) == "9.1.0"


@pytest.mark.parametrize(
    ("local", "reserved", "base", "verdict"),
    [
        ("32768\t60999\n", "\n", None, "not usable"),
        ("32768\t60999\n", "8080,60000-60031\n", None, "ok"),
        ("32768\t60999\n", "60000-60030", None, "not usable"),
        ("32768\t60999\n", "60000-60015,60016-60031", None, "ok"),
        ("32768\t59999\n", "", None, "ok"),
        ("32768\t60999\n", "60000-60031", "50000", "not usable"),
        ("32768\t60999\n", "", "61000", "ok"),
    ],
)
def test_ports(local, reserved, base, verdict, tmp_path, monkeypatch):
    monkeypatch.delenv("HCCL_IF_BASE_PORT", raising=False)
    if base:
        monkeypatch.setenv("HCCL_IF_BASE_PORT", base)
    (tmp_path / "ip_local_port_range").write_text(local, encoding="utf-8")
    (tmp_path / "ip_local_reserved_ports").write_text(reserved, encoding="utf-8")
    [finding] = compare_ports(tmp_path)
    assert finding.verdict == verdict
    kept = f"{reserved.strip()}," if reserved.strip() else ""
    assert (verdict == "ok") or f"ip_local_reserved_ports={kept}{base or 60000}-" in finding.problem


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["npu"], "error: device: npu is not available"),
        (["tpu"], "invalid choice: 'tpu'"),
        (["npu", "--ranks", "3"], "error: --ranks: 3 does not divide 128 experts; take 1, 2, 4, 8, 16, 32, 64 or 128"),
        (["npu", "--ranks", "0"], "error: --ranks: 0 does not divide"),
        (["npu", "--ranks", "2"], "error: device: npu is not available"),
        (["npu", "--json", "no/such/a.json"], "error: --json: no/such/a.json cannot be written: No such file"),
    ],
)
def test_invalid_arguments(arguments, named):
    command = [sys.executable, "-m", "executor.doctor", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and named in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1 or "usage:" in done.stderr
