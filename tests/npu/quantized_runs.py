# SPDX-License-Identifier: Apache-2.0
"""Runs of quantised checkpoints on emulated operations; each function needs a process of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import executor.engine.graph_runner
import executor.loading.assembly
import executor.loading.exchanges
from executor import LLM, SamplingParams
from ops import GroupedRows, Routing, Weight
from ops.reference import ReferenceOps
from tests.npu.emulated import FREE, CalledOperations, emulate_communicators
from tests.npu.emulator import install
from tests.npu.emulator.registry import KERNELS

NEW_TOKENS = 6


def run_checkpoint(path: Path, token_ids: list[int], ops: Any = None, **settings: Any) -> dict[str, Any]:
    """Logits of a sequence, and greedy tokens of two prompts; ops: a backend other than the reference."""
    loaded = executor.loading.assembly.load_ops
    with (
        patch.object(executor.loading.assembly, "load_ops", lambda device: ops or loaded(device)),
        patch.object(executor.engine.graph_runner, "UNPADDED", 2),
    ):
        llm = LLM(path, "cpu", batch_size=4, cache_tokens=1024, input_max_len=256, **settings)
        prompts = [token_ids, token_ids[:7]]
        outputs = llm.generate(prompts, SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True))
        return {"logits": llm.logits(token_ids), "tokens": [output.token_ids for output in outputs]}


def run_emulated(
    wheel: str, product: str, folders: list[Path], token_ids: list[int], settings: dict[str, Any], graph: bool
) -> list[dict[str, Any]]:
    """`run_checkpoint` of each folder on `NpuOps`, in graph mode too, with what it used and calls by operation."""
    install(wheel, product)
    emulate_communicators()
    from ops.npu import NpuOps

    cost = executor.loading.exchanges.sent_bytes_per_token
    executor.loading.exchanges.sent_bytes_per_token = lambda *arguments: cost(*arguments) | {"all_to_all": FREE}
    found = []
    for folder in folders:
        ops = NpuOps("cpu")
        start = dict(ops.bindings)
        with CalledOperations() as called:
            results = run_checkpoint(folder, token_ids, ops, **settings)
        results |= {"called": dict(called.counts), "fallbacks": ops.fallbacks(torch.float16, ["w8a8"])}
        results |= {"bindings": {what: name for what, name in ops.bindings.items() if what not in start}}
        if graph:
            results["graph"] = run_checkpoint(folder, token_ids, NpuOps("cpu"), exe_mode="graph", **settings)["tokens"]
        found.append(results)
    return found


def edges(wheel: str) -> dict[str, Any]:
    """What the backend does with sizes and types at the edges, and where operations are missing."""
    install(wheel)
    import ops.npu.experts
    from ops.npu import NpuOps
    from ops.npu.quantized_probe import random_weight

    npu_ops, generator = NpuOps("cpu"), torch.Generator().manual_seed(0)

    def prepared(name: str, *shape: int, groups: int = 1, dtype: torch.dtype = torch.bfloat16) -> Weight:
        return npu_ops.prepare_weight(random_weight(name, shape, groups, generator), dtype)

    def error_of(function: Callable[..., Any], *arguments: Any) -> tuple[str, str]:
        with pytest.raises(Exception) as raised:
            function(*arguments)
        return raised.type.__name__, str(raised.value)

    formats = ("w8a8", "w8a8-static", "w4a16")
    linears = [prepared(name, 128, 256, groups=2) for name in formats]
    experts = [[prepared(name, 4, 256, 128), prepared(name, 4, 128, 128)] for name in ("w8a8", "w4a16")]
    norm = torch.ones(256, dtype=torch.bfloat16)
    none = torch.empty(0, 256, dtype=torch.bfloat16)
    found: dict[str, Any] = {
        "classes": [type(weight).__name__ for weight in (*linears, *(pair[0] for pair in experts))],
        "empty": [
            *(npu_ops.linear(none, weight).shape for weight in linears),
            *(npu_ops.norm_linear(none, none, norm, 1e-6, weight)[0].shape for weight in linears),
        ],
        "unknown": [
            error_of(npu_ops.linear, norm[None], experts[0][0]),
            error_of(npu_ops.linear, norm[None], experts[1][0]),
            error_of(npu_ops.linear, norm[None], object()),
            error_of(npu_ops.norm_linear, norm[None], norm[None], norm, 1e-6, experts[0][0]),
            error_of(npu_ops.grouped_linear, norm[None], linears[0], torch.tensor([1])),
            error_of(npu_ops.prepare_weight, linears[0], torch.bfloat16),
        ],
        "too wide": error_of(prepared, "w8a8-static", 65536, 8),
        "dequantised": [
            type(weight).__name__
            for weight in (prepared("w8a8", 65536, 16), prepared("w4a16", 12, 64), prepared("w4a16", 32, 96, groups=2))
        ],
        "fallbacks": npu_ops.fallbacks(torch.bfloat16, formats),
        "slope": slope(npu_ops),
    }
    hidden, rows = torch.randn(9, 128, generator=generator).bfloat16(), torch.randn(37, 128, generator=generator)
    ids = torch.rand(9, 4, generator=generator).topk(2).indices
    routings = [(hidden, Routing(torch.rand(9, 2, generator=generator), ids))]
    routings.append((rows.bfloat16(), GroupedRows(torch.tensor([11, 0, 20, 6]))))
    whole = [npu_ops.experts(*given, *pair) for given in routings for pair in experts]
    ops.npu.experts.MAX_EXPERT_ROWS = 7
    found["chunks"] = [npu_ops.experts(*given, *pair) for given in routings for pair in experts]
    return found | {"whole": whole}


def slope(npu_ops: Any) -> float:
    """Slope of the output of a norm and a static layer over the reference's: 1 if no scale is off."""
    generator = torch.Generator().manual_seed(1)
    from ops.npu.quantized_probe import random_weight

    weight = random_weight("w8a8-static", (512, 1024), 1, generator)
    hidden, residual = (torch.randn(16, 1024, generator=generator).bfloat16() for _ in range(2))
    norm = torch.ones(1024)
    prepared = npu_ops.prepare_weight(weight, torch.bfloat16)
    actual = npu_ops.norm_linear(hidden, residual, norm.bfloat16(), 1e-6, prepared)[0].float()
    expected = ReferenceOps().norm_linear(hidden.float(), residual.float(), norm, 1e-6, weight)[0]
    return float((actual * expected).sum() / expected.square().sum())


def missing(wheel: str, names: list[str]) -> dict[str, Any]:
    """Bindings and fallbacks after loading experts and linear layers of each format, with operations that fail."""
    for name in names:
        KERNELS[name] = KERNELS[name]._replace(function=fails)
    install(wheel)
    from ops.npu import NpuOps
    from ops.npu.quantized_probe import random_weight

    npu_ops, generator = NpuOps("cpu"), torch.Generator().manual_seed(0)
    before = set(npu_ops.bindings)
    for name in ("w8a8", "w8a8-static", "w4a16"):
        for shape in ((128, 128), (2, 128, 128)):
            if len(shape) == 2 or name != "w8a8-static":
                npu_ops.prepare_weight(random_weight(name, shape, 1, generator), torch.float16)
    bindings = {family: name for family, name in npu_ops.bindings.items() if family not in before}
    return {"bindings": bindings, "fallbacks": npu_ops.fallbacks(torch.float16, ["w8a8"])}


def fails() -> None:
    raise RuntimeError("not supported here")
