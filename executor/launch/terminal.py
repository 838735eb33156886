# SPDX-License-Identifier: Apache-2.0
"""Non-blocking terminal output: a closed or stalled stdout neither ends nor blocks a run.

While `resilient_terminal` is active, what is printed or logged is queued and written by a thread: a stalled reader
(`| less`) blocks that thread, not a step that other ranks wait for. Characters that the terminal's encoding lacks are
replaced. Output to a broken stream (closed pipe, full disk, hung-up terminal) is dropped.
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

MAX_QUEUED = 200_000  # writes; beyond this, output is dropped and the drop is reported


class Writer:
    """Writer thread shared by stdout and stderr, so that their lines stay in order."""

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
        """Waits until the queue is flushed; False on timeout."""
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
    """Points a broken stream at /dev/null, so that the interpreter's flush at exit succeeds."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


class Terminal(io.TextIOBase):
    """Replacement for sys.stdout or sys.stderr. stream: None if it was closed before the program started."""

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
    """Replaces sys.stdout and sys.stderr by `Terminal`s; flushes them on exit."""
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
    """Opens closed descriptors 0 to 2 on /dev/null: else a file opened later would reuse one and receive the output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def drain(timeout_s: float) -> bool:
    """Flushes the output before os._exit; False on timeout."""
    return not isinstance(sys.stdout, Terminal) or sys.stdout.writer.drain(timeout_s)


def print_error(message: object) -> None:
    """Prints one line `error: ...` to stderr, on a new line after a progress bar."""
    broken = isinstance(sys.stderr, Terminal) and not sys.stderr.writer.at_line_start
    print(f"{chr(10) if broken else ''}error: {one_line(message)}", file=sys.stderr, flush=True)
