# SPDX-License-Identifier: Apache-2.0
"""Runs quantised models on the NPU backend with meta tensors; each function needs a process of its own."""

import math
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch

from models.layers.parameter import ParameterSpec, Role
from ops import Fp8Weight, Int4Weight, Int8StaticWeight, Int8Weight, Weight
from tests.npu.meta_run import META, Case, backend_of, run_case
from tests.npu.schemas import load

FORMATS = ("w8a8", "w8a8-static", "w4a16", "fp8")  # w8a8-static: attention only, beside w8a8 experts
# (model, layout): the shipped ones, and both ways in which experts are parallel, with one expert on a rank too
LAYOUTS = (("30b", "1tp"), ("30b", "2tp"), ("235b", "16tp"), ("30b", "8ep_gather"), ("30b", "8ep"), ("30b", "128ep"))
GROUP_SIZE = 128
# families as after a probe
PARTS = dict.fromkeys(("linear w8a8", "experts w8a8", "linear w8a8-static"), True)
PARTS |= dict.fromkeys(("norm_linear w8a8", "silu_and_mul w8a8", "norm_linear w8a8-static"), False)
NONE = dict.fromkeys(("linear w8a8", "experts w8a8", "linear w4a16", "experts w4a16"), False)
REPLACED = {"parts": PARTS, "dequantised": NONE}


def weight_of(spec: ParameterSpec, format_name: str) -> Weight | None:
    """An empty weight in a number format, as published checkpoints have it: lm_head is unquantised."""
    if spec.role is not Role.MATRIX or spec.name == "lm_head.weight":
        return None
    *experts, n, k = spec.shape

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*experts, *shape, dtype=dtype, device=META)

    if format_name == "fp8":
        return Fp8Weight(empty(n, k, dtype=torch.float8_e4m3fn), empty(n // 32, k // 32))
    if format_name == "w4a16":
        groups = k // math.gcd(GROUP_SIZE, k)
        return Int4Weight(empty(n, k // 8, dtype=torch.int32), empty(n, groups), empty(n, groups, dtype=torch.uint8))
    data, scales = empty(n, k, dtype=torch.int8), empty(n, 1)
    if format_name == "w8a8" or experts:
        return Int8Weight(data, scales)
    bias = empty(k) if "qkv" in spec.name else None
    return Int8StaticWeight(data, scales, empty(n, 1, dtype=torch.int32), empty(1), empty(1), bias)


def quantized_case(model: str, layout: str, ops: Any, format_name: str) -> Case:
    return Case(model, layout, ops, partial(weight_of, format_name=format_name))


def run_quantized(wheel: Path) -> dict[str, Any]:
    """Case -> recorded calls, or the traceback; and what is said to be replaced, by what is missing."""
    load(wheel)
    from ops.npu import NpuOps

    ops = NpuOps("meta")
    found: dict[str, Any] = {}
    with torch.no_grad():  # inference mode would hide the parts of composite operations
        for format_name in FORMATS:
            for model, layout in LAYOUTS:
                found |= run_case(f"{model}-{format_name}-{layout}", quantized_case(model, layout, ops, format_name))
        found["fallbacks"] = ops.fallbacks(torch.bfloat16, FORMATS)
        for name, uses in REPLACED.items():
            for format_name in FORMATS:
                ops = NpuOps("meta")
                ops.uses |= uses
                found |= run_case(f"{name}-{format_name}", quantized_case("30b", "1tp", ops, format_name))
        found["float16"] = ops.converted(Int8Weight(*int8_experts()), torch.float16).scales.dtype
    return found


def int8_experts() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(4, 256, 128, dtype=torch.int8, device=META), torch.empty(4, 256, 1, device=META)


def run_mutants(wheel: Path, sources: list[tuple[dict[str, str], list[tuple[str, str]]]]) -> list[dict[str, Any]]:
    """Calls of cases of some layouts for each mutated source of ops/npu, or the traceback."""
    load(wheel)
    results = []
    for changed, layouts in sources:
        found: dict[str, Any] = {}
        for format_name in FORMATS[:3]:
            for layout in layouts:
                case = f"{layout[0]}-{format_name}-{layout[1]}"
                try:
                    ops = backend_of(changed).NpuOps("meta")
                    with torch.no_grad():
                        found |= run_case(case, quantized_case(*layout, ops, format_name))
                except Exception:
                    found[f"{case}-decode8"] = traceback.format_exc()
        results.append(found)
    return results
