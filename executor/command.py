# SPDX-License-Identifier: Apache-2.0
"""What every command of this package has around it: a terminal that cannot end it, signals, exit codes."""

import os
from collections.abc import Callable

from executor.interrupts import Interrupted, raise_on_signals
from executor.rank import DRAIN_S, fail
from executor.terminal import drain, resilient_terminal


def run_command(body: Callable[[], int]) -> int:
    """Returns the exit code of `body`: its own, 2 for a ValueError (the user's input), 1 for any other error."""
    with raise_on_signals():
        try:
            with resilient_terminal():
                try:
                    return body()
                except ValueError as error:
                    return fail(2, error)
                except Interrupted as error:
                    exit_code = fail(1, error)
                    if not drain(DRAIN_S):  # an end that was asked for does not wait for a reader that pauses
                        os._exit(exit_code)
                    return exit_code
                except Exception as error:
                    return fail(1, error)
        except Interrupted:  # while a reader that pauses was waited for
            os._exit(1)
