# SPDX-License-Identifier: Apache-2.0
"""The loop: start what waits, prefill it, decode what runs, finish what ended.

Every rank keeps the books of all requests and takes the same decisions, so that nobody has to be told what comes next;
what a rank cannot know, the tokens of other groups of attention ranks, is exchanged after each step.

A device works while the host goes on, so a decode step is started before the tokens of the one before are read. If
these end a text, that step has computed one token too many for it, which is dropped.
"""

import time
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from executor.model_runner import Batches, ModelRunner
from executor.sampler import sample
from executor.scheduler import Scheduler, Sequence
from executor.tokenizer import Tokenizer
from models.layers.lm_head import ShardedLogits
from ops.comm import ParallelContext


class ChosenTokens:
    """The next token of each sequence of a step: on the device at once, on the host when it is asked for them."""

    def __init__(self, batches: Batches, on_device: torch.Tensor):
        """on_device [G, R] int64: of every group of attention ranks, padded to the largest batch."""
        self.batches = batches
        self.on_device = on_device
        self.on_host = on_device.to("cpu", non_blocking=True)
        self.copied = torch.get_device_module(on_device.device).Event()
        self.copied.record()

    def read(self) -> list[list[int]]:
        """Waits for the step, not for one started after it."""
        self.copied.synchronize()
        return [row[: len(batch)] for row, batch in zip(self.on_host.tolist(), self.batches, strict=True)]


class Engine:
    """Runs sequences to their end, several at a time; one scheduler for each group of attention ranks."""

    def __init__(
        self, runner: ModelRunner, schedulers: list[Scheduler], parallel: ParallelContext, tokenizer: Tokenizer
    ):
        self.runner = runner
        self.schedulers = schedulers
        self.parallel = parallel
        self.tokenizer = tokenizer
        # a CPU's step is over when it has been started; starting one on an NPU waits for the one before
        self.runs_ahead = runner.device.type == "cuda"
        self.unread: ChosenTokens | None = None  # of a decode step

    def run(self, sequences: list[Sequence]) -> Iterator[Sequence]:
        """Yields every sequence when it has finished. The groups get sequences in turn."""
        self.check_idle()
        for number, sequence in enumerate(sequences):
            self.schedulers[number % len(self.schedulers)].add(sequence)
        try:
            while self.busy():
                yield from self.step()
        finally:  # an abandoned or failed run leaves no sequence behind for the next one
            self.unread = None
            for scheduler in self.schedulers:
                scheduler.clear()

    def busy(self) -> bool:
        return any(scheduler.waiting or scheduler.running for scheduler in self.schedulers)

    def check_idle(self) -> None:
        """RuntimeError while a run is under way: two would get each other's sequences."""
        if self.busy():
            raise RuntimeError("another run is under way: finish or close it first")

    def step(self) -> list[Sequence]:
        """Starts at most one step and reads at most one step's tokens; returns the sequences that these finished."""
        unread, self.unread = self.unread, None
        if unread is None:
            started_s = time.perf_counter()
            batches = [scheduler.start_waiting() for scheduler in self.schedulers]
            if any(batches):
                for sequence in sum(batches, []):
                    sequence.started_s = started_s
                return self.read(self.choose(self.runner.prefill(batches), batches))
            batches = [list(scheduler.running) for scheduler in self.schedulers]
            self.unread = self.choose(self.runner.decode(batches), batches)
            return []
        if self.goes_on(unread):
            latest = unread.on_device[self.runner.dp_index, : len(unread.batches[self.runner.dp_index])]
            self.unread = self.choose(self.runner.decode(unread.batches, latest), unread.batches)
        return self.read(unread)

    def goes_on(self, unread: ChosenTokens) -> bool:
        """Whether, as far as is known before its tokens are read, the sequences of a step all take another one."""
        return (
            self.runs_ahead
            and unread.batches == [scheduler.running for scheduler in self.schedulers]
            and all(
                len(sequence.token_ids) + 1 < sequence.sampling.max_new_tokens
                and sequence.sampling.repetition_penalty == 1  # else the next choice needs this one on the host
                for sequence in sum(unread.batches, [])
            )
        )

    def choose(self, logits: ShardedLogits, batches: Batches) -> ChosenTokens:
        return ChosenTokens(batches, self.share_tokens(sample(logits, self.rows_of(logits, batches)), batches))

    def read(self, chosen: ChosenTokens) -> list[Sequence]:
        """Takes the tokens of a step into the books; returns the sequences they finished."""
        token_ids = chosen.read()
        now_s = time.perf_counter()
        finished = []
        for scheduler, batch, tokens in zip(self.schedulers, chosen.batches, token_ids, strict=True):
            for sequence, token_id in zip(batch, tokens, strict=True):
                if sequence.finish_reason:
                    continue  # by the step before, read after this one was started
                sequence.token_ids.append(token_id)
                sequence.token_times_s.append(now_s)
                sequence.finish_reason = self.finish_reason(sequence)
                if sequence.finish_reason:
                    scheduler.finish(sequence)
                    finished.append(sequence)
        return finished

    def rows_of(self, logits: ShardedLogits, batches: Batches) -> list[Sequence | None]:
        """Whose logits stand in the rows of `logits.local`."""
        group, attn_tp_size = logits.group, self.parallel.attn_tp.size
        if self.parallel.holds_same_tokens(group):
            return batches[self.runner.dp_index]
        rows_per_rank = logits.local.shape[0] // group.size
        rows: list[Sequence | None] = []
        for rank in group.ranks:
            batch = batches[rank // attn_tp_size]
            rows += batch + [None] * (rows_per_rank - len(batch))
        return rows

    def share_tokens(self, own: torch.Tensor, batches: Batches) -> torch.Tensor:
        """own [B] -> [G, R]: every group's new tokens, as its first rank sampled them."""
        if self.parallel.control.size == 1:
            return own[None]
        width = max(map(len, batches))
        gathered = self.parallel.control.all_gather(F.pad(own, (0, width - len(own))))
        return gathered.view(-1, width)[:: self.parallel.attn_tp.size]

    def finish_reason(self, sequence: Sequence) -> str | None:
        """ "stop" at an end token or stop string, "length" at the token limit, None while it goes on."""
        sampling = sequence.sampling
        if not sampling.ignore_eos and sequence.token_ids[-1] in self.tokenizer.eos_token_ids:
            return "stop"
        if sampling.stop and self.ends_with_stop(sequence):
            return "stop"
        return "length" if len(sequence.token_ids) >= sampling.max_new_tokens else None

    def ends_with_stop(self, sequence: Sequence) -> bool:
        """Whether the newest token completed a stop string. A character is at most four byte tokens long."""
        longest = max(len(stop) for stop in sequence.sampling.stop)
        tail = self.tokenizer.decode(sequence.token_ids[-4 * longest - 4 :])
        return any(stop in tail for stop in sequence.sampling.stop)
