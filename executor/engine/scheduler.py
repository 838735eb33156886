# SPDX-License-Identifier: Apache-2.0
"""Scheduler of one attention DP group: continuous batching, chunked prefill, preemption by recomputation.

First come, first served: a request waits only for those before it. In a step every decoding sequence gets its next
token; prompts share what is left of the token budget in order of arrival, so that a long prompt is prefilled in chunks
while others decode. A sequence gets cache blocks as it grows; when none is free, the one admitted last is preempted:
its blocks are freed, and it is recomputed, before any later request, when there is room again.
"""

from collections import deque
from dataclasses import dataclass

from executor.engine.block_pool import BlockPool
from executor.engine.sequence import Sequence
from ops.step import BLOCK_SIZE, Span, blocks_for


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Tokens of one sequence in a step."""

    sequence: Sequence
    num_computed: int  # tokens of the sequence that are computed before this step
    num_new: int
    samples: bool  # whether the step samples the sequence's next token

    @property
    def end(self) -> int:
        return self.num_computed + self.num_new

    @property
    def span(self) -> Span:
        sequence = self.sequence
        return Span(self.num_computed, self.num_new, sequence.blocks, len(sequence.prompt_token_ids))

    @property
    def is_decode(self) -> bool:
        """Whether a decode step can compute it: one token, from which the next one is sampled and nothing else."""
        return self.num_new == 1 and self.samples and not self.wants_prompt_rows

    @property
    def wants_prompt_rows(self) -> bool:
        """Whether logits of prompt positions among these tokens are needed; not again after a preemption."""
        sequence = self.sequence
        in_prompt = self.num_computed < len(sequence.prompt_token_ids)
        return in_prompt and sequence.wants_prompt_rows and not sequence.token_ids


Batch = list[Scheduled]


class Scheduler:
    """Selects the tokens of each step; holds the running and waiting sequences of one attention DP group."""

    def __init__(
        self, pool: BlockPool, max_sequences: int, max_step_tokens: int, chunk_tokens: int, prefix_cache: bool
    ):
        """max_step_tokens: token budget of a step. chunk_tokens: that of its prompt tokens while others decode."""
        self.pool = pool
        self.max_sequences = max_sequences
        self.max_step_tokens = max_step_tokens
        self.chunk_tokens = min(chunk_tokens, max_step_tokens)
        self.prefix_cache = prefix_cache
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission

    @property
    def load(self) -> tuple[int, int]:
        """Unfinished sequences, and tokens they still need: new requests go to the group with the least load."""
        unfinished = [*self.running, *self.waiting]
        return len(unfinished), sum(sequence.max_len - sequence.num_computed for sequence in unfinished)

    @property
    def has_decodes(self) -> bool:
        """Whether a running sequence decodes."""
        return any(map(is_decoding, self.running))

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence, which the whole cache must be able to hold."""
        assert blocks_for(sequence.max_len) <= self.pool.num_blocks, "it would wait for ever"
        self.waiting.append(sequence)

    def add_first(self, sequences: list[Sequence]) -> None:
        """Queues sequences of a request that came before those that wait."""
        self.waiting.extendleft(reversed(sequences))

    def schedule(self, others_decode: bool, may_preempt: bool) -> Batch | None:
        """Selects the tokens of the next step and allocates their blocks.

        others_decode: whether sequences of any group decode. may_preempt: False while steps in flight use the blocks;
        returns None if a sequence would have to be preempted.
        """
        if not self._grow(may_preempt):
            return None
        batch = [Scheduled(sequence, sequence.num_computed, 1, True) for sequence in filter(is_decoding, self.running)]
        budget = self.max_step_tokens
        if others_decode or batch:
            budget = min(self.chunk_tokens, max(1, budget - len(batch)))
        for sequence in self.running:
            if sequence.num_pending > 1 and budget > 0:
                budget -= self._chunk(batch, sequence, budget)
        while self.waiting and len(self.running) < self.max_sequences and budget > 0 and self._admit(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            budget -= self._chunk(batch, sequence, budget)
        return batch

    def finish(self, sequence: Sequence, finish_reason: str) -> None:
        """Ends a sequence; frees its blocks, at once or when no step in flight uses them."""
        sequence.finish_reason = finish_reason
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        if not sequence.num_in_flight:
            self.release(sequence)

    def release(self, sequence: Sequence) -> None:
        """Frees the blocks of a sequence that no step in flight uses; those not verified may hold NaN."""
        num_sound = len(sequence.blocks)
        if sequence.is_suspect:
            num_sound = 0
        elif sequence.num_computed > sequence.num_verified:
            num_sound = sequence.num_verified // BLOCK_SIZE
        elif self.prefix_cache:
            self._register_last(sequence)
        self.pool.release(sequence.blocks[num_sound:], suspect=True)
        self.pool.release(sequence.blocks[:num_sound])
        sequence.blocks = []
        sequence.num_computed = sequence.num_verified = sequence.num_registered = 0

    def register(self, sequence: Sequence, num_tokens: int) -> None:
        """Adds the full blocks of a sequence's first `num_tokens` tokens, which are verified, to the prefix cache."""
        sequence.num_verified = num_tokens
        count = num_tokens // BLOCK_SIZE
        if self.prefix_cache and count > sequence.num_registered:
            digests = sequence.block_digests(count)
            for index in range(sequence.num_registered, count):
                tokens = sequence.tokens(index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE)
                self.pool.register(sequence.blocks[index], digests[index - 1] if index else b"", tokens, digests[index])
            sequence.num_registered = count

    def _register_last(self, sequence: Sequence) -> None:
        """Adds the last block of a verified sequence, which is not full, to the prefix cache."""
        full = sequence.num_verified // BLOCK_SIZE
        tokens = sequence.tokens(full * BLOCK_SIZE, sequence.num_verified)
        if tokens:
            digests = sequence.block_digests(full)
            self.pool.register(sequence.blocks[full], digests[-1] if digests else b"", tokens, None)

    def _chunk(self, batch: Batch, sequence: Sequence, budget: int) -> int:
        """Adds a chunk of a prompt, at most `budget` tokens, to the batch; returns its size."""
        count = min(sequence.num_pending, budget)
        batch.append(Scheduled(sequence, sequence.num_computed, count, count == sequence.num_pending))
        return count

    def _admit(self, sequence: Sequence) -> bool:
        """Allocates the blocks of a waiting sequence's known tokens, cached prefix included; False if too few are free.

        Each running sequence that may still grow keeps one block in reserve, so that it does not preempt this one at
        once.
        """
        cached, source, num_copied = self._find_cached(sequence)
        self.pool.share(cached)
        reserve = sum(len(other.blocks) < blocks_for(other.max_len) for other in self.running)
        needed = blocks_for(sequence.length) - len(cached)
        if needed + reserve > self.pool.num_free:
            self.pool.release(cached)
            return False
        if source is not None:
            self.pool.share([source])
            if needed > self.pool.num_free:  # it is one of those that are needed
                self.pool.release([source])
                source, num_copied = None, 0
        taken = self.pool.allocate(needed) or []
        if source is not None:
            self.pool.copies.append((source, taken[0]))
        sequence.blocks = cached + taken
        sequence.num_registered = len(cached)
        sequence.num_computed = sequence.num_verified = len(cached) * BLOCK_SIZE + num_copied
        if sequence.started_s is None:  # blocks that a preempted sequence finds again are its own
            sequence.num_cached = sequence.num_computed
        return True

    def _find_cached(self, sequence: Sequence) -> tuple[list[int], int | None, int]:
        """Cached blocks of a sequence's known tokens, a block to copy the next tokens from, and their number.

        At least the last token is left to compute: its logits are needed.
        """
        if not self.prefix_cache or sequence.wants_prompt_rows:
            return [], None, 0
        digests = sequence.block_digests((sequence.length - 1) // BLOCK_SIZE)
        cached = self.pool.cached(digests)
        first = len(cached) * BLOCK_SIZE
        following = sequence.tokens(first, min(first + BLOCK_SIZE, sequence.length - 1))
        return cached, *self.pool.partial_match(digests[len(cached) - 1] if cached else b"", following)

    def _grow(self, may_preempt: bool) -> bool:
        """Gives every decoding sequence the block of its next token; False if one would have to be preempted."""
        for sequence in list(self.running):
            while sequence in self.running and len(sequence.blocks) < blocks_for(sequence.length):
                if is_complete(sequence):
                    break
                block = self.pool.allocate(1)
                if block is not None:
                    sequence.blocks += block
                elif not may_preempt:
                    return False
                else:
                    self._preempt(self.running[-1])
        return True

    def _preempt(self, sequence: Sequence) -> None:
        assert not sequence.num_in_flight
        self.running.remove(sequence)
        self.release(sequence)
        if not sequence.token_ids:  # its prompt is computed again from the start
            for rows in (sequence.prompt_logprobs, sequence.prompt_top_ids, sequence.prompt_logits):
                rows.clear()
        self.waiting.appendleft(sequence)


def is_complete(sequence: Sequence) -> bool:
    """Whether all tokens that a sequence may generate are sampled, though some may be unread."""
    return sequence.num_generated >= sequence.sampling.max_new_tokens


def is_decoding(sequence: Sequence) -> bool:
    """Whether a running sequence needs one token computed to sample its next one."""
    return sequence.num_pending == 1 and not is_complete(sequence)
