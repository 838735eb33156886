# SPDX-License-Identifier: Apache-2.0
"""Host time of NPUGraph.update: what torch_npu does for the attention calls of a replayed graph, on the fake runtime.

    python -m tests.npu.fake_runtime python -m tests.npu.graph_update_time --output FILE

Capture needs a device, so torch_npu's own recording of attention calls is entered without one, and its update is timed
beside the same calls alone and the synchronize that ops/npu/recorder.py adds. Times are medians in ms.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from executor.utils.files import replace
from executor.utils.report import commit, versions

COMMAND = "TASK_QUEUE_ENABLE={} python -m tests.npu.fake_runtime python -m tests.npu.graph_update_time --output {}"
LAYERS, HEADS, KV_HEADS, HEAD_DIM, BLOCK = 48, 32, 4, 128, 128  # of Qwen3-30B-A3B
REPEATS, WARMUP = 100, 10
LENGTHS = {"actual_seq_kvlen": [200]}


def measure() -> dict[str, float]:
    import torch_npu
    from torch_npu.npu.graphs import _GraphDispatchMode

    # needs a library that the fake runtime lacks
    workspace = torch.empty(1 << 20, dtype=torch.uint8, device="npu")
    torch_npu._npu_fused_infer_attention_score_v2_get_max_workspace = lambda *arguments, **keywords: workspace
    query = torch.zeros(1, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="npu")
    cache = torch.zeros(4, BLOCK, KV_HEADS * HEAD_DIM, dtype=torch.bfloat16, device="npu")
    settings: dict[str, Any] = {
        "atten_mask": torch.ones(2048, 2048, dtype=torch.int8).triu(1).to("npu"),
        "actual_seq_qlen": [1],
        **LENGTHS,
        "block_table": torch.zeros(1, 2, dtype=torch.int32, device="npu"),
        "num_query_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "softmax_scale": HEAD_DIM**-0.5,
        "input_layout": "TND",
        "sparse_mode": 3,
        "block_size": BLOCK,
    }

    def calls() -> None:
        for _ in range(LAYERS):
            torch.ops.npu.npu_fused_infer_attention_score_v2.default(query, cache, cache, **settings)

    recorded = _GraphDispatchMode()
    with torch.inference_mode():
        with recorded:
            calls()
        assert len(recorded.graph_dispatch_records) == LAYERS
        return medians_ms(
            update_ms=lambda: recorded.update_capture_record([LENGTHS]),
            bare_calls_ms=calls,
            synchronize_ms=torch.npu.current_stream().synchronize,
        )


def medians_ms(**works: Callable[[], Any]) -> dict[str, float]:
    """Median time of each, run in turn."""
    times_ms: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(WARMUP + REPEATS):
        for name, work in works.items():
            start_s = time.perf_counter()
            work()
            times_ms[name].append((time.perf_counter() - start_s) * 1e3)
    return {name: round(statistics.median(times[WARMUP:]), 3) for name, times in times_ms.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True)
    output = Path(parser.parse_args().output)
    command = COMMAND.format(os.environ.get("TASK_QUEUE_ENABLE", "1"), output)
    report = {"commit": commit(), "command": command, "versions": versions(), "layers": LAYERS, **measure()}
    replace(output, json.dumps(report, indent=1) + "\n")
    print(report)
