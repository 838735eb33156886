# SPDX-License-Identifier: Apache-2.0
"""Inference engine: generates tokens from YAML settings and a checkpoint. Public API: `LLM`, `AsyncLLM`."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from executor.async_llm import AsyncLLM
    from executor.llm import LLM
    from executor.outputs import Completion, RequestOutput, StreamChunk, TokenLogprobs
    from executor.sampling_params import SamplingParams


def is_command() -> bool:
    """Returns whether `python -m executor.COMMAND` (runpy) imports this package, not a user of the Python API."""
    frame = sys._getframe(1).f_back
    while frame is not None and "importlib" in frame.f_code.co_filename:
        frame = frame.f_back
    return sys.argv[:1] == ["-m"] and frame is not None and frame.f_globals.get("__name__") == "runpy"


if is_command():  # a signal during the imports prints one line, no traceback
    from executor.launch.interrupts import end_quietly_on_signals

    end_quietly_on_signals()

__version__ = "0.2.0"
EXPORTS = {
    "AsyncLLM": "executor.async_llm",
    "LLM": "executor.llm",
    "SamplingParams": "executor.sampling_params",
    **dict.fromkeys(("Completion", "RequestOutput", "StreamChunk", "TokenLogprobs"), "executor.outputs"),
}
__all__ = ["LLM", "AsyncLLM", "Completion", "RequestOutput", "SamplingParams", "StreamChunk", "TokenLogprobs"]


def __getattr__(name: str) -> Any:
    """Imports the public names lazily, so that commands can reject bad input before torch is loaded."""
    if name not in EXPORTS:
        raise AttributeError(f"module 'executor' has no attribute {name!r}")
    return getattr(import_module(EXPORTS[name]), name)
