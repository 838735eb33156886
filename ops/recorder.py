# SPDX-License-Identifier: Apache-2.0
"""Graph capture and replay, which removes the kernel launch overhead on the host."""

import atexit
import contextlib
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

import torch

T = TypeVar("T")
Replay = Callable[[list[int]], None]  # replays a graph; takes the current seq_lens

WARMUP_RUNS = 2  # before capture, so that one-time initialisation of libraries is not captured


class GraphRecorder:
    """Captures CUDA graphs in a shared memory pool: outputs are valid until another of these graphs is replayed."""

    max_graphs: int | None = None  # with collectives, on one device; None: no limit

    def __init__(self, device: ModuleType = torch.cuda):
        self.device = device
        self.pool = device.graph_pool_handle()

    def warm_up(self, work: Callable[[], object]) -> None:
        """Runs warm-up iterations of `work` on a side stream, which capture requires."""
        side_stream = self.device.Stream()
        side_stream.wait_stream(self.device.current_stream())
        with self.device.stream(side_stream):
            for _ in range(WARMUP_RUNS):
                work()
        self.device.current_stream().wait_stream(side_stream)

    def record(self, work: Callable[[], T]) -> tuple[T, Replay]:
        """Captures `work` (no host sync allowed); returns its outputs, which replays overwrite, and the replay."""
        graph = torch.cuda.CUDAGraph()
        atexit.register(release, weakref.ref(graph))
        with torch.cuda.graph(graph, pool=self.pool):
            result = work()
        return result, lambda seq_lens: graph.replay()


def release(graph: "weakref.ref[torch.cuda.CUDAGraph]") -> None:
    """Frees a graph at process exit: NCCL waits for graphs that captured its collectives.

    Registered with atexit after `destroy_process_group` (ops/comm.py), so that it runs first: atexit is LIFO.
    """
    alive = graph()
    if alive is not None:
        with contextlib.suppress(RuntimeError):  # the device has failed, which is reported elsewhere
            alive.reset()
