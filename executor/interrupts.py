# SPDX-License-Identifier: Apache-2.0
"""Signals that ask a process to end become an exception, so that it can say so and keep what is finished."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asked the process to end; its text names the signal."""


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGHUP raise `Interrupted`; a second one ends the process at once.

    A signal that is ignored (SIGHUP under nohup) stays so. A rank of several keeps what its launcher relies on: it ends
    at once, as Python would run a handler only after the collective that it waits for.
    """
    alone = os.environ.get("WORLD_SIZE", "1") == "1" and threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in SIGNALS} if alone else {}
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
    """For what must be done whole: a signal raises `Interrupted` behind it; a second one ends the process at once."""
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
    raise Interrupted(f"interrupted by {signal.Signals(number).name}")


def end(number: int, frame: FrameType | None) -> None:
    os._exit(1)


def end_quietly_on_signals() -> None:
    """For the time before a program can handle its signals: the line that it would print, no traceback.

    A rank of several, whose launcher says what ended it, keeps the defaults.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        default = signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)
        if default and os.environ.get("WORLD_SIZE", "1") == "1":
            signal.signal(number, end_quietly)


def end_quietly(number: int, frame: FrameType | None) -> None:
    os.write(2, f"error: interrupted by {signal.Signals(number).name}\n".encode())
    os._exit(1)
