# SPDX-License-Identifier: Apache-2.0
"""Helpers: rows of a step, and steps of ranks that share a vocabulary, each in a thread."""

import dataclasses
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch

from executor import SamplingParams
from executor.engine.sampler import Sampled, Sampler
from models.layers.lm_head import ShardedLogits
from ops.comm import SINGLE

DRAWS = 1000  # in a distribution


@dataclass(eq=False)
class Row:
    """What the sampler needs to know of a sequence."""

    sampling: SamplingParams
    prompt_token_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    bad_word_ids: list[list[int]] = field(default_factory=list)
    random: Any = None
    num_unread: int = 0
    mask_error: str | None = None

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) + self.num_unread


@dataclass
class Fixed:
    """A random number generator that has one number."""

    number: float

    def random(self) -> float:
        return self.number


def make_row(number: float | None = None, prompt: list[int] | None = None, **sampling: Any) -> Row:
    """A sampled row, unless `sampling` says otherwise; number: what it draws, else any."""
    source = Random() if number is None else Fixed(number)
    return Row(SamplingParams(**{"temperature": 1.0, **sampling}), prompt or [1], random=source)


def random_logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(random.randrange(2**32)))


def single(logits: torch.Tensor) -> ShardedLogits:
    """Logits [B, V] of one rank; a copy, as the sampler changes them."""
    return ShardedLogits(logits.clone(), SINGLE["lmhead_tp"], 0, len(logits))


def sample(logits: torch.Tensor, rows: list[Row], end_token_ids: frozenset[int] = frozenset()) -> Sampled:
    return Sampler(end_token_ids).sample(single(logits), rows)


def distribution(
    logits: torch.Tensor, row: Row, others: Sequence[Row] = (), end_token_ids: frozenset[int] = frozenset()
) -> torch.Tensor:
    """Probabilities [V] with which a row's tokens are drawn from logits [V], to 1 / DRAWS; others: in the same step."""
    numbers = [Fixed((i + 0.5) / DRAWS) for i in range(DRAWS)]
    rows = [dataclasses.replace(row, random=number) for number in numbers]
    token_ids = sample(logits.expand(DRAWS + len(others), -1), [*rows, *others], end_token_ids).token_ids
    return torch.bincount(token_ids[:DRAWS], minlength=len(logits)) / DRAWS


class ThreadGroup:
    """Stands in for a process group whose ranks are threads; counts the bytes that each has passed on."""

    def __init__(self, size: int):
        self.size = size
        self.barrier = threading.Barrier(size)
        self.parts: list[torch.Tensor] = [torch.empty(0)] * size
        self.sent_bytes = [0] * size

    def rank(self, index: int) -> "ThreadRank":
        return ThreadRank(self, index)


@dataclass
class ThreadRank:
    shared: ThreadGroup
    index: int

    @property
    def size(self) -> int:
        return self.shared.size

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self.shared.parts[self.index] = tensor
        self.shared.sent_bytes[self.index] += tensor.nbytes
        self.shared.barrier.wait(timeout=30)
        gathered = torch.cat(self.shared.parts)
        self.shared.barrier.wait(timeout=30)
        return gathered


def on_ranks(group: ThreadGroup, function: Callable[[ThreadRank], Any]) -> list[Any]:
    """Results of a function on every rank."""
    with ThreadPoolExecutor(group.size) as pool:
        return list(pool.map(lambda index: function(group.rank(index)), range(group.size)))
