# SPDX-License-Identifier: Apache-2.0
"""torch.npu.NPUGraph and torch.npu.graph (torch_npu/npu/graphs.py and _npugraph_handlers of the wheels).

A replay runs the captured calls again on the same memory. Host integers keep their values of the capture.
With auto_dispatch_capture every call of fused attention waits in each replay for an `update` of its own, which may
come before or after the replay: the wheels capture an ExternalEvent before the call, and `update` records it.
"""

import contextlib
import copy
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import torch

from tests.npu.emulator.capture import Call, HostReads, Recorder
from tests.npu.emulator.streams import DEVICE, Capture, Stream, refuse_in_capture, stream, synchronize

ERROR_MODES = ("global", "thread_local", "relaxed")
_pools = itertools.count(1)


class NPUGraph:
    """Raises RuntimeError for calls out of order. After a reset it may capture again, but accepts no update."""

    def __init__(self) -> None:
        self.auto_dispatch_capture = False
        self._calls: list[Call] | None = None
        self._recorder: Recorder | None = None
        self._replay: Iterator[Call] | None = None  # a replay that waits for an update
        self._was_reset = False
        self._lock = threading.Lock()  # callers update from a thread beside the replay

    def capture_begin(self, pool: tuple[int, int] | None = None, capture_error_mode: str = "global") -> None:
        refuse_in_capture("NPUGraph.capture_begin")
        if capture_error_mode not in ERROR_MODES:
            raise RuntimeError(f"capture_error_mode '{capture_error_mode}': one of {', '.join(ERROR_MODES)}")
        if self._calls is not None:
            raise RuntimeError("this NPUGraph holds a graph already: capture into a new one")
        if DEVICE.current is DEVICE.default:
            raise RuntimeError("a graph cannot be captured on the default stream")
        self._pool = pool or (next(_pools), 0)
        DEVICE.capture = Capture(DEVICE.current)
        self._recorder = Recorder(DEVICE.capture, self.auto_dispatch_capture)
        self._modes = contextlib.ExitStack()
        self._modes.enter_context(self._recorder)
        self._modes.enter_context(HostReads())

    def capture_end(self) -> None:
        if self._recorder is None:
            raise RuntimeError("NPUGraph.capture_end before capture_begin")
        self._modes.close()
        recorder, self._recorder = self._recorder, None
        capture, DEVICE.capture = DEVICE.capture, None
        recorder.undo()
        if DEVICE.current is not capture.stream:
            raise RuntimeError("a capture must end on the stream it began on")
        if capture.refusal:
            raise RuntimeError(f"nothing is captured: {capture.refusal}")
        self._calls = recorder.calls

    def _captured(self, operation: str) -> list[Call]:
        refuse_in_capture(operation)
        if self._calls is None:
            raise RuntimeError(f"{operation} without a captured graph")
        return self._calls

    def replay(self) -> None:
        calls = self._captured("NPUGraph.replay")
        with self._lock:
            if self._replay:
                raise RuntimeError("NPUGraph.replay while the last replay still waits for NPUGraph.update")
            self._replay = self._execute(calls)
            self._resume()

    def _execute(self, calls: list[Call]) -> Iterator[Call]:
        for place, call in enumerate(calls):
            if call.updatable and not call.updated:
                for later in calls[place:]:
                    later.poison()
                yield call
            call.replay()

    def _resume(self) -> None:
        """Replays up to the next call that waits, or to the end."""
        replay, self._replay = self._replay, None
        DEVICE.waiting.discard(self)
        with torch.inference_mode():
            if replay and next(replay, None):
                self._replay = replay
                DEVICE.waiting.add(self)

    def update(self, cpu_update_input: list[dict[str, Any]]) -> None:
        """Gives the recorded attention calls new values of the keywords they were captured with, one dict per call.

        A single dict goes to all of them. A keyword that a call was captured without is ignored, as in the wheels.
        """
        if not self.auto_dispatch_capture:
            raise RuntimeError("NPUGraph.update needs a capture with auto_dispatch_capture=True")
        calls = [call for call in self._captured("NPUGraph.update") if call.updatable]
        if self._was_reset:
            raise RuntimeError("NPUGraph.update after a reset: the calls of the graph that is gone are still recorded")
        given = cpu_update_input * len(calls) if len(cpu_update_input) == 1 else cpu_update_input
        if len(given) != len(calls):
            raise RuntimeError(f"cpu_update_input has {len(given)} elements for {len(calls)} recorded calls")
        with self._lock:
            for call, values in zip(calls, given, strict=True):
                call.kwargs |= {name: copy.copy(value) for name, value in values.items() if name in call.kwargs}
                call.updated = True
            self._resume()

    def reset(self) -> None:
        refuse_in_capture("NPUGraph.reset")
        self._was_reset = self._was_reset or any(call.updatable for call in self._calls or ())
        self._calls = self._replay = None
        DEVICE.waiting.discard(self)

    def pool(self) -> tuple[int, int]:
        self._captured("NPUGraph.pool")
        return self._pool


def graph_pool_handle() -> tuple[int, int]:
    return 0, next(_pools)


class graph:  # noqa: N801 - the vendor's name
    """Captures what its block calls into `npu_graph`, on `stream` or on a stream of its own."""

    _stream: Stream | None = None

    def __init__(
        self,
        npu_graph: NPUGraph,
        pool: tuple[int, int] | None = None,
        stream: Stream | None = None,
        auto_dispatch_capture: bool = False,
        capture_error_mode: str = "global",
    ) -> None:
        graph._stream = graph._stream or Stream()
        self._graph, self._pool, self._mode = npu_graph, pool, capture_error_mode
        self._capture_stream = stream or graph._stream
        npu_graph.auto_dispatch_capture = auto_dispatch_capture

    def __enter__(self) -> None:
        synchronize()
        with contextlib.ExitStack() as stack:
            stack.enter_context(stream(self._capture_stream))
            self._graph.capture_begin(self._pool, self._mode)
            stack.callback(self._graph.capture_end)
            self._exit = stack.pop_all()

    def __exit__(self, *error: Any) -> None:
        self._exit.close()
