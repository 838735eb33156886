# SPDX-License-Identifier: Apache-2.0
"""Sources of the NPU backend, some of them broken, compared with the reference on emulated operations."""

import os
from typing import Any

import pytest
import torch

from executor import LLM
from tests.npu.doctor_runs import SMALL
from tests.npu.emulated import DEMO
from tests.npu.emulator import install


def run_sources(wheel: str, sources: dict[str, dict[str, str]], quantized: list[str]) -> dict[str, list[str]]:
    """Findings of the doctor's comparisons that fail, for each backend source.

    quantized: names of sources of which only the operations on quantised weights are compared; "" is compared in all.
    """
    install(wheel)
    from executor.doctor import experts, layers
    from executor.doctor.findings import Context
    from executor.doctor.quantized import compare_quantized
    from tests.npu.meta_run import backend_of

    comparisons = (layers.attention, layers.route, experts.experts, experts.regroup)

    found = {}
    for name, changed in sources.items():
        try:
            ops = backend_of(changed).NpuOps("cpu")
            context = Context(ops, torch.device("cpu"), SMALL)
            findings = list(compare_quantized(context)) if not name or name in quantized else []
            if name not in quantized:
                findings += [finding for compare in comparisons for finding in compare(context, "in use")]
                assert ops.fused_qkv is not None or name, "the emulated attention reads tiled caches"
                ops.fused_qkv = None
                findings += layers.attention(context, "in parts")
            found[name] = [
                f"{finding.case} {finding.error} {finding.problem}" for finding in findings if finding.verdict != "ok"
            ]
        except Exception as error:  # no backend can be built on it
            found[name] = [str(error)]
    return found


def too_small_buffer(wheel: str, megabytes: str) -> str:
    """Error of a two-rank LLM for this HCCL_BUFFSIZE, raised before the process groups are created."""
    install(wheel, "A2")
    import executor.loading.assembly
    from ops.npu import NpuOps

    executor.loading.assembly.load_ops = lambda device_type: NpuOps("cpu")
    os.environ.update(HCCL_BUFFSIZE=megabytes, WORLD_SIZE="2")
    settings: dict[str, Any] = {"dtype": "float16", "world_size": 2, "batch_size": 512}
    with pytest.raises(ValueError) as raised:
        LLM(DEMO, device="cpu", **settings)
    return str(raised.value)
