# SPDX-License-Identifier: Apache-2.0
"""The loop: start what waits, prefill it, decode what runs, finish what ended.

Every rank keeps the books of all requests and takes the same decisions, so that nobody has to be told what comes next;
what a rank cannot know, the tokens of other groups of attention ranks, is exchanged after each step.
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


class Engine:
    """Runs sequences to their end, several at a time; one scheduler for each group of attention ranks."""

    def __init__(
        self, runner: ModelRunner, schedulers: list[Scheduler], parallel: ParallelContext, tokenizer: Tokenizer
    ):
        self.runner = runner
        self.schedulers = schedulers
        self.parallel = parallel
        self.tokenizer = tokenizer

    def run(self, sequences: list[Sequence]) -> Iterator[Sequence]:
        """Yields every sequence when it has finished. The groups get sequences in turn."""
        self.check_idle()
        for number, sequence in enumerate(sequences):
            self.schedulers[number % len(self.schedulers)].add(sequence)
        try:
            while self.busy():
                yield from self.step()
        finally:  # an abandoned or failed run leaves no sequence behind for the next one
            for scheduler in self.schedulers:
                scheduler.clear()

    def busy(self) -> bool:
        return any(scheduler.waiting or scheduler.running for scheduler in self.schedulers)

    def check_idle(self) -> None:
        """RuntimeError while a run is under way: two would get each other's sequences."""
        if self.busy():
            raise RuntimeError("another run is under way: finish or close it first")

    def step(self) -> list[Sequence]:
        """One prefill if something can start, else one decode step; returns the sequences it finished."""
        started_s = time.perf_counter()
        batches = [scheduler.start_waiting() for scheduler in self.schedulers]
        if any(batches):
            for sequence in sum(batches, []):
                sequence.started_s = started_s
            logits = self.runner.prefill(batches)
        else:
            batches = [list(scheduler.running) for scheduler in self.schedulers]
            logits = self.runner.decode(batches)
        token_ids = self.share_tokens(sample(logits, self.rows_of(logits, batches)), batches)
        now_s = time.perf_counter()
        finished = []
        for scheduler, batch, tokens in zip(self.schedulers, batches, token_ids, strict=True):
            for sequence, token_id in zip(batch, tokens, strict=True):
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

    def share_tokens(self, own: list[int], batches: Batches) -> list[list[int]]:
        """Every group's new tokens, as its first rank sampled them."""
        if self.parallel.control.size == 1:
            return [own]
        width = max(map(len, batches))
        padded = F.pad(self.runner.tensor(own), (0, width - len(own)))
        gathered: torch.Tensor = self.parallel.control.all_gather(padded).view(-1, width)
        of_groups = gathered[:: self.parallel.attn_tp.size].tolist()
        return [tokens[: len(batch)] for tokens, batch in zip(of_groups, batches, strict=True)]

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
