# SPDX-License-Identifier: Apache-2.0
"""End-to-end runs with `device: npu` on the real torch_npu over the fake runtime, and the host time of a decode step.

All argument checks of torch_npu run; the values that the model computes are meaningless.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.npu.bindings import QUANTIZED, UNFUSED
from tests.npu.fake_runtime import Unavailable, fake_npu

ROOT = Path(__file__).resolve().parents[2]
NEW_TOKENS = 12
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
NO_CACHING = "PYTORCH_NO_NPU_MEMORY_CACHING"  # if set, torch_npu frees memory immediately
BINDINGS = "ops: npu, " + ", ".join(f"{what}: {name}" for what, name in UNFUSED.items()) + "\n"
BROKEN_CALLS = [
    ("(query, key, cos, sin, layout", "(query, key, cos, layout", "ops: npu lacks npu_apply_rotary_pos_emb"),
    # fits the schema and is rejected by torch_npu's C++ checks
    ("group_type=0,", "", "Requires manual passing group_type"),
]


LAUNCHES_PER_LAYER = 16
# inputs, embedding, cos and sin and their casts, last norm, head, float32, argmax, token, logit
LAUNCHES_OUTSIDE_LAYERS = 12
READ_BACKS = 2  # the sampled token, and its logit, which shows whether all logits are finite


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Environment of a machine with one NPU; unwritten memory reads as zeros, so that every token id is 0."""
    try:
        npu = fake_npu()
    except Unavailable as reason:
        pytest.skip(str(reason))
    without_ranks = {name: value for name, value in npu.items() if name not in ("RANK", "WORLD_SIZE")}
    return without_ranks | {
        "PYTHON": sys.executable,
        "NPU_DEVICE_GLOB": os.devnull,
        "JEMALLOC": "",
        NO_CACHING: "1",
    }


def infer(root: Path, output: Path, environment: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    settings = ("device=npu", f"data_config.max_new_tokens={NEW_TOKENS}", "data_config.ignore_eos=True")
    command = ["bash", root / "models/qwen3_moe/infer.sh", "--output", output, *options]
    command += [argument for setting in settings for argument in ("--set", setting)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("yaml", "options"),
    [("demo", ("--set", "engine_config.max_step_tokens=5")), ("qwen3_30b_1tp", ())],  # the demo's 14 tokens in chunks
)
def test_end_to_end(yaml, options, environment, tmp_path):
    done = infer(ROOT, tmp_path / "result.jsonl", environment, "--yaml", yaml, *options)
    assert done.returncode == 0, done.stderr
    assert "NPU environment" in done.stderr and "TASK_QUEUE_ENABLE=1" in done.stderr
    assert BINDINGS in done.stderr and "on npu:0, operations: npu" in done.stderr
    assert "torch_npu.env" not in done.stderr  # importing it would slow down every access to os.environ
    first, last = map(json.loads, (tmp_path / "result.jsonl").read_text(encoding="utf-8").splitlines())
    assert first["token_ids"] == [0] * NEW_TOKENS and first["finish_reason"] == "length"
    assert last["summary"]["settings"]["device"] == "npu"


def test_too_small_hccl_buffer_is_reported_once(environment, tmp_path):
    """Both ranks raise before the process groups are created."""
    options = ["--yaml", "qwen3_30b_1tp"]
    for setting in ("world_size=2", "data_config.batch_size=256"):
        options += ["--set", setting]
    done = infer(ROOT, tmp_path / "result.jsonl", environment | {"FAKE_NPUS": "2", "HCCL_BUFFSIZE": "100"}, *options)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and "elastic" not in done.stderr and done.stderr.endswith(f"{errors[0]}\n")
    said = "HCCL_BUFFSIZE: 100 MB given, but dispatch and combine (fullmesh_v2, 2 ranks, 128 tokens on each) need 152"
    assert said in errors[0]


def host_time(root: Path, output: Path, environment: dict[str, str], yaml: str, repeats: int) -> dict:
    environment = {name: value for name, value in environment.items() if name != NO_CACHING}
    environment |= {"PYTHONPATH": f"{root}{os.pathsep}{environment['PYTHONPATH']}", "PYTHONSAFEPATH": "1"}
    environment |= {"TASK_QUEUE_ENABLE": "0"}
    command = [sys.executable, "-m", "executor.bench", "host-time", "--yaml", yaml, "--set", "device=npu"]
    command += ["--repeats", str(repeats), "--output", output]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    [result] = json.loads(output.read_text(encoding="utf-8"))["results"]
    assert "TASK_QUEUE_ENABLE  step_over_bare" in done.stdout
    assert all(f"{result[name]['p50']:.2f}" in done.stdout for name in ("step_ms", "bare_ms"))
    return result


def test_host_time_of_a_decode_step(environment, tmp_path):
    """Checks the counts; the times are only meaningful on an idle machine."""
    result = host_time(ROOT, tmp_path / "report.json", environment, "qwen3_30b_1tp", repeats=3)
    assert result["layers"] == 48 and result["TASK_QUEUE_ENABLE"] == "0" and result["repeats"] == 3
    assert result["launches"] == 48 * LAUNCHES_PER_LAYER + LAUNCHES_OUTSIDE_LAYERS
    assert result["read_backs"] == READ_BACKS
    assert result["step_over_bare"] == pytest.approx(result["step_ms"]["p50"] / result["bare_ms"]["p50"], abs=1e-3)


def test_update_of_a_graph(environment, tmp_path):
    """The time between two replays is torch_npu's: it calls each attention again. Ours is the wait before a replay."""
    command = [sys.executable, "-m", "tests.npu.graph_update_time", "--output", tmp_path / "report.json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["layers"] == 48
    assert min(report["synchronize_ms"], report["bare_calls_ms"], report["update_ms"]) > 0


def mutated_copy(folder: Path, old: str, new: str) -> Path:
    """Copies the sources to `folder` with `old` replaced by `new` in the NPU backend."""
    for package in ("dataset", "executor", "models", "ops"):
        shutil.copytree(ROOT / package, folder / package)
    [broken] = [file for file in (folder / "ops/npu").glob("*.py") if old in file.read_text(encoding="utf-8")]
    broken.write_text(broken.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    return folder


def test_device_lengths_count_as_host_syncs(environment, tmp_path):
    root = mutated_copy(tmp_path, "lengths, paged = step.seq_lens_list,", "lengths, paged = step.seq_lens,")
    result = host_time(root, tmp_path / "report.json", environment, "demo", repeats=1)
    assert result["read_backs"] == READ_BACKS + result["layers"]


@pytest.mark.parametrize(("old", "new", "said"), BROKEN_CALLS, ids=[said for _, _, said in BROKEN_CALLS])
def test_a_broken_call_is_detected(old, new, said, environment, tmp_path):
    root = mutated_copy(tmp_path, old, new)
    done = infer(root, tmp_path / "result.jsonl", environment)
    assert said in done.stderr
    assert done.returncode == 1 or BINDINGS not in done.stderr


def test_profiler(environment, tmp_path):
    """torch_npu accepts the calls, and the missing profiler library is reported."""
    done = infer(ROOT, tmp_path / "result.jsonl", environment, "--set", "model_config.enable_profiler=True")
    assert "libmsprofiler.so: cannot open shared object file" in done.stdout + done.stderr
    assert done.returncode == 1 and "left no kernel_details.csv in" in done.stderr.splitlines()[-1]


def test_doctor(environment):
    """torch_npu accepts all calls but graph capture, and the doctor detects that nothing is computed.

    Those on quantised weights are compared only where their probe passes, which it does with any finite error here.
    """
    small = "hidden_size=256, num_heads=4, num_kv_heads=2, num_experts=16, top_k=4, width=64, vocab_size=1000"
    program = f"""import sys
import ops.npu.quantized_probe
ops.npu.quantized_probe.TOLERANCE = float("inf")
from executor.doctor.__main__ import main
from executor.doctor.inputs import Shapes
sys.exit(main(["npu"], shapes=[Shapes(name="small", {small})]))"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "torch_npu: 2.13.0\n" in done.stdout and "product: Ascend910_9391\n" in done.stdout
    assert "DIFFERS: grouped_linear, npu_grouped_matmul, small, " in done.stdout
    for family in QUANTIZED:
        assert f"DIFFERS: {family}, {QUANTIZED[family]}" in done.stdout and f"not usable: {family}" not in done.stdout
    failures = [line for line in done.stdout.splitlines() if line.startswith("FAILS: ")]
    assert "not usable: versions, torch_npu and CANN, 2.13.0 with 8.5.0: " in done.stdout  # as the stand-in says
    assert [line.split(", small")[0] for line in failures] == [
        "FAILS: sort_by_expert, npu_moe_init_routing_v2",  # the order of its rows is checked first
        *(
            f"FAILS: attention, {variant}, graph"
            for variant in ("npu_rms_norm", "npu_fused_infer_attention_score_v2", "npu_fused_infer_attention_score")
        ),
    ]


def test_doctor_starts_ranks_and_shows_at_once_what_they_exchange(environment):
    """The stand-in's collectives do nothing, which the doctor detects; the comparisons after them are not awaited."""
    command = [sys.executable, "-m", "executor.doctor", "npu", "--ranks", "2"]
    missing = {f"DIFFERS: communication, {name}, 30B, " for name in COLLECTIVES}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment | {"FAKE_NPUS": "2"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as doctor:
        watchdog = threading.Timer(200, doctor.terminate)
        watchdog.start()
        for line in doctor.stdout:
            missing = {begin for begin in missing if not line.startswith(begin)}
            if not missing:
                break
        watchdog.cancel()
        doctor.terminate()
    assert not missing
