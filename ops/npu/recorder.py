# SPDX-License-Identifier: Apache-2.0
"""Graph capture and replay of decode steps on NPUs (torch_npu/npu/graphs.py, torch_npu 2.8 to 2.14)."""

import os
from collections.abc import Callable

import torch

from ops.recorder import GraphRecorder, Replay, T


class NpuGraphRecorder(GraphRecorder):
    """Captures NPU graphs; each replay updates the KV lengths of fused attention, which are host lists.

    `lengths_argument`: the keyword of fused attention for the KV lengths. Raises ValueError for a TASK_QUEUE_ENABLE
    under which torch_npu cannot capture.
    """

    def __init__(self, lengths_argument: str, max_graphs: int | None):
        if os.environ.get("TASK_QUEUE_ENABLE") == "2":
            raise ValueError("TASK_QUEUE_ENABLE: 2 is not possible with exe_mode: graph, only 0 and 1")
        super().__init__(torch.npu)
        self.lengths_argument = lengths_argument
        self.max_graphs = max_graphs

    def record(self, work: Callable[[], T]) -> tuple[T, Replay]:
        graph = torch.npu.NPUGraph()
        with torch.npu.graph(graph, pool=self.pool, auto_dispatch_capture=True):  # records attention calls for update()
            result = work()

        def replay(seq_lens: list[int]) -> None:
            # each captured attention call waits on an event that update() records: the update overlaps with the
            # replay, but must not record an event that the previous replay still waits on
            torch.npu.current_stream().synchronize()
            graph.replay()
            graph.update(cpu_update_input=[{self.lengths_argument: seq_lens}])  # one entry is for all layers

        return result, replay
