# SPDX-License-Identifier: Apache-2.0
"""Which sequences run in the next step."""

from collections import deque
from dataclasses import dataclass, field

import torch

from executor.engine.kv_cache import BLOCK_SIZE, BlockAllocator, blocks_for
from executor.sampling_params import SamplingParams

MAX_PREFILL_TOKENS = 16384  # packed in one step, so that activations stay bounded; one longer prompt goes alone


@dataclass(eq=False, kw_only=True)
class Sequence:
    """One request on its way: what it asks for, what was generated so far, its cache blocks, when things happened."""

    index: int
    prompt: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    generator: torch.Generator | None  # of the sampled token; None for greedy
    token_ids: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    started_s: float = 0.0
    token_times_s: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompt_token_ids) + len(self.token_ids)

    @property
    def max_len(self) -> int:
        """Tokens that may have to be cached; the last new one never is."""
        return len(self.prompt_token_ids) + self.sampling.max_new_tokens - 1

    def slot(self, position: int) -> int:
        """Cache slot of a token position."""
        return self.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


class Scheduler:
    """First come, first served. A sequence gets all the cache it can need when it starts, so it never has to stop."""

    def __init__(self, allocator: BlockAllocator, batch_size: int):
        self.allocator = allocator
        self.batch_size = batch_size
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence that the whole cache could hold."""
        assert blocks_for(sequence.max_len) <= self.allocator.num_blocks, "it would wait for ever"
        self.waiting.append(sequence)

    def start_waiting(self) -> list[Sequence]:
        """Waiting sequences that fit now: they run from here on and are to be prefilled together."""
        started: list[Sequence] = []
        num_tokens = 0
        while self.waiting and len(self.running) < self.batch_size:
            sequence = self.waiting[0]
            num_tokens += len(sequence)
            if started and num_tokens > MAX_PREFILL_TOKENS:
                break
            blocks = self.allocator.allocate(sequence.max_len)
            if blocks is None:
                break
            sequence.blocks = blocks
            started.append(self.waiting.popleft())
            self.running.append(sequence)
        return started

    def finish(self, sequence: Sequence) -> None:
        """Takes a running sequence out and frees its cache; the sequence still says which blocks that was."""
        self.running.remove(sequence)
        self.allocator.free(sequence.blocks)

    def clear(self) -> None:
        """Forgets all sequences."""
        self.waiting.clear()
        for sequence in list(self.running):
            self.finish(sequence)
