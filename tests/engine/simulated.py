# SPDX-License-Identifier: Apache-2.0
"""An engine whose steps compute nothing: tokens are random, and a model of the KV cache checks every access."""

import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from executor.engine.block_pool import BlockPool
from executor.engine.engine import Engine, TokenEvent
from executor.engine.launched import RowResult
from executor.engine.model_runner import Batches, is_decode
from executor.engine.scheduler import Scheduled, Scheduler
from executor.engine.sequence import Sequence
from executor.sampling_params import SamplingParams
from ops.step import BLOCK_SIZE, NULL_BLOCK, blocks_for

END = 0  # token that ends a sequence; sampled only where a test asks for it
NOT_FINITE = object()


@dataclass
class Step:
    """A step in flight."""

    batches: Batches
    results: list[list[RowResult]]
    run: "Simulated"

    @property
    def is_decode(self) -> bool:
        return is_decode(self.batches)

    def read(self) -> list[list[RowResult]]:
        self.run.fail_in("read")
        return self.results


@dataclass
class Simulated:
    """Engine of `num_groups` attention DP groups on the rank of the first one, whose cache is modelled.

    `slots` holds for each cache slot what was computed there: a hash of the token and of all before it.
    """

    num_blocks: int = 100
    num_groups: int = 1
    max_sequences: int = 8
    max_step_tokens: int = 8192
    chunk_tokens: int = 2048
    prefix_cache: bool = True
    runs_ahead: bool = False
    failing: str | None = None  # "launch" or "read": what raises an error from now on
    steps: list[Batches] = field(default_factory=list)
    ahead: list[bool] = field(default_factory=list)  # whether the tokens of the step before were unread

    def __post_init__(self) -> None:
        limits = (self.max_sequences, self.max_step_tokens, self.chunk_tokens, self.prefix_cache)
        schedulers = [Scheduler(BlockPool(self.num_blocks), *limits) for _ in range(self.num_groups)]
        tokenizer: Any = SimpleNamespace(eos_token_ids=frozenset({END}))
        runner: Any = SimpleNamespace(dp_index=0, kv_caches=self, launch=self.launch)
        parallel: Any = None
        self.engine = Engine(runner, schedulers, parallel, tokenizer, self.runs_ahead)
        self.slots: list[list[Any]] = [[None] * BLOCK_SIZE for _ in range(self.num_blocks + 1)]
        self.tokens: dict[int, list[int]] = {}  # id of a sequence -> prompt and output, read or not
        self.hashes: dict[int, list[int]] = {}  # id of a sequence -> of each token and those before it
        self.special: dict[int, dict[int, Any]] = {}  # id of a sequence -> index of a new token -> END, NOT_FINITE
        self.kept: list[Sequence] = []  # so that ids stay unique

    @property
    def scheduler(self) -> Scheduler:
        return self.engine.schedulers[0]

    def add(self, prompt: int | list[int], new_tokens: int, special: dict[int, Any] | None = None, **more: Any) -> Any:
        """Adds a request; prompt: token ids, or a number of random ones. Returns its sequence, or all of its `n`."""
        token_ids = random_tokens(prompt) if isinstance(prompt, int) else prompt
        sampling = SamplingParams(max_new_tokens=new_tokens, n=more.pop("n", 1))
        name = f"request {len(self.kept)}"
        samples = [
            Sequence(request_id=name, sample=sample, prompt_token_ids=token_ids, sampling=sampling)
            for sample in range(sampling.n)
        ]
        for sequence in samples:
            self.kept.append(sequence)
            self.tokens[id(sequence)] = list(token_ids)
            self.hashes[id(sequence)] = []
            self.special[id(sequence)] = special or {}
        self.engine.add(samples, **more)
        return samples[0] if len(samples) == 1 else samples

    def run(self, max_steps: int = 10_000) -> list[TokenEvent]:
        """Steps until nothing is left to do; returns all events."""
        events = []
        for _ in range(max_steps):
            if not self.engine.has_work:
                return events
            events += self.engine.step()
        raise AssertionError("it does not end")

    def launch(self, batches: Batches, previous: Step | None) -> Step:
        self.steps.append(batches)
        self.ahead.append(previous is not None)
        results = [[self.compute(work, group, previous) for work in batch] for group, batch in enumerate(batches)]
        self.fail_in("launch")
        return Step(batches, results, self)

    def fail_in(self, part: str) -> None:
        if self.failing == part:
            raise RuntimeError("the device is gone")

    def compute(self, work: Scheduled, group: int, previous: Step | None) -> RowResult:
        """Checks and writes the cache of a scheduled sequence; samples its next token."""
        sequence, token_ids = work.sequence, self.tokens[id(work.sequence)]
        assert sequence.finish_reason is None and work.num_computed == sequence.num_computed
        assert work.num_new > 0 and work.samples == (work.end == len(token_ids))
        if len(sequence.tokens(work.num_computed, work.end)) < work.num_new:  # its input is the unread token
            assert work.num_new == 1 and previous is not None
            assert any(other.sequence is sequence and other.samples for other in previous.batches[group])
        index = len(token_ids) - len(sequence.prompt_token_ids)
        special = self.special[id(sequence)].get(index)
        is_finite = special is not NOT_FINITE and NOT_FINITE not in token_ids and self.failing is None
        if group == 0:
            self.write(work, token_ids, is_finite)
        if not work.samples:
            return RowResult()
        token_ids.append(random.randrange(1, 1000) if special is None else special)
        if NOT_FINITE in token_ids:
            return RowResult(token_id=7, is_finite=False)
        return RowResult(token_id=token_ids[-1])

    def write(self, work: Scheduled, token_ids: list[int], is_finite: bool) -> None:
        pool, blocks = self.scheduler.pool, work.sequence.blocks
        assert len(blocks) >= blocks_for(work.end) and NULL_BLOCK not in blocks and len(set(blocks)) == len(blocks)
        assert all(pool.references[block] > 0 and block not in pool.free for block in blocks)
        hashes = self.hashes[id(work.sequence)]
        for token_id in token_ids[len(hashes) : work.end]:
            hashes.append(hash((hashes[-1] if hashes else 0, token_id)))
        for index, block in enumerate(blocks[: blocks_for(work.end)]):
            first = index * BLOCK_SIZE
            old, end = (min(max(0, count - first), BLOCK_SIZE) for count in (work.num_computed, work.end))
            if is_finite:  # attention reads masked positions, too
                assert self.slots[block][:old] == hashes[first : first + old], "it holds other tokens"
                assert NOT_FINITE not in self.slots[block]
            if old < end:
                assert pool.references[block] == 1, "writes to a shared block"
                written = hashes[first + old : first + end] if is_finite else [NOT_FINITE] * (end - old)
                self.slots[block][old:end] = written

    def zero(self, blocks: list[int]) -> None:
        for block in blocks:
            assert self.scheduler.pool.references[block] <= 1
            self.slots[block] = [None] * BLOCK_SIZE

    def copy(self, copies: list[tuple[int, int]]) -> None:
        for source, target in copies:
            assert self.scheduler.pool.references[target] == 1
            self.slots[target] = list(self.slots[source])

    def assert_all_free(self) -> None:
        for scheduler in self.engine.schedulers:
            assert not scheduler.running and not scheduler.waiting
            assert not any(scheduler.pool.references) and scheduler.pool.num_free == self.num_blocks
        assert not self.engine.siblings


def random_tokens(count: int, other_than: int = 0) -> list[int]:
    """Random tokens, of which the first is not `other_than`."""
    tokens = [random.randrange(1, 1000) for _ in range(count)]
    if count and tokens[0] == other_than:
        tokens[0] = other_than % 999 + 1
    return tokens


def simulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets engines on a simulated runner launch its steps."""
    monkeypatch.setattr(
        "executor.engine.engine.launch",
        lambda runner, sampler, parallel, batches, previous: runner.launch(batches, previous),
    )
    monkeypatch.setattr("executor.engine.engine.zero_blocks", lambda simulated, blocks: simulated.zero(blocks))
    monkeypatch.setattr("executor.engine.engine.copy_blocks", lambda simulated, copies: simulated.copy(copies))
