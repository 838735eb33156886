# SPDX-License-Identifier: Apache-2.0
"""The loop: start what waits, prefill it, decode what runs, finish what ended."""

import time
from collections.abc import Iterator

from executor.model_runner import ModelRunner
from executor.sampler import sample
from executor.scheduler import Scheduler, Sequence
from executor.tokenizer import Tokenizer


class Engine:
    """Runs sequences to their end, several at a time."""

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, tokenizer: Tokenizer):
        self.runner = runner
        self.scheduler = scheduler
        self.tokenizer = tokenizer

    def run(self, sequences: list[Sequence]) -> Iterator[Sequence]:
        """Yields every sequence when it has finished."""
        for sequence in sequences:
            self.scheduler.add(sequence)
        try:
            while self.scheduler.waiting or self.scheduler.running:
                yield from self.step()
        finally:  # an abandoned or failed run leaves no sequence behind for the next one
            self.scheduler.waiting.clear()
            for sequence in list(self.scheduler.running):
                self.scheduler.finish(sequence)

    def step(self) -> list[Sequence]:
        """One prefill if something can start, else one decode step; returns the sequences it finished."""
        started_s = time.perf_counter()
        batch = self.scheduler.start_waiting()
        if batch:
            for sequence in batch:
                sequence.started_s = started_s
            logits = self.runner.prefill(batch)
        else:
            batch = list(self.scheduler.running)
            logits = self.runner.decode(batch)
        token_ids = sample(logits, batch)
        now_s = time.perf_counter()
        for sequence, token_id in zip(batch, token_ids, strict=True):
            sequence.token_ids.append(token_id)
            sequence.token_times_s.append(now_s)
            sequence.finish_reason = self.finish_reason(sequence)
        finished = [sequence for sequence in batch if sequence.finish_reason]
        for sequence in finished:
            self.scheduler.finish(sequence)
        return finished

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
