# SPDX-License-Identifier: Apache-2.0
"""Stand-in for torch.npu (torch_npu.npu): a device that computes synchronously on the host."""

import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec

from tests.npu.emulator import graphs, streams

# torch_npu's codes of the dtypes that torch lacks
DTYPE_CODES = {"int4": 285, "hifloat8": 290, "float8_e8m0fnu": 293, "float4_e2m1fn_x2": 296, "float4_e1m2fn_x2": 297}


class Config:
    """torch.npu.config. Private formats are off on A2 and A3 until a caller allows them (op-plugin docs, formats)."""

    def __init__(self) -> None:
        self.allow_internal_format = False


CONFIG = Config()


def device_module(soc_name: Callable[[], str]) -> types.ModuleType:
    """Builds the stand-in for torch.npu: one device, no memory statistics."""
    module = types.ModuleType("torch_npu.npu")
    module.__spec__ = ModuleSpec("torch_npu.npu", None)
    module.config = CONFIG
    module.is_available = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.set_device = lambda device: None
    module.empty_cache = lambda: None
    module.get_device_name = lambda device=None: soc_name()
    for name in ("Stream", "Event", "stream", "set_stream", "current_stream", "default_stream", "synchronize"):
        setattr(module, name, getattr(streams, name))
    module.is_current_stream_capturing = streams.is_current_stream_capturing
    module.NPUGraph, module.graph = graphs.NPUGraph, graphs.graph
    module.graph_pool_handle = graphs.graph_pool_handle
    return module
