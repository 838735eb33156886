# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: requests are added and cancelled at any step; each step returns events with the new tokens.

Every rank runs the same schedulers on the same requests and takes the same decisions. Attention DP groups exchange only
their sampled tokens, in each step.

On devices that run asynchronously a step is launched before the host reads the tokens of the decode step before it. If
one of these tokens ends its sequence, the token that was computed after it is dropped, and the sequence's blocks are
freed when that step has been read.
"""

import time
from collections import deque
from dataclasses import dataclass

from executor.engine.kv_cache import copy_blocks, zero_blocks
from executor.engine.launched import Launched, RowResult, launch
from executor.engine.logits_processors import needs_host_tokens
from executor.engine.model_runner import Batches, ModelRunner
from executor.engine.sampler import Sampler
from executor.engine.scheduler import Scheduler
from executor.engine.sequence import Sequence
from executor.engine.text_stream import find_stop
from executor.loading.tokenizer import Tokenizer
from ops.comm import ParallelContext


@dataclass(frozen=True)
class TokenEvent:
    """A new token of a sequence, its end, or both. token_id: None if it was cancelled or its logits are not finite."""

    sequence: Sequence
    token_id: int | None
    position: int  # of the token in the output
    is_last: bool


class Engine:
    """Schedules, launches and reads steps; one scheduler per attention DP group.

    A sequence whose logits are not finite ends with "error"; the others go on.
    """

    def __init__(
        self,
        runner: ModelRunner,
        schedulers: list[Scheduler],
        parallel: ParallelContext,
        tokenizer: Tokenizer,
        runs_ahead: bool,
    ):
        """runs_ahead: whether a step may be launched before the tokens of the one before are read."""
        self.runner = runner
        self.schedulers = schedulers
        self.parallel = parallel
        self.tokenizer = tokenizer
        self.sampler = Sampler(tokenizer.eos_token_ids)
        self.runs_ahead = runs_ahead
        self.in_flight: deque[Launched] = deque()  # launched, not read; at most one between calls of `step`
        self.events: list[TokenEvent] = []  # of cancellations, for the next step
        self.is_stepping = False
        self.to_cancel: list[str] = []  # request ids, while a step is being prepared or read
        self.siblings: dict[int, list[Sequence]] = {}  # id of a first sample -> the others, until its prompt is cached

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        unfinished = any(scheduler.waiting or scheduler.running for scheduler in self.schedulers)
        return unfinished or bool(self.in_flight) or bool(self.events)

    def add(self, samples: list[Sequence], group: int | None = None) -> None:
        """Adds the samples of a request to the attention DP group with the least load, or to `group`.

        Samples after the first wait until its prompt is in the prefix cache.
        """
        first, *others = samples
        if group is None and len(self.schedulers) > 1:
            group = min(range(len(self.schedulers)), key=lambda index: self.schedulers[index].load)
        self.schedulers[group or 0].add(first)
        if others:
            self.siblings[id(first)] = others

    def cancel(self, request_id: str) -> None:
        """Ends a request's unfinished samples with "cancelled"; unknown and finished requests are ignored.

        Called during a step (by a mask, or by garbage collection that closes a stream), it takes effect at its end.
        """
        if self.is_stepping:
            self.to_cancel.append(request_id)
            return
        for scheduler in self.schedulers:
            for sequence in [*scheduler.running, *scheduler.waiting]:
                if sequence.request_id == request_id:
                    for sibling in self.siblings.pop(id(sequence), []):
                        sibling.finish_reason = "cancelled"
                        self.events.append(TokenEvent(sibling, None, 0, True))
                    scheduler.finish(sequence, "cancelled")
                    self.events.append(TokenEvent(sequence, None, len(sequence.token_ids), True))

    def abort(self) -> None:
        """Cancels all requests and drops the steps in flight, after an error or an interrupt; without events.

        A failed step may have written anything to the blocks of its sequences.
        """
        unfinished = [sequence for group in self.schedulers for sequence in [*group.running, *group.waiting]]
        for sequence in unfinished:
            sequence.is_suspect = True
        for sequence in unfinished:
            self.cancel(sequence.request_id)
        while self.in_flight:
            self._retire(self.in_flight.popleft())
        self.events.clear()

    def step(self) -> list[TokenEvent]:
        """Launches at most one step and reads at most one; returns the events."""
        assert not self.is_stepping, "one step at a time"
        self.is_stepping = True
        try:
            return self._step()
        finally:
            self.is_stepping = False
            to_cancel, self.to_cancel = self.to_cancel, []
            for request_id in to_cancel:
                self.cancel(request_id)

    def _step(self) -> list[TokenEvent]:
        events, self.events = self.events, []
        if self.in_flight and not self._may_run_ahead(self.in_flight[0]):
            events += self._read()
        batches = self._schedule()
        if batches is None:  # a sequence has to be preempted
            events += self._read()
            batches = self._schedule()
            assert batches is not None
        is_launched = any(batches)
        if is_launched:
            self.in_flight.append(self._launch(batches))
        while len(self.in_flight) > (is_launched and self.runs_ahead):
            events += self._read()
        return events

    def _may_run_ahead(self, unread: Launched) -> bool:
        """Whether the next step does not depend on the values of tokens that are only on the device.

        First tokens are read at once, so that they are not late by the launch of the next step.
        """
        return unread.is_decode and not any(
            needs_host_tokens(work.sequence.sampling) for batch in unread.batches for work in batch
        )

    def _schedule(self) -> Batches | None:
        others_decode = any(scheduler.has_decodes for scheduler in self.schedulers)
        may_preempt = not self.in_flight
        batches = [scheduler.schedule(others_decode, may_preempt) for scheduler in self.schedulers]
        return None if any(batch is None for batch in batches) else [batch or [] for batch in batches]

    def _launch(self, batches: Batches) -> Launched:
        to_zero, copies = [scheduler.pool.pop_changes() for scheduler in self.schedulers][self.runner.dp_index]
        if to_zero:
            zero_blocks(self.runner.kv_caches, to_zero)
        if copies:
            copy_blocks(self.runner.kv_caches, copies)
        now_s = time.perf_counter()
        previous = self.in_flight[0] if self.in_flight else None
        launched = launch(self.runner, self.sampler, self.parallel, batches, previous)
        for batch in batches:
            for work in batch:
                sequence = work.sequence
                sequence.started_s = sequence.started_s or now_s
                sequence.num_computed += work.num_new
                sequence.num_unread += work.samples
                sequence.num_in_flight += 1
        return launched

    def _retire(self, launched: Launched) -> None:
        """Counts a step as no longer in flight; frees the blocks of sequences that have ended and are in no other."""
        for scheduler, batch in zip(self.schedulers, launched.batches, strict=True):
            for work in batch:
                sequence = work.sequence
                sequence.num_in_flight -= 1
                sequence.num_unread -= work.samples
                if sequence.finish_reason and not sequence.num_in_flight:
                    scheduler.release(sequence)

    def _read(self) -> list[TokenEvent]:
        """Reads the oldest step in flight (host sync) and stores its results; returns the events."""
        launched = self.in_flight[0]
        results = launched.read()
        now_s = time.perf_counter()
        events = []
        for scheduler, batch, sampled in zip(self.schedulers, launched.batches, results, strict=True):
            for work, result in zip(batch, sampled, strict=True):
                sequence = work.sequence
                if not result.is_finite and not result.nothing_allowed:
                    sequence.is_suspect = True
                elif work.samples and not sequence.is_suspect and sequence.finish_reason != "error":
                    scheduler.register(sequence, work.end)
                if sequence.finish_reason:
                    continue
                sequence.prompt_logprobs += result.prompt_logprobs
                sequence.prompt_top_ids += result.prompt_top_ids
                if not result.is_finite:
                    sequence.nothing_allowed = result.nothing_allowed
                    scheduler.finish(sequence, "error")
                elif work.samples:
                    self._append(scheduler, sequence, result, now_s)
                if work.samples or sequence.finish_reason:
                    token_id = result.token_id if result.is_finite else None
                    position = len(sequence.token_ids) - (token_id is not None)
                    events.append(TokenEvent(sequence, token_id, position, sequence.finish_reason is not None))
                    scheduler.add_first(self.siblings.pop(id(sequence), []))
        self._retire(self.in_flight.popleft())
        return events

    def _append(self, scheduler: Scheduler, sequence: Sequence, result: RowResult, now_s: float) -> None:
        """Appends a sampled token; finishes the sequence if it was the last."""
        assert result.token_id is not None
        sequence.token_ids.append(result.token_id)
        sequence.token_times_s.append(now_s)
        if result.logprobs is not None:
            sequence.logprobs.append(result.logprobs)
            sequence.top_ids.append(result.top_ids)
        finish_reason = self._finish_reason(sequence)
        if finish_reason is not None:
            scheduler.finish(sequence, finish_reason)

    def _finish_reason(self, sequence: Sequence) -> str | None:
        """ "stop" at an end token or stop string, "length" at the token limit, None while it goes on."""
        sampling, last = sequence.sampling, sequence.token_ids[-1]
        if len(sequence.token_ids) >= sampling.min_tokens:
            ends = not sampling.ignore_eos and last in self.tokenizer.eos_token_ids
            if ends or last in sampling.stop_token_ids or (sampling.stop and self._ends_with_stop(sequence)):
                return "stop"
        return "length" if len(sequence.token_ids) >= sampling.max_new_tokens else None

    def _ends_with_stop(self, sequence: Sequence) -> bool:
        """Whether the newest token completed a stop string."""
        longest, count = max(len(stop) for stop in sequence.sampling.stop), 8
        tail = self.tokenizer.decode(sequence.token_ids[-count:])
        # tokens may have no text, and the first ones be parts of a character
        while len(tail.lstrip("\ufffd")) <= longest and count < len(sequence.token_ids):
            count *= 2
            tail = self.tokenizer.decode(sequence.token_ids[-count:])
        before = self.tokenizer.decode(sequence.token_ids[-count:-1])
        return any(find_stop(tail, before, stop) >= 0 for stop in sequence.sampling.stop)
