# SPDX-License-Identifier: Apache-2.0
"""The loop: start what waits, prefill it, decode what runs, finish what ended.

Every rank keeps the books of all requests and takes the same decisions, so that nobody has to be told what comes next;
what a rank cannot know, the tokens of other groups of attention ranks, is exchanged after each step.

A device works while the host goes on, so a decode step is started before the tokens of the one before are read. If
these end a text, that step has computed one token too many for it, which is dropped.

A sequence whose logits are not finite ends with an error, the others go on. What it has cached is zeroed before its
blocks are used again: a masked position takes part in attention with weight 0, and 0 times NaN is NaN.
"""

import math
import time
from collections.abc import Iterator

import torch

from executor.engine.kv_cache import zero_blocks
from executor.engine.model_runner import Batches, ModelRunner
from executor.engine.sampler import sample
from executor.engine.scheduler import Scheduler, Sequence
from executor.loading.tokenizer import Tokenizer
from models.layers.lm_head import ShardedLogits
from models.layers.padding import pad_rows
from ops.comm import ParallelContext


class ChosenTokens:
    """The next token of each sequence of a step: on the device at once, on the host when it is asked for them."""

    def __init__(self, batches: Batches, on_device: torch.Tensor, largest_logits: torch.Tensor):
        """on_device [G, R] integers: of every group of attention ranks, padded to the largest batch.

        largest_logits [G, R] float32: finite where all that the token was chosen from is.
        """
        self.batches = batches
        self.on_device = on_device
        self.on_host = on_device.to("cpu", non_blocking=True)
        self.largest_logits = largest_logits.to("cpu", non_blocking=True)
        self.copied = torch.get_device_module(on_device.device).Event()
        self.copied.record()

    def read(self) -> list[list[int | None]]:
        """Waits for the step, not for one started after it. None stands where the logits are not finite."""
        self.copied.synchronize()
        groups = zip(self.batches, self.on_host.tolist(), self.largest_logits.tolist(), strict=True)
        return [
            [token_id if math.isfinite(logit) else None for _, token_id, logit in zip(*group, strict=False)]
            for group in groups
        ]


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
        self.stale_blocks: list[int] = []  # free ones of this rank's cache that may hold NaN

    def run(self, sequences: list[Sequence]) -> Iterator[Sequence]:
        """Yields every sequence when it has finished. The groups get sequences in turn."""
        self.check_idle()
        for number, sequence in enumerate(sequences):
            self.schedulers[number % len(self.schedulers)].add(sequence)
        try:
            while self.busy():
                yield from self.step()
        finally:
            self.clear()

    def busy(self) -> bool:
        return any(scheduler.waiting or scheduler.running for scheduler in self.schedulers)

    def clear(self) -> None:
        """Forgets all sequences: an abandoned or failed run leaves none behind for the next one.

        Nobody has looked whether what they cached is finite. After a run that ended by itself a step may be unread, of
        sequences that have all finished: the next run reads it.
        """
        if self.busy():
            unread = self.unread.batches[self.runner.dp_index] if self.unread else []
            for sequence in [*self.schedulers[self.runner.dp_index].running, *unread]:
                self.stale_blocks += sequence.blocks
            self.unread = None
        for scheduler in self.schedulers:
            scheduler.clear()

    def check_idle(self) -> None:
        """RuntimeError while a run is under way: two would get each other's sequences."""
        if self.busy():
            raise RuntimeError("another run is under way: finish or close it first")

    def step(self) -> list[Sequence]:
        """Starts at most one step and reads at most one step's tokens; returns the sequences that these finished."""
        unread, self.unread = self.unread, None
        if unread is None:
            if self.stale_blocks:
                zero_blocks(self.runner.kv_caches, self.stale_blocks)
                self.stale_blocks = []
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
        return ChosenTokens(batches, *self.share(*sample(logits, self.rows_of(logits, batches)), batches))

    def read(self, chosen: ChosenTokens) -> list[Sequence]:
        """Takes the tokens of a step into the books; returns the sequences they finished."""
        token_ids = chosen.read()
        now_s = time.perf_counter()
        finished = []
        groups = zip(self.schedulers, chosen.batches, token_ids, strict=True)
        for group, (scheduler, batch, tokens) in enumerate(groups):
            for sequence, token_id in zip(batch, tokens, strict=True):
                if token_id is None and group == self.runner.dp_index:
                    self.stale_blocks += sequence.blocks
                if sequence.finish_reason:
                    continue  # by the step before, read after this one was started
                if token_id is None:
                    sequence.finish_reason = "error"
                else:
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
            return [*batches[self.runner.dp_index]]
        rows_per_rank = logits.local.shape[0] // group.size
        rows: list[Sequence | None] = []
        for rank in group.ranks:
            batch = batches[rank // attn_tp_size]
            rows += batch + [None] * (rows_per_rank - len(batch))
        return rows

    def share(
        self, token_ids: torch.Tensor, largest_logits: torch.Tensor, batches: Batches
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B] each -> [G, R] each: every group's new tokens and their logits, as its first rank has them."""
        if self.parallel.control.size == 1:
            return token_ids[None], largest_logits[None]
        width = max(map(len, batches))
        own = torch.stack((token_ids.int(), largest_logits.view(torch.int32)), dim=1)  # bits: both in one exchange
        gathered = self.parallel.control.all_gather(pad_rows(own, width)).view(-1, width, 2)
        token_ids, bits = gathered[:: self.parallel.attn_tp.size].unbind(-1)
        return token_ids, bits.view(torch.float32)

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
