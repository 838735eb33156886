# SPDX-License-Identifier: Apache-2.0
"""Tests what Triton's interpreter cannot: compilation, shared memory limits and the order of PDL instructions."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need triton")

ROOT = Path(__file__).parents[2]
# the next kernel reads an older output before its wait
TRIGGER_LATE = {"gate_up_kernel", "gate_up_shared_kernel", "gate_up_int4_kernel", "gate_up_shared_int4_kernel"}
FIRST_OF_A_STEP = {"gemv_kernel", "add_norm_kernel", "linear_int4_kernel"}


@pytest.mark.parametrize(
    ("capability", "shared_memory"), [(90, 227 << 10), (86, 99 << 10)], ids=["Hopper", "Ampere, little shared memory"]
)
def test_kernels_compile(capability, shared_memory, tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.ops.compile_kernels", str(capability), str(shared_memory)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    compiled = [json.loads(line) for line in ended.stdout.splitlines()]
    sources = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "ops" / "cuda").glob("*.py"))
    assert {found["kernel"] for found in compiled} == set(re.findall(r"^def (\w+_kernel)\(\n", sources, re.MULTILINE))
    for found in compiled:
        assert found["shared_memory"] <= shared_memory, found
        assert not found["pdl"] or 0 <= found["wait"] < found["first_store"], found
        if capability >= 90 and (found["kernel"] in TRIGGER_LATE or found["first"]):
            assert found["wait"] < found["trigger"], found
    assert {found["kernel"] for found in compiled if found["first"]} == FIRST_OF_A_STEP
