# SPDX-License-Identifier: Apache-2.0
"""Samples the next token of all rows of a step at once; transformers' logits processors define the distribution.

R rows of all ranks that share the vocabulary, B rows of this rank, N candidates: the whole vocabulary or its most
likely tokens.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from random import Random

import torch

from executor.engine.logits_processors import LogitsProcessors, SamplingRow, needs_host_tokens
from executor.sampling_params import SamplingParams
from models.layers.lm_head import ShardedLogits

__all__ = ["Sampled", "Sampler", "SamplingRow", "make_random", "needs_host_tokens", "token_logprobs"]

RANDOM_BITS = 30  # of a random number, and of a probability as an integer: an int32 holds their sum
TIED = 32  # further candidates: logits from bfloat16 often tie at the last of top_k, and ties are kept
NO_TOP_K, NO_TOP_P = 2**31, 2.0  # keep all
ROWS_AT_ONCE = 64  # bounds the temporary memory of log-softmax


@dataclass
class Sampled:
    """Chosen tokens of this rank's rows, on the device."""

    token_ids: torch.Tensor  # [B] int64; some token of the vocabulary if `largest` is not finite
    largest: torch.Tensor  # [B] float32, largest raw logit, NaN first; -inf if no token is allowed
    logprobs: torch.Tensor | None = None  # [B, 1 + K] float32, of the token and of the K most likely, from raw logits
    top_ids: torch.Tensor | None = None  # [B, K] int64


class Sampler:
    """Samples tokens; keeps what only depends on the rows as long as they stay the same."""

    def __init__(self, end_token_ids: frozenset[int]):
        """end_token_ids: not chosen before `min_tokens`."""
        self.end_token_ids = end_token_ids
        self.rows: list[SamplingRow | None] | None = None
        self.num_candidates: int | None = 1  # None for the whole vocabulary
        self.num_logprobs: int | None = None
        self.processors: LogitsProcessors | None = None
        self.filters: Filters | None = None

    def sample(self, logits: ShardedLogits, rows: Sequence[SamplingRow | None]) -> Sampled:
        """Samples a token for each of this rank's rows; may change `logits.local`.

        rows: the sequences whose logits are the rows of `logits.local`, None for padding. All ranks that share the
        vocabulary pass the same, so they agree on what to exchange: a few candidates where every row is greedy or has
        a top_k, all logits otherwise. K is the largest `logprobs` that any of them asks for.
        """
        if self.rows is None or len(rows) != len(self.rows) or not all(map(is_, rows, self.rows)):
            self.set_rows(logits, rows)
        raw, raw_largest = logits, None
        if self.processors is not None:
            if self.num_logprobs is not None:
                raw = dataclasses.replace(logits, local=logits.local.clone())
            raw_largest = logits.own(logits.local.amax(-1, keepdim=True)).amax(-1)
            self.processors.apply(logits.local)
        token_ids, largest = self.choose(logits)
        if raw_largest is not None:
            largest = torch.where(largest.isfinite(), raw_largest, largest)
        if self.num_logprobs is None:
            return Sampled(token_ids, largest)
        return Sampled(token_ids, largest, *token_logprobs(raw, token_ids, self.num_logprobs))

    def set_rows(self, logits: ShardedLogits, rows: Sequence[SamplingRow | None]) -> None:
        """Prepares what only depends on the rows."""
        self.rows = list(rows)
        asked = [row.sampling for row in rows if row is not None]
        top_ks = [sampling.top_k for sampling in asked if not sampling.greedy]
        self.num_candidates = 1
        if top_ks:
            self.num_candidates = max(top_ks) + TIED if all(top_ks) else None
        self.num_logprobs = max((s.logprobs for s in asked if s.logprobs is not None), default=None)
        processors = LogitsProcessors(self.rows, logits, self.end_token_ids, self.processors)
        self.processors = processors if processors.active else None
        own = rows[logits.first_row : logits.first_row + logits.num_rows]
        sampled = [(place, row) for place, row in enumerate(own) if row is not None and not row.sampling.greedy]
        self.filters = Filters(sampled, len(own), logits.local.device) if sampled else None

    def choose(self, logits: ShardedLogits) -> tuple[torch.Tensor, torch.Tensor]:
        """Chosen tokens and largest logits [B] of this rank's rows."""
        if self.num_candidates == 1:
            values, ids = logits.topk(1)
            return ids[:, 0], values[:, 0]
        if self.num_candidates is None:
            values, ids = logits.whole(), None
        else:
            values, ids = logits.topk(self.num_candidates)
            ids, order = ids.sort()  # draws do not depend on whether other rows need the whole vocabulary
            values = values.gather(1, order)
        largest, chosen = values.max(-1)  # the lowest id on ties
        if self.filters is not None:
            chosen = torch.where(self.filters.greedy, chosen, self.filters.draw(values, largest))
        return chosen if ids is None else ids.gather(1, chosen[:, None])[:, 0], largest


class Filters:
    """Temperature, top_k, top_p and min_p of this rank's rows, and the draw from what they leave."""

    def __init__(self, sampled: list[tuple[int, SamplingRow]], num_rows: int, device: torch.device):
        """sampled: the rows that are not greedy, with their indices below `num_rows`."""
        self.rows = sampled
        self.num_rows = num_rows
        self.device = device
        temperature, top_p, min_logit = [1.0] * num_rows, [NO_TOP_P] * num_rows, [-math.inf] * num_rows
        last, greedy = [NO_TOP_K - 1] * num_rows, [True] * num_rows
        for place, row in self.rows:
            sampling = row.sampling
            greedy[place] = False
            temperature[place] = sampling.temperature
            if sampling.top_k:
                last[place] = sampling.top_k - 1
            if sampling.top_p < 1:
                top_p[place] = sampling.top_p
            if sampling.min_p:
                min_logit[place] = math.log(sampling.min_p)
        floats = torch.tensor([temperature, top_p, min_logit], dtype=torch.float32).to(device)
        integers = torch.tensor([last, greedy], dtype=torch.int64).to(device)
        self.temperature, self.top_p, self.min_logit = floats.unsqueeze(-1)  # [B, 1] each
        self.last = integers[0, :, None]
        self.greedy = integers[1].bool()
        self.needs_order = any(row.sampling.top_k or row.sampling.top_p < 1 for _, row in self.rows)
        self.has_min_p = any(row.sampling.min_p for _, row in self.rows)

    def draw(self, logits: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
        """Index [B] of a drawn candidate; logits [B, N] in the order of token ids, `largest` [B] of each row.

        By inverse transform of one random number per row. Probabilities are integers, whose sums are exact in any
        order: a candidate of probability 0 is never drawn.
        """
        scaled = (logits - largest[:, None]).div_(self.temperature)
        scaled.masked_fill_(~largest.isfinite()[:, None], 0)  # NaN would become an invalid index
        if self.needs_order:
            scaled.masked_fill_(scaled < torch.maximum(self.lowest_kept(scaled), self.min_logit), -torch.inf)
        elif self.has_min_p:
            scaled.masked_fill_(scaled < self.min_logit, -torch.inf)
        weights = scaled.softmax(-1).mul_(2**RANDOM_BITS).round_().int()
        sums = weights.cumsum(-1, dtype=torch.int32)
        targets = self.random_numbers() * sums[:, -1] >> RANDOM_BITS  # below the last sum
        return torch.searchsorted(sums, targets.int()[:, None], right=True)[:, 0]

    def lowest_kept(self, scaled: torch.Tensor) -> torch.Tensor:
        """Lowest logit [B, 1] that top_k, then top_p keep; ties with it are kept, too."""
        ordered = scaled.sort(-1, descending=True).values
        kth = ordered.gather(1, self.last.clamp(max=ordered.shape[1] - 1))
        probabilities = ordered.masked_fill(ordered < kth, -torch.inf).softmax(-1)
        num_kept = (probabilities.cumsum(-1) - probabilities < self.top_p).sum(-1, keepdim=True)
        return torch.maximum(kth, ordered.gather(1, num_kept - 1))

    def random_numbers(self) -> torch.Tensor:
        """A random number [B] int64 below 2**RANDOM_BITS for each row; 0 for greedy ones."""
        numbers = [0] * self.num_rows
        for place, row in self.rows:
            assert row.random is not None, "a sampled row has random numbers"
            numbers[place] = int(row.random.random() * 2**RANDOM_BITS)
        return torch.tensor(numbers, dtype=torch.int64).to(self.device, non_blocking=True)


def token_logprobs(
    logits: ShardedLogits, token_ids: torch.Tensor, top_k: int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-softmax of the given tokens, one for each of this rank's rows, and of the `top_k` most likely ones.

    A collective operation of the ranks that share the vocabulary. token_ids [B] int64. Returns [B, 1 + K] float32, the
    given token first, and the ids [B, K] of the most likely ones; None and K = 0 without top_k.
    """
    local_ids = (logits.all_rows(token_ids) - logits.first_id)[:, None]
    is_here = (local_ids >= 0) & (local_ids < logits.part_size)
    picked = logits.local.gather(1, local_ids.clamp(0, logits.part_size - 1)).masked_fill_(~is_here, -torch.inf)
    sums = torch.cat([rows.logsumexp(-1, keepdim=True) for rows in logits.local.split(ROWS_AT_ONCE)])
    both = logits.own(torch.cat((picked, sums), 1)).unflatten(1, (logits.group.size, 2))  # [B, size, 2]
    chosen, sums = both[..., 0].amax(-1, keepdim=True), both[..., 1].logsumexp(-1, keepdim=True)
    if top_k is None:
        return chosen - sums, None
    if top_k == 0:
        return chosen - sums, token_ids.new_empty(len(token_ids), 0)
    values, ids = logits.topk(top_k)
    return torch.cat((chosen, values), 1) - sums, ids


def make_random(sampling: SamplingParams, sample_index: int = 0) -> Random | None:
    """Random numbers of one sequence, so that its text does not depend on others; None for greedy decoding.

    sample_index: of `sampling.n`; each has numbers of its own. Without a seed they come from the operating system.
    """
    if sampling.greedy:
        return None
    return Random() if sampling.seed is None else Random(f"{sampling.seed} {sample_index}")
