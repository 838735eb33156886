# SPDX-License-Identifier: Apache-2.0
"""The part of torch.npu (torch_npu.npu) that needs no device: one that computes at once, on the host."""

import contextlib
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec

# torch_npu's numbers for the types that torch has no name for
DTYPE_CODES = {"int4": 285, "hifloat8": 290, "float8_e8m0fnu": 293, "float4_e2m1fn_x2": 296, "float4_e1m2fn_x2": 297}


class Config:
    """torch.npu.config. Private formats are off on A2 and A3 until a caller allows them (op-plugin docs, formats)."""

    def __init__(self) -> None:
        self.allow_internal_format = False


CONFIG = Config()


class Stream:
    """Work is done when it is called, so streams and events have nothing to order."""

    def wait_stream(self, stream: "Stream") -> None: ...
    def wait_event(self, event: "Event") -> None: ...
    def synchronize(self) -> None: ...


class Event:
    def record(self, stream: Stream | None = None) -> None: ...
    def wait(self, stream: Stream | None = None) -> None: ...
    def synchronize(self) -> None: ...


def device_module(soc_name: Callable[[], str]) -> types.ModuleType:
    """The module that stands for torch.npu: one device, no memory figures, no graphs."""
    module = types.ModuleType("torch_npu.npu")
    module.__spec__ = ModuleSpec("torch_npu.npu", None)
    stream = Stream()
    module.config = CONFIG
    module.Stream, module.Event = Stream, Event
    module.is_available = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.set_device = lambda device: None
    module.synchronize = lambda device=None: None
    module.empty_cache = lambda: None
    module.get_device_name = lambda device=None: soc_name()
    module.current_stream = lambda device=None: stream
    module.stream = lambda other: contextlib.nullcontext()
    return module
