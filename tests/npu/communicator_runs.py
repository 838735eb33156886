# SPDX-License-Identifier: Apache-2.0
"""Modes of HCCL communicators; each run needs a process of its own."""

import dataclasses
import os
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

import ops.comm
from ops.ascend import ExchangeSizes
from ops.comm import gather_texts
from tests.npu.emulator import install, set_product


class Options:
    """Stands for ProcessGroupHCCL.Options."""

    def __init__(self) -> None:
        self.hccl_config: dict[str, Any] = {}


class Case(NamedTuple):
    """A job. layout: world size, attn_tp, moe_tp, embed_tp, lmhead_tp. super_nodes: of its ranks. given: variables."""

    product: str
    layout: tuple[int, ...]
    super_nodes: str = "aaaa"
    given: dict[str, str] = {}


class Found(NamedTuple):
    """For each rank: what each of its groups is (ranks, the mode asked of HCCL); and the warnings."""

    groups: list[dict[str, tuple[tuple[int, ...], int | None]]]
    warnings: list[str]


def run_all(wheel: str, cases: list[Case], super_nodes: list[str]) -> tuple[list[Found], list[list[str]]]:
    """What each case finds, and the dispatch algorithms for each list of the ranks' super-nodes."""
    install(wheel).__dict__["_C"] = SimpleNamespace(
        _distributed_c10d=SimpleNamespace(ProcessGroupHCCL=SimpleNamespace(Options=Options))
    )
    return list(map(modes, cases)), list(map(algorithms, super_nodes))


def modes(case: Case) -> Found:
    from ops.npu import communicators

    def new_group(ranks: tuple[int, ...], timeout: Any, pg_options: Options | None = None) -> Any:
        mode = None if pg_options is None else pg_options.hccl_config["hccl_op_expansion_mode"]
        made.append((ranks, mode))
        return len(made) - 1

    found = Found([], [])
    set_product(case.product)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: True)
        patch.setattr(dist, "new_group", new_group)
        patch.setattr(ops.comm, "group_options", lambda device: communicators.group_options())
        patch.setattr(communicators, "super_nodes", lambda: list(case.super_nodes))
        patch.setattr(communicators.logger, "warning", lambda text, *values: found.warnings.append(text % values))
        for name in ("HCCL_OP_EXPANSION_MODE", "HCCL_EXEC_TIMEOUT"):
            patch.delenv(name, raising=False)
        for name, value in (case.given | {"WORLD_SIZE": str(case.layout[0])}).items():
            patch.setenv(name, value)
        for rank in range(case.layout[0]):
            made: list[Any] = []
            patch.setenv("RANK", str(rank))
            context = ops.comm.init_parallel(torch.device("cpu"), *case.layout[1:], with_dispatch=True)
            groups = {field.name: getattr(context, field.name) for field in dataclasses.fields(context)}
            found.groups.append({name: made[group.process_group] for name, group in groups.items() if group.size > 1})
    return found


def algorithms(super_nodes: str) -> list[str]:
    import ops.npu

    set_product("A3")
    sizes = ExchangeSizes(ranks=len(super_nodes), tokens=4, experts=128, top_k=8, hidden_size=2048)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops.npu, "super_nodes", lambda: list(super_nodes))
        plan = ops.npu.NpuOps("cpu").plan_dispatch(sizes)
    return [] if plan is None else [algorithm.name for algorithm in plan.algorithms]


def texts_of_ranks() -> list[list[str]]:
    """Two exchanges before the process groups exist, which the same store then makes."""
    rank = os.environ["RANK"]
    texts = [gather_texts("first", f"of {rank}"), gather_texts("second", "" if rank == "0" else "Zürich")]
    parallel = ops.comm.init_parallel(torch.device("cpu"), 1, 1, 1, 1)
    total = parallel.world.all_reduce(torch.ones(1))
    return [*texts, [f"{total.item():g}"]]
