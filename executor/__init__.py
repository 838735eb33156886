# SPDX-License-Identifier: Apache-2.0
"""Turns a YAML and a checkpoint into tokens. `LLM` and `SamplingParams` are what programs use."""

import sys
from importlib import import_module
from typing import Any


def is_command() -> bool:
    """Whether runpy imports this package, as for `python -m executor.infer`, and not a program that is run by -m."""
    frame = sys._getframe(1).f_back
    while frame is not None and "importlib" in frame.f_code.co_filename:
        frame = frame.f_back
    return sys.argv[:1] == ["-m"] and frame is not None and frame.f_globals.get("__name__") == "runpy"


if is_command():  # no traceback from here on
    from executor.interrupts import end_quietly_on_signals

    end_quietly_on_signals()

__version__ = "0.2.0"
EXPORTS = {"LLM": "executor.llm", "RequestOutput": "executor.llm", "SamplingParams": "executor.sampling_params"}
__all__ = list(EXPORTS)


def __getattr__(name: str) -> Any:
    """Imports on first use, so that the command line can refuse bad input before it has loaded torch."""
    if name not in EXPORTS:
        raise AttributeError(f"module 'executor' has no attribute {name!r}")
    return getattr(import_module(EXPORTS[name]), name)
