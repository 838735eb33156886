# SPDX-License-Identifier: Apache-2.0
"""Predicted time per token on Ascend NPUs, from the recorded calls of a decode step. Nothing here was measured on one.

device  = bytes read / bandwidth + launches * KERNEL_US + collectives * COLLECTIVE_US
graph   = the longer of device and layers * UPDATE_US
eager   = the longer of device and (launches + collectives) * HOST_US

python -m tests.npu.predicted_times     prints the rows of the table of docs/npu.md
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from executor.bench.floor import is_experts
from executor.loading.before_loading import load_config
from ops.step import BLOCK_SIZE
from tests.npu.meta_run import MODELS, Case, MetaGroup
from tests.npu.schemas import ROOT, load
from tests.npu.wheels import VERSIONS, wheel
from tests.parallel.ranks import run_ranks

BANDWIDTH = 1.1e12  # bytes per second that a die reads; 1.6 TB/s on paper
KERNEL_US = 4  # of a kernel, beyond reading its bytes
COLLECTIVE_US = 15  # of an all_reduce of a few tokens
HOST_US = 16  # of a launch, on the host
UPDATE_US = 100  # of a layer in NPUGraph.update, on the host (tests/npu/graph_update_time.py)
CACHED_TOKENS = 1024
ROWS = (("30b", "1tp"), ("30b", "2tp"), ("235b", "16tp"))
BATCH_SIZES = (1, 8)
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")


class Step(NamedTuple):
    """What one rank does in a decode step."""

    layers: int
    layer_launches: int
    launches: int
    collectives: int
    read_bytes: float

    @property
    def device_ms(self) -> float:
        us = self.launches * KERNEL_US + self.collectives * COLLECTIVE_US
        return self.read_bytes / BANDWIDTH * 1e3 + us / 1e3

    @property
    def graph_ms(self) -> float:
        return max(self.device_ms, self.layers * UPDATE_US / 1e3)

    @property
    def eager_ms(self) -> float:
        return max(self.device_ms, (self.launches + self.collectives) * HOST_US / 1e3)


def record_steps(file: Path) -> dict[tuple[str, str, int], tuple[Step, Step]]:
    """The steps of ROWS and BATCH_SIZES under a wheel's schemas: with a call for each part of FusedQkv, as not every
    CANN has attention on tiled caches, and with the fused operation. Needs a process of its own."""
    load(file)
    from ops.npu import NpuOps

    ops = NpuOps("meta")
    found: dict[bool, dict[tuple[str, str, int], Step]] = {False: {}, True: {}}
    fused = ops.fused_qkv
    with torch.no_grad():
        for is_fused, steps in found.items():
            ops.fused_qkv = fused if is_fused else None
            for row in ROWS:
                case = Case(*row, ops)
                steps |= {(*row, batch): record(row[0], case, batch) for batch in BATCH_SIZES}
    return {key: (step, found[True][key]) for key, step in found[False].items()}


def record(model: str, case: Case, batch: int) -> Step:
    """Counts a layer and a step of two, and extends them to all layers."""
    config = load_config(ROOT / "models/qwen3_moe/shapes" / MODELS[model], None)
    layer, layer_collectives = counted(lambda: case.run_layer(f"decode{batch}"))
    step, step_collectives = counted(lambda: case.run(f"decode{batch}"))
    more = config.num_hidden_layers - 2
    sizes = {name: value.nbytes for name, value in case.parameters.values.items()}
    in_layers = {name: size for name, size in sizes.items() if name.startswith("layers.")}
    scale = config.num_hidden_layers / 2
    experts = sum(size for name, size in in_layers.items() if is_experts(name)) * scale
    others = sum(in_layers.values()) * scale - experts + sizes["lm_head.weight"]
    unread = (1 - config.num_experts_per_tok / config.num_experts) ** batch  # share of the experts, routed at random
    cache = batch * CACHED_TOKENS * 2 * case.caches[0][0][0].nbytes / BLOCK_SIZE * config.num_hidden_layers
    return Step(
        layers=config.num_hidden_layers,
        layer_launches=layer,
        launches=step + more * layer,
        collectives=step_collectives + more * layer_collectives,
        read_bytes=others + experts * (1 - unread) + cache,
    )


def counted(run: Callable[[], list[dict[str, Any]]]) -> tuple[int, int]:
    """Launches and collectives of a run."""
    calls = []
    kept = {name: getattr(MetaGroup, name) for name in COLLECTIVES}

    def counting(name: str) -> Callable[..., Any]:
        def collective(group: MetaGroup, *arguments: Any) -> Any:
            if group.size > 1:
                calls.append(name)
            return kept[name](group, *arguments)

        return collective

    try:
        for name in COLLECTIVES:
            setattr(MetaGroup, name, counting(name))
        return sum(call["launches"] for call in run()), len(calls)
    finally:
        for name, method in kept.items():
            setattr(MetaGroup, name, method)


def table_rows(steps: dict[tuple[str, str, int], tuple[Step, Step]]) -> list[str]:
    """Rows of the table: layout, batch, launches a layer, GB read, ms in graph mode and eager; fused after a slash."""
    rows = []
    for (model, layout, batch), (parts, fused) in steps.items():
        launches = f"{parts.layer_launches}/{fused.layer_launches}"
        graph = f"{parts.graph_ms:.1f}/{fused.graph_ms:.1f}"
        eager = f"{parts.eager_ms:.1f}/{fused.eager_ms:.1f}"
        rows.append(f"|`qwen3_{model}_{layout}`|{batch}|{launches}|{parts.read_bytes / 1e9:.1f}|{graph}|{eager}|")
    return rows


if __name__ == "__main__":
    file = wheel(VERSIONS[0])
    assert file is not None, "no wheel in the cache and no package index"
    with tempfile.TemporaryDirectory() as folder:
        print("\n".join(table_rows(run_ranks(1, record_steps, Path(folder), file)[0])))
