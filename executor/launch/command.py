# SPDX-License-Identifier: Apache-2.0
"""Common wrapper of all commands: non-blocking terminal output, signal handling, exit codes."""

import os
from collections.abc import Callable

from executor.launch.interrupts import Interrupted, raise_on_signals, raised
from executor.launch.rank import DRAIN_S, fail
from executor.launch.terminal import drain, resilient_terminal


def run_command(body: Callable[[], int]) -> int:
    """Runs `body`; returns its exit code, 2 on ValueError (wrong input), 1 on any other error."""
    with raise_on_signals():
        try:
            with resilient_terminal():
                try:
                    return body()
                except (Exception, Interrupted) as error:
                    if not raised:
                        return fail(2 if isinstance(error, ValueError) else 1, error)
                    exit_code = fail(1, raised[0])
                    if not drain(DRAIN_S):  # a requested exit does not wait for a stalled reader
                        os._exit(exit_code)
                    return exit_code
        except Interrupted:  # while waiting for a stalled reader
            os._exit(1)
