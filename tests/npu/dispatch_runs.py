# SPDX-License-Identifier: Apache-2.0
"""Runs of fused dispatch without a model; each needs a process of its own."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from executor.config import REPOSITORY, load_settings, resolve_path
from executor.loading.before_loading import load_config
from executor.loading.exchanges import dispatch_sizes, select_exchanges
from models.layers.expert_exchange import FusedExchange
from ops import Routing
from ops.ascend import ALGORITHMS, Algorithm, ExchangeSizes, choose_algorithms
from ops.comm import Group, ParallelContext, group_members, init_parallel
from ops.step import BLOCK_SIZE, NULL_BLOCK, Span, StepMetadata, step_inputs
from tests.npu.emulated import emulate_communicators
from tests.npu.emulator import install, set_product

CONFIGS = REPOSITORY / "models" / "qwen3_moe" / "config"
SIZES = ExchangeSizes(ranks=2, tokens=3, experts=8, top_k=2, hidden_size=1024)
CPU = torch.device("cpu")


class NamedGroup(Group):
    """A group without communication that has a communicator's name."""

    hccl_name = "emulated"  # type: ignore[assignment]


class Call(NamedTuple):
    """Arguments of a dispatch: expert ids [BS, K], mask [BS]."""

    ids: torch.Tensor
    mask: torch.Tensor


def context_of(rank: int, world_size: int, attn_tp: int) -> ParallelContext:
    groups = {}
    for name, blocks in group_members(world_size, attn_tp, 1, attn_tp, attn_tp).items():
        [ranks] = [ranks for ranks in blocks if rank in ranks]
        groups[name] = NamedGroup(name=name, ranks=ranks, index=ranks.index(rank))
    return ParallelContext(**groups, dispatch=groups["world"])


def step_of(tokens: int, rows: int, dp_num_tokens: list[int]) -> StepMetadata:
    """A decode step of `tokens` sequences, padded to `rows`."""
    spans = [Span(BLOCK_SIZE - 1 + index, 1, [1, 2], 1) for index in range(tokens)]
    spans += [Span(0, 1, [NULL_BLOCK], 1)] * (rows - tokens)
    return step_inputs(spans, [[]] * rows, CPU, dp_num_tokens=dp_num_tokens, is_decode=True)[1]


class Case(NamedTuple):
    """A decode step of a layout. tokens: of each attention DP group. padded: to equal rows, as a graph is."""

    yaml: str
    product: str
    tokens: list[int]
    padded: bool


class Found(NamedTuple):
    """Dispatch calls of every rank, the experts [T, K] that each group's tokens chose, and the sizes."""

    calls: list[Call]
    wanted: list[list[list[int]]]
    sizes: ExchangeSizes


def dispatch_all(wheel: str, cases: list[Case]) -> list[Found]:
    install(wheel)
    import ops.npu.exchange

    calls: list[Call] = []

    def dispatch(x: torch.Tensor, ids: torch.Tensor, *_: Any, x_active_mask: torch.Tensor, **__: Any) -> list[Any]:
        assert len(x) == len(ids) == len(x_active_mask)
        calls.append(Call(ids, x_active_mask))
        return [x] * 7

    ops.npu.exchange.npu = SimpleNamespace(npu_moe_distribute_dispatch_v2=dispatch)
    found = []
    for case in cases:
        calls.clear()
        wanted, sizes = dispatch_of_all_ranks(case)
        found.append(Found(list(calls), wanted, sizes))
    return found


def dispatch_of_all_ranks(case: Case) -> tuple[list[list[list[int]]], ExchangeSizes]:
    from ops.npu.exchange import DispatchPlan

    batch_size = len(case.tokens) * max(case.tokens)
    settings = load_settings(str(CONFIGS / case.yaml), [f"data_config.batch_size={batch_size}"])
    sizes = dispatch_sizes(settings, load_config(resolve_path(settings.model_path), None))
    assert sizes is not None
    attn_tp, rows = settings.parallel_config.attn_tp_size, case.tokens
    if case.padded:
        rows = [max(rows)] * len(rows)
    experts = [
        torch.stack([torch.randperm(sizes.experts)[: sizes.top_k] for _ in range(max(rows))]) for _ in case.tokens
    ]
    for rank in range(sizes.ranks):
        parallel, group = context_of(rank, sizes.ranks, attn_tp), rank // attn_tp
        pair = DispatchPlan(choose_algorithms(case.product, sizes)[0], sizes).make(parallel.dispatch)[0]
        pair.prepare(torch.bfloat16, CPU)
        exchange = FusedExchange(parallel, pair)
        step = step_of(case.tokens[group], rows[group], rows)
        exchange.begin(step)
        ids = experts[group][: rows[group]]
        hidden_states = torch.zeros(rows[group], sizes.hidden_size, dtype=torch.bfloat16)
        exchange.dispatch(hidden_states, Routing(torch.rand(ids.shape), ids), step)
    return [ids[:count].tolist() for ids, count in zip(experts, case.tokens, strict=True)], sizes


def two_ranks(wheel: str, replaced: dict[str, Any]) -> dict[str, Any]:
    """Exchange that two ranks of A3 select for decode steps, and what the start-up calls dispatched.

    replaced: functions that take the vendor operation and its arguments, by the name of the operation.
    """
    install(wheel, "A3")
    emulate_communicators()
    import ops.npu.exchange
    from ops.npu import NpuOps

    real, calls = ops.npu.exchange.npu, []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            operation = getattr(real, name)
            return lambda *given, **named: self.call(name, operation, given, named)

        def call(self, name: str, operation: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
            if "dispatch" in name:
                calls.append((named["comm_alg"], len(given[0]), int(named["x_active_mask"].sum())))
            return replaced[name](operation, *given, **named) if name in replaced else operation(*given, **named)

    ops.npu.exchange.npu = Watched()
    parallel = init_parallel(CPU, 1, 1, 1, 1, with_dispatch=True)
    settings: Any = SimpleNamespace(model_config=SimpleNamespace(dtype="bfloat16"), exe_mode="eager")
    config: Any = SimpleNamespace(num_experts=SIZES.experts, num_experts_per_tok=SIZES.top_k, hidden_size=1024)
    npu_ops = NpuOps("cpu")
    plan = npu_ops.plan_dispatch(SIZES)
    exchange: Any = select_exchanges(settings, config, parallel, npu_ops, plan, CPU)[False]
    name = exchange.pair.name if isinstance(exchange, FusedExchange) else type(exchange).__name__
    return {"name": name, "calls": calls}


def refuses_masks(operation: Any, *given: Any, **named: Any) -> Any:
    """fullmesh_v2 of CANN 8.5, whose host code refuses x_active_mask."""
    if named["comm_alg"] == "fullmesh_v2" and named["x_active_mask"] is not None:
        raise RuntimeError("call aclnnMoeDistributeDispatchV3 failed\ndetails")
    return operation(*given, **named)


def swaps_tokens(operation: Any, *given: Any, **named: Any) -> torch.Tensor:
    return operation(*given, **named).flip(0)


def many_ranks(wheel: str, ranks: int) -> dict[str, list[bool]]:
    """Whether tokens come back on each rank, by product and algorithm. Ranks are threads, too many for processes."""
    install(wheel)
    found = {}
    with patch.dict("os.environ", HCCL_BUFFSIZE="1000"):
        for product, algorithms in ALGORITHMS.items():
            set_product(product)
            for algorithm in algorithms:
                found[f"{product} {algorithm.name}"] = trial_of_threads(algorithm, ranks)
    return found


def trial_of_threads(algorithm: Algorithm, ranks: int) -> list[bool]:
    from ops.npu.exchange import DispatchCombine
    from tests.npu.emulator import exchange

    shares: list[Any] = [None] * ranks
    barrier = threading.Barrier(ranks, timeout=60)

    def gather(group: str, value: Any) -> list[Any]:
        shares[int(group)] = value
        barrier.wait()
        everyone = list(shares)
        barrier.wait()
        return everyone

    def trial(rank: int) -> bool:
        group: Any = SimpleNamespace(hccl_name=str(rank), index=rank)
        return DispatchCombine(algorithm, sizes, group).works(torch.bfloat16, CPU)

    sizes = ExchangeSizes(ranks=ranks, tokens=3, experts=128, top_k=8, hidden_size=1024)
    changes = {"gather": gather, "group_of": str, "_require_member": lambda *_: None, "_dispatched": {}}
    with patch.multiple(exchange, **changes), ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(trial, range(ranks)))
