# SPDX-License-Identifier: Apache-2.0
"""Streams and events of torch.npu. Work runs synchronously, so they order nothing; graph capture tracks them."""

import contextlib
from collections.abc import Iterator
from typing import Any


class Stream:
    def __init__(self, device: Any = None, priority: int = 0) -> None: ...

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        event.wait(self)

    def wait_stream(self, stream: "Stream") -> None:
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        host_waits("Stream.synchronize")


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._capture: Capture | None = None

    def record(self, stream: Stream | None = None) -> None:
        captured = DEVICE.capture and (stream or DEVICE.current) in DEVICE.capture.streams
        self._capture = DEVICE.capture if captured else None

    def wait(self, stream: Stream | None = None) -> None:
        """A stream that waits for captured work joins the capture."""
        if self._capture and self._capture is DEVICE.capture:
            self._capture.streams.add(stream or DEVICE.current)

    def synchronize(self) -> None:
        host_waits("Event.synchronize")


class Capture:
    """An ongoing graph capture: the streams it records, and the first operation that it refused, if any."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.streams = {stream}
        self.refusal: str | None = None

    def refuse(self, operation: str) -> None:
        """Raises RuntimeError, now and again at the end of the capture."""
        message = f"{operation} cannot be captured in a graph"
        self.refusal = self.refusal or message
        raise RuntimeError(message)


class _Device:
    def __init__(self) -> None:
        self.default = self.current = Stream()
        self.capture: Capture | None = None
        self.waiting: set[Any] = set()  # graphs whose replay waits for an update


DEVICE = _Device()


def refuse_in_capture(operation: str) -> None:
    if DEVICE.capture:
        DEVICE.capture.refuse(operation)


def host_waits(operation: str) -> None:
    refuse_in_capture(operation)
    if DEVICE.waiting:
        raise RuntimeError(f"{operation} would wait forever: a replayed graph waits for NPUGraph.update")


def synchronize(device: Any = None) -> None:
    host_waits("torch.npu.synchronize")


def current_stream(device: Any = None) -> Stream:
    return DEVICE.current


def default_stream(device: Any = None) -> Stream:
    return DEVICE.default


def set_stream(stream: Stream | None) -> None:
    DEVICE.current = stream or DEVICE.current


@contextlib.contextmanager
def stream(stream: Stream | None) -> Iterator[None]:
    before = DEVICE.current
    set_stream(stream)
    try:
        yield
    finally:
        DEVICE.current = before


def is_current_stream_capturing() -> bool:
    return DEVICE.capture is not None and DEVICE.current in DEVICE.capture.streams
