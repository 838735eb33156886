# SPDX-License-Identifier: Apache-2.0
"""Work of a device recorded once and replayed from then on, without what launching it costs the host."""

import atexit
import contextlib
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

import torch

T = TypeVar("T")
Replay = Callable[[list[int]], None]  # repeats what was recorded; takes the sequences' lengths of this time

WARMUP_RUNS = 2  # before recording, so that one-time work of libraries is not recorded


class GraphRecorder:
    """CUDA graphs that share one memory pool: what a graph returns is valid until another one of them is replayed."""

    def __init__(self, device: ModuleType = torch.cuda):
        self.device = device
        self.pool = device.graph_pool_handle()

    def warm_up(self, work: Callable[[], object]) -> None:
        """Runs the work outside the stream that the tensors of other work live on."""
        side_stream = self.device.Stream()
        side_stream.wait_stream(self.device.current_stream())
        with self.device.stream(side_stream):
            for _ in range(WARMUP_RUNS):
                work()
        self.device.current_stream().wait_stream(side_stream)

    def record(self, work: Callable[[], T]) -> tuple[T, Replay]:
        """What `work` returns, whose tensors each replay fills anew. The work must not wait for the device."""
        graph = torch.cuda.CUDAGraph()
        atexit.register(release, weakref.ref(graph))
        with torch.cuda.graph(graph, pool=self.pool):
            result = work()
        return result, lambda seq_lens: graph.replay()


def release(graph: "weakref.ref[torch.cuda.CUDAGraph]") -> None:
    """Frees a graph that is still there when the process ends: NCCL waits for those that recorded its exchanges.

    Registered after `ops.comm` has registered the end of the process groups, so that it is called before.
    """
    alive = graph()
    if alive is not None:
        with contextlib.suppress(RuntimeError):  # of a device that has failed: why is being said already
            alive.reset()
