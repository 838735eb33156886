# SPDX-License-Identifier: Apache-2.0
"""Signal handling: SIGINT, SIGTERM and SIGHUP raise an exception, so that finished results are kept."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """Raised on a termination signal; the message names it."""


raised: list[Interrupted] = []  # since `raise_on_signals` began, also where a library turned it into another error


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Makes SIGINT, SIGTERM and SIGHUP raise `Interrupted`; a second signal ends the process immediately.

    Ignored signals (SIGHUP under nohup) stay ignored. With several ranks the default handlers stay: Python would run
    its own only after the collective in progress.
    """
    alone = os.environ.get("WORLD_SIZE", "1") == "1" and threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in SIGNALS} if alone else {}
    raised.clear()
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Critical section: a signal raises `Interrupted` after it; a second signal ends the process immediately."""
    numbers = [number for number in SIGNALS if signal.getsignal(number) is interrupt]
    came: list[int] = []

    def defer(number: int, frame: FrameType | None) -> None:
        came.append(number)
        for other in numbers:
            signal.signal(other, end)

    try:
        for number in numbers:
            signal.signal(number, defer)
        yield
    finally:
        for number in numbers:
            signal.signal(number, interrupt)
    if came:
        interrupt(came[0], None)


def interrupt(number: int, frame: FrameType | None) -> None:
    for other in SIGNALS:
        if signal.getsignal(other) is interrupt:
            signal.signal(other, end)
    raised.append(Interrupted(f"interrupted by {signal.Signals(number).name}"))
    raise raised[-1]


def end(number: int, frame: FrameType | None) -> None:
    os._exit(1)


def end_quietly_on_signals() -> None:
    """Installs early handlers that print one line without a traceback, until `raise_on_signals` takes over.

    With several ranks the defaults stay: the launcher reports the signal.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        default = signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)
        if default and os.environ.get("WORLD_SIZE", "1") == "1":
            signal.signal(number, end_quietly)


def end_quietly(number: int, frame: FrameType | None) -> None:
    os.write(2, f"error: interrupted by {signal.Signals(number).name}\n".encode())
    os._exit(1)
