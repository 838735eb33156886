# SPDX-License-Identifier: Apache-2.0
"""The unmodified product with `device: npu` on the real torch_npu, from the YAML to the last token.

Under it is the fake runtime, so that everything torch_npu checks is checked, and no number means anything.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.npu.fake_runtime import Unavailable, fake_npu

ROOT = Path(__file__).resolve().parents[2]
NEW_TOKENS = 12
BINDINGS = (
    "ops: npu, rotary: npu_apply_rotary_pos_emb TND, cache write: npu_scatter_pa_kv_cache, attention: "
    "npu_fused_infer_attention_score_v2, gating: npu_moe_gating_top_k_softmax_v2, combine: npu_moe_finalize_routing, "
    "regroup: npu_moe_re_routing\n"
)
BROKEN_CALLS = [
    ("(query, key, cos, sin, layout", "(query, key, cos, layout", "ops: npu lacks npu_apply_rotary_pos_emb"),
    # the rest fits the schemas: it is the code behind them that refuses
    ("group_type=0,", "", "Requires manual passing group_type"),
    (
        "group_list=tokens_per_expert,",
        "group_list=tokens_per_expert.tolist(),",
        "npu_grouped_matmul do not support internal format",
    ),
]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Of a machine with one NPU, whose memory reads as zeros until written, so that every token is number 0."""
    try:
        npu = fake_npu()
    except Unavailable as reason:
        pytest.skip(str(reason))
    without_ranks = {name: value for name, value in npu.items() if name not in ("RANK", "WORLD_SIZE")}
    return without_ranks | {"NPU_DEVICE_GLOB": os.devnull, "JEMALLOC": "", "PYTORCH_NO_NPU_MEMORY_CACHING": "1"}


def infer(root: Path, output: Path, environment: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    settings = ("device=npu", f"data_config.max_new_tokens={NEW_TOKENS}", "data_config.ignore_eos=True")
    command = ["bash", root / "models/qwen3_moe/infer.sh", "--output", output, *options]
    command += [argument for setting in settings for argument in ("--set", setting)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("yaml", ["demo", "qwen3_30b_1tp"])
def test_from_the_yaml_to_the_last_token(yaml, environment, tmp_path):
    done = infer(ROOT, tmp_path / "result.jsonl", environment, "--yaml", yaml)
    assert done.returncode == 0, done.stderr
    assert "NPU environment: " in done.stderr and "TASK_QUEUE_ENABLE=1" in done.stderr
    assert BINDINGS in done.stderr and "on npu:0, operations: npu" in done.stderr
    first, last = map(json.loads, (tmp_path / "result.jsonl").read_text(encoding="utf-8").splitlines())
    assert first["token_ids"] == [0] * NEW_TOKENS and first["finish_reason"] == "length"
    assert last["summary"]["settings"]["device"] == "npu"


@pytest.mark.parametrize(("old", "new", "said"), BROKEN_CALLS, ids=[said for _, _, said in BROKEN_CALLS])
def test_a_broken_call_is_noticed(old, new, said, environment, tmp_path):
    for room in ("dataset", "executor", "models", "ops"):
        shutil.copytree(ROOT / room, tmp_path / room)
    [broken] = [file for file in (tmp_path / "ops/npu").glob("*.py") if old in file.read_text(encoding="utf-8")]
    broken.write_text(broken.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    done = infer(tmp_path, tmp_path / "result.jsonl", environment)
    assert said in done.stderr
    assert done.returncode == 1 or BINDINGS not in done.stderr


def test_profiler(environment, tmp_path):
    """torch_npu takes what it is called with, up to its profiler's library, which is not there; that is said."""
    done = infer(ROOT, tmp_path / "result.jsonl", environment, "--set", "model_config.enable_profiler=True")
    assert "libmsprofiler.so: cannot open shared object file" in done.stdout + done.stderr
    assert done.returncode == 1 and "left no kernel_details.csv in" in done.stderr.splitlines()[-1]
