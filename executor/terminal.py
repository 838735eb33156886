# SPDX-License-Identifier: Apache-2.0
"""Terminal output that can neither end a run nor hold it up.

While `resilient_terminal` is active, what is printed or logged is queued and written by a thread: a reader that pauses
(`| less`) blocks that thread, not a step that other ranks wait for. Characters that the terminal's encoding lacks are
replaced. When a stream is gone (closed pipe, full disk, hung-up terminal), what goes there is dropped.
"""

import contextlib
import io
import os
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Any

from executor.utils.text import one_line

MAX_QUEUED = 200_000  # pieces of text; a reader that pauses for longer misses what comes then, and is told so


class Writer:
    """The thread that writes, for both streams, so that their lines stay in the order of printing."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self.at_line_start = True
        self.dropped = 0
        threading.Thread(target=self._write_all, daemon=True, name="terminal").start()

    def put(self, stream: Any, text: str) -> None:
        if self.queue.qsize() < MAX_QUEUED:
            self.at_line_start = text.endswith("\n")
            self.queue.put((stream, text))
        else:
            self.dropped += 1

    def drain(self, timeout_s: float | None = None) -> bool:
        """Returns when all that was queued is written or dropped; False if that is not so in time."""
        done = threading.Event()
        self.queue.put((None, done))
        return done.wait(timeout_s)

    def _write_all(self) -> None:
        gone: set[int] = set()
        while True:
            stream, text = self.queue.get()
            if stream is None:
                text.set()
            elif id(stream) not in gone:
                if self.dropped and self.queue.empty():
                    text += f"\n[{self.dropped} pieces of output were dropped while nobody read]\n"
                    self.dropped = 0
                try:
                    stream.write(text)
                    stream.flush()
                except (OSError, ValueError):  # ValueError: the stream was closed
                    gone.add(id(stream))
                    redirect_to_null(stream)


def redirect_to_null(stream: Any) -> None:
    """Lets the interpreter's own flush at exit succeed for a stream whose reader is gone."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


class Terminal(io.TextIOBase):
    """Stands in for sys.stdout or sys.stderr; None for a stream that was closed before the program began."""

    def __init__(self, stream: Any, writer: Writer):
        self.stream = stream
        self.writer = writer
        if hasattr(stream, "reconfigure") and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self.stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        if text and self.stream is not None:
            self.writer.put(self.stream, text)
        return len(text)

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self.stream is not None and self.stream.isatty()

    def fileno(self) -> int:
        if self.stream is None:
            raise OSError("closed")
        return self.stream.fileno()


@contextlib.contextmanager
def resilient_terminal() -> Iterator[None]:
    """Puts a `Terminal` in the place of sys.stdout and sys.stderr; at the end waits until all is written."""
    if isinstance(sys.stdout, Terminal):
        yield
        return
    open_standard_descriptors()
    writer, streams = Writer(), (sys.stdout, sys.stderr)
    sys.stdout, sys.stderr = (Terminal(stream, writer) for stream in streams)
    try:
        yield
    finally:
        writer.drain()
        sys.stdout, sys.stderr = streams


def open_standard_descriptors() -> None:
    """Opens descriptors 0 to 2 that are closed: else a file opened later gets the number and what is printed there."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def drain(timeout_s: float) -> bool:
    """Waits until what was printed is written, before a process ends without unwinding; False if it is not in time."""
    return not isinstance(sys.stdout, Terminal) or sys.stdout.writer.drain(timeout_s)


def print_error(message: object) -> None:
    """One line `error: ...` on stderr, never behind what stands on the line already, such as a progress bar."""
    broken = isinstance(sys.stderr, Terminal) and not sys.stderr.writer.at_line_start
    print(f"{chr(10) if broken else ''}error: {one_line(message)}", file=sys.stderr, flush=True)
