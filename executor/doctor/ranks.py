# SPDX-License-Identifier: Apache-2.0
"""Comparisons and times of what ranks exchange: collectives, and dispatch and combine of the experts.

Every rank makes the inputs of all ranks from their seeds, and so knows the right result without communication.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from executor.doctor.findings import ROUNDED_OFTEN, TOKENS, Context, Finding
from executor.doctor.host import compare_ports
from executor.doctor.inputs import DTYPE, Shapes
from executor.loading.device import synchronize
from ops.ascend import ExchangeSizes
from ops.comm import Group, ParallelContext, gather_json, host_group, init_parallel
from ops.npu import NpuOps

UNEQUAL = (8, 0, 3, 5)  # tokens of ranks 0, 1, 2, 3, and again of those after them
WARM_UP, TIMED = 3, 20  # calls
MAY_DIFFER = {"free memory", "environment"}  # facts of a rank; the environment in HCCL_IF_IP


class Ranks:
    """The process groups of this rank, and a CPU group on which ranks compare their findings.

    Collective: all ranks must create it, and call its methods in the same order.
    """

    def __init__(self, ops: NpuOps, device: torch.device, shapes: Shapes, size: int):
        sizes = ExchangeSizes(
            ranks=size,
            tokens=max(UNEQUAL),
            experts=shapes.num_experts,
            top_k=shapes.top_k,
            hidden_size=shapes.hidden_size,
        )
        self.plan = ops.plan_dispatch(sizes)
        if self.plan is not None:
            self.plan.set_environment()  # before the communicators are made
        self.parallel: ParallelContext = init_parallel(device, size, 1, 1, 1, with_dispatch=self.plan is not None)
        self.device = device
        self.host = host_group()

    @property
    def world(self) -> Group:
        return self.parallel.world

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, which JSON must be able to hold, in rank order."""
        return gather_json(value, self.host)

    def worst(self, findings: list[Finding]) -> list[Finding]:
        """For each comparison the worst finding of any rank, whose case names a rank other than 0; the longest time."""
        found: dict[tuple[str, str, str], Finding] = {}
        for rank, of_rank in enumerate(self.gather([dataclasses.asdict(finding) for finding in findings])):
            for finding in (Finding(**fields) for fields in of_rank):
                key = (finding.operation, finding.variant, finding.case)
                worst = found.setdefault(key, finding)
                longest = max((time for time in (worst.time_ms, finding.time_ms) if time is not None), default=None)
                if finding.severity > worst.severity:
                    worst = dataclasses.replace(finding, case=f"{finding.case}, rank {rank}")
                found[key] = dataclasses.replace(worst, time_ms=longest)
        return list(found.values())

    def compare_machines(self, machine: dict[str, str]) -> Iterator[Finding]:
        """Yields a finding for each fact about the machine: whether all ranks have rank 0's."""
        everywhere = self.gather(machine)
        for name in [name for name in machine if name not in MAY_DIFFER]:
            values = [facts[name] for facts in everywhere]
            other = next((rank for rank, value in enumerate(values) if value != values[0]), 0)
            problem = f"rank {other} has {values[other]}, rank 0 {values[0]}" if other else ""
            yield Finding("ranks", name, "the same everywhere", None if other else 0.0, 0.0, problem)


class Comparison(NamedTuple):
    """One operation on one input. `timed` runs on zeros in place of the input: sums of them stay finite."""

    operation: str
    case: str
    call: Callable[[torch.Tensor], torch.Tensor]
    given: torch.Tensor  # float32, on the CPU
    expected: torch.Tensor
    timed: Callable[[torch.Tensor], torch.Tensor]


def compare_job(ranks: Ranks, ops: NpuOps, machine: dict[str, str], shapes: Shapes) -> Iterator[Finding]:
    """Yields this rank's findings on ports, differences between machines, and what the ranks exchange."""
    yield from compare_ports()
    yield from ranks.compare_machines(machine)
    yield from compare_ranks(ranks, Context(ops, ranks.device, shapes))


def compare_ranks(ranks: Ranks, context: Context) -> Iterator[Finding]:
    """Yields this rank's findings; ends after the first that fails on any rank, as the others would wait for it."""
    for compared in itertools.chain(collectives(ranks.parallel, context), exchange(ranks, context)):
        if isinstance(compared, Finding):
            yield compared
            continue
        operation, case, call, given, expected, timed = compared
        moved = context.inputs.to_device(given)
        zeros = torch.zeros_like(moved)
        run = functools.partial(lambda call, moved, expected: (call(moved), expected), call, moved, expected)
        finding = context.compare("communication", operation, case, run, ROUNDED_OFTEN)
        if any(error is None for error in ranks.gather(finding.error)):
            yield finding
            return
        yield dataclasses.replace(finding, time_ms=mean_ms(functools.partial(timed, zeros), ranks.device))


def mean_ms(call: Callable[[], Any], device: torch.device) -> float:
    """Mean time of one of TIMED calls in a row, in ms."""
    for _ in range(WARM_UP):
        call()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(TIMED):
        call()
    synchronize(device)
    return (time.perf_counter() - started) * 1e3 / TIMED


def rows_of(rank: int, *shape: int) -> torch.Tensor:
    """The input of a rank: normally distributed, exact in bfloat16."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(DTYPE).float()


def collectives(parallel: ParallelContext, context: Context) -> Iterator[Comparison]:
    """The collectives of a step, of which all-to-all has unequal parts, some of them empty."""
    world = parallel.world
    size, me, hidden = world.size, world.index, context.shapes.hidden_size
    for tokens in TOKENS:
        parts = [[(source + 2 * target) % 3 * tokens for target in range(size)] for source in range(size)]
        send, receive = parts[me], [part[me] for part in parts]
        exchange_rows = functools.partial(world.all_to_all, send=send, receive=receive)
        everywhere = [rows_of(rank, tokens, hidden) for rank in range(size)]
        longer = [rows_of(rank, size * tokens, hidden) for rank in range(size)]
        sent = [rows_of(rank, sum(part), hidden).split(part) for rank, part in enumerate(parts)]
        for operation, call, given, expected in (
            ("all_reduce", parallel.attn_tp.all_reduce, everywhere[me], torch.stack(everywhere).sum(0)),
            ("all_gather", world.all_gather, everywhere[me], torch.cat(everywhere)),
            ("reduce_scatter", world.reduce_scatter, longer[me], torch.stack(longer).sum(0).chunk(size)[me]),
            ("all_to_all", exchange_rows, torch.cat(sent[me]), torch.cat([part[me] for part in sent])),
        ):
            yield Comparison(operation, f"{tokens} tokens", call, given, expected, call)


def exchange(ranks: Ranks, context: Context) -> Iterator[Comparison | Finding]:
    """Dispatch and combine around experts that scale their rows; the ranks have equal numbers of tokens, or unequal.

    An algorithm of which the start-up call fails on a rank is not relied on: the ranks take the next, or gather.
    """
    shapes, me, device = context.shapes, ranks.world.index, ranks.device
    scales = 0.5 + 2 * torch.rand(shapes.num_experts, generator=torch.Generator().manual_seed(0))
    scales = scales.to(DTYPE).float()
    group = ranks.parallel.dispatch
    for pair in ranks.plan.make(group) if ranks.plan is not None and group is not None else ():
        refusing = [rank for rank, works in enumerate(ranks.gather(pair.works(DTYPE, device))) if not works]
        if refusing:
            problem = f"the start-up call fails on rank {refusing[0]}"
            yield Finding("communication", pair.name, "start-up call", None, 0.0, problem, relied_on=False)
            continue
        for case, counts in (("1 token", (1,)), ("8 tokens", (8,)), ("0 to 8 tokens", UNEQUAL)):
            tokens = [counts[rank % len(counts)] for rank in range(ranks.world.size)]
            hidden = rows_of(me, tokens[me], shapes.hidden_size)
            scores, ids = rows_of(me, tokens[me], shapes.num_experts).topk(shapes.top_k)
            weights = scores.softmax(dim=-1)
            is_token = torch.arange(max(tokens), device=device) < tokens[me]
            dispatch = functools.partial(
                pair.dispatch, topk_ids=ids.to(device), topk_weights=weights.to(device), is_token=is_token
            )
            expected = hidden * (weights * scales[ids]).sum(dim=-1, keepdim=True)
            own_scales = scales.chunk(ranks.world.size)[me].to(device, DTYPE)
            experts = functools.partial(scale_rows, own_scales)
            call = functools.partial(there_and_back, pair, dispatch, experts)
            timed = functools.partial(there_and_back, pair, dispatch, lambda rows, counts: rows)
            yield Comparison(pair.name, case, call, hidden, expected, timed)


def scale_rows(scales: torch.Tensor, rows: torch.Tensor, tokens_per_expert: torch.Tensor) -> torch.Tensor:
    """Multiplies the rows of each expert by its scale; those past the counts stay."""
    of_rows = scales.repeat_interleave(tokens_per_expert)[:, None]
    return torch.cat([rows[: len(of_rows)] * of_rows, rows[len(of_rows) :]])


def there_and_back(
    pair: Any,
    dispatch: Callable[..., Any],
    experts: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    given: torch.Tensor,
) -> torch.Tensor:
    rows, tokens_per_expert, sent = dispatch(given)
    return pair.combine(experts(rows, tokens_per_expert), sent)
