# SPDX-License-Identifier: Apache-2.0
"""Defines the wheel's schemas, registers the CPU kernels for them, and installs a stand-in module torch_npu."""

import logging
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch

from tests.npu.emulator import (
    cache,
    exchange,
    formats,
    fused_attention,
    grouped_quant,
    matmul,
    norms,
    permute,
    quant,
    quant_matmul,
    quant_norms,
    registry,
    routing,
    stand_in,
)
from tests.npu.emulator.registry import KERNELS, adapt, set_product, set_tiled_cache
from tests.npu.emulator.schemas import read_schemas, read_version

logger = logging.getLogger(__name__)
# importing them registers their operations
SUBJECTS = (
    *(cache, exchange, formats, fused_attention, matmul, norms, permute, routing),
    *(grouped_quant, quant, quant_matmul, quant_norms),
)
SOC_NAMES = {"A2": "Ascend910B3", "A3": "Ascend910_9391"}

_installed: dict[str, Any] = {}


def _define(schemas: list[str]) -> list[str]:
    """Defines the schemas that this torch can parse and gives those that have a kernel its CPU implementation."""
    definitions = torch.library.Library("npu", "DEF")
    implementations = torch.library.Library("npu", "IMPL", "CPU")
    _installed["libraries"] = (definitions, implementations)  # a library's operations end with it
    rejected = []
    for text in schemas:
        try:
            definitions.define(text)
        except RuntimeError as error:
            rejected.append(text)
            logger.debug("schema not defined: %s (%s)", text, error)
            continue
        schema = torch._C.parse_schema(text)
        name = f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name
        if name in KERNELS:
            implementations.impl(name, adapt(schema, KERNELS[name]))
    return rejected


def install(wheel: str | Path, product: str = "A3") -> types.ModuleType:
    """Emulates torch_npu as the wheel file (or its unzipped folder) declares it, on CPU tensors; returns the module.

    From 2.11 on, which goes with CANN 9.1, attention takes NZ caches.
    `product` is "A2" or "A3"; `set_product` changes it later. A process holds one wheel: installing it again does
    nothing but set the product, another one raises RuntimeError, as does a real torch_npu already imported.
    """
    wheel = Path(wheel).resolve()
    set_product(product)
    if _installed:
        if _installed["wheel"] != wheel:
            raise RuntimeError(f"{_installed['wheel'].name} is installed in this process, not {wheel.name}")
        return sys.modules["torch_npu"]
    if "torch_npu" in sys.modules:
        raise RuntimeError("torch_npu is already imported in this process")
    _define(read_schemas(wheel))
    _installed["wheel"] = wheel

    module = types.ModuleType("torch_npu")
    module.__spec__ = ModuleSpec("torch_npu", None)
    module.__version__ = read_version(wheel)
    set_tiled_cache(tuple(map(int, module.__version__.split(".")[:2])) >= (2, 11))
    module.__getattr__ = lambda name: getattr(torch.ops.npu, name)
    module.npu = stand_in.device_module(lambda: SOC_NAMES[registry.product()])
    for name, code in stand_in.DTYPE_CODES.items():
        setattr(module, name, code)
    sys.modules |= {"torch_npu": module, "torch_npu.npu": module.npu}
    torch.npu = module.npu
    return module
