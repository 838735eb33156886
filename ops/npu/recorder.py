# SPDX-License-Identifier: Apache-2.0
"""Decode steps as NPU graphs (torch_npu/npu/graphs.py, torch_npu 2.8 to 2.13)."""

import os
from collections.abc import Callable

import torch

from ops.recorder import GraphRecorder, Replay, T


class NpuGraphRecorder(GraphRecorder):
    """Fused attention keeps the lengths of its call in the graph: they are replaced in each replay.

    `lengths_argument`: what attention's operation calls the lengths of the cached keys, which it must be given by name.
    Raises ValueError for a setting under which torch_npu refuses to capture.
    """

    def __init__(self, lengths_argument: str):
        if os.environ.get("TASK_QUEUE_ENABLE") == "2":
            raise ValueError("TASK_QUEUE_ENABLE: 2 is not possible with exe_mode: graph, only 0 and 1")
        super().__init__(torch.npu)
        self.lengths_argument = lengths_argument

    def record(self, work: Callable[[], T]) -> tuple[T, Replay]:
        graph = torch.npu.NPUGraph()
        with torch.npu.graph(graph, pool=self.pool, auto_dispatch_capture=True):  # notes the calls of attention
            result = work()

        def replay(seq_lens: list[int]) -> None:
            # each recorded attention waits for an event that the update sets, and resets it: the host updates while
            # the device has begun to replay, but may not set an event again that the last replay still waits for
            torch.npu.current_stream().synchronize()
            graph.replay()
            graph.update(cpu_update_input=[{self.lengths_argument: seq_lens}])  # one entry is for all layers

        return result, replay
