# SPDX-License-Identifier: Apache-2.0
"""Batched sampling of the next tokens of a step; transformers' logits processors define the distribution.

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

from executor.engine.logits_processors import LogitsProcessors, SamplingRow
from executor.sampling_params import SamplingParams
from models.layers.lm_head import ShardedLogits
from ops.transfer import to_device

RANDOM_BITS = 30  # of a random number, and of a probability as an integer: an int32 holds their sum
TIED = 32  # further candidates: logits from bfloat16 often tie at the last of top_k, and ties are kept
NO_TOP_P = 2.0  # keeps all, whatever the rounding of probabilities
ROWS_AT_ONCE = 64  # bounds the temporary memory of log-softmax


@dataclass
class Sampled:
    """Sampled tokens of this rank's rows, on the device."""

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
        self.num_candidates: int | None = None  # None for the whole vocabulary
        self.num_logprobs: int | None = None
        self.processors: LogitsProcessors | None = None
        self.filters: Filters | None = None  # None if all rows are greedy

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
        self.num_candidates = max(top_ks) + TIED if top_ks and all(top_ks) else None
        self.num_logprobs = max((s.logprobs for s in asked if s.logprobs is not None), default=None)
        processors = LogitsProcessors(self.rows, logits, self.end_token_ids, self.processors)
        self.processors = processors if processors.active else None
        own = rows[logits.first_row : logits.first_row + logits.num_rows]
        vocab_size = logits.part_size * logits.group.size
        width = min(self.num_candidates or vocab_size, vocab_size)
        self.filters = Filters(own, width, logits.local.device) if top_ks else None

    def choose(self, logits: ShardedLogits) -> tuple[torch.Tensor, torch.Tensor]:
        """Chosen tokens and largest logits [B] of this rank's rows."""
        if self.filters is None:
            values, ids = logits.topk(1)
            return ids[:, 0], values[:, 0]
        if self.num_candidates is None:
            values = logits.whole()
            largest = values.amax(-1)
            return self.filters.draw(values, largest), largest
        values, ids = logits.topk(self.num_candidates)
        return self.filters.draw(values, values[:, 0], ids), values[:, 0]


class Filters:
    """Temperature, top_k, top_p and min_p of this rank's rows, and the draw from what they leave.

    A greedy row keeps its largest logits, and its random number 0 draws the one with the lowest id.
    """

    def __init__(self, own: Sequence[SamplingRow | None], num_candidates: int, device: torch.device):
        self.rows = [(index, row) for index, row in enumerate(own) if row is not None and not row.sampling.greedy]
        self.num_rows = len(own)
        self.device = device
        temperature, top_p, min_logit = [1.0] * len(own), [NO_TOP_P] * len(own), [0.0] * len(own)
        last = [num_candidates - 1] * len(own)
        for index, row in self.rows:
            sampling = row.sampling
            temperature[index] = sampling.temperature
            min_logit[index] = math.log(sampling.min_p) if sampling.min_p else -math.inf
            if sampling.top_k:
                last[index] = min(sampling.top_k, num_candidates) - 1
            if sampling.top_p < 1:
                top_p[index] = sampling.top_p
        floats = to_device(torch.tensor([temperature, top_p, min_logit], dtype=torch.float32), device)
        self.temperature, self.top_p, self.min_logit = floats.unsqueeze(-1)  # [B, 1] each
        self.last = to_device(torch.tensor(last, dtype=torch.int64), device)[:, None]
        self.has_top_k = any(row.sampling.top_k for _, row in self.rows)
        self.has_top_p = any(row.sampling.top_p < 1 for _, row in self.rows)

    def draw(self, logits: torch.Tensor, largest: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        """Draws a token [B] of each row by inverse transform of one random number.

        logits [B, N]: of the whole vocabulary, or of the candidates `ids` in descending order; largest [B] of each row.
        Probabilities become integers, whose sums are exact in any order: one that is 0 is never drawn. They are summed
        in the order of token ids in either case, so that the draw does not depend on what other rows need.
        """
        scaled = (logits - largest[:, None]).div_(self.temperature)
        scaled.nan_to_num_(0, neginf=-torch.inf)  # NaN would become an invalid token
        scaled.masked_fill_(scaled < self.lowest_kept(scaled, is_sorted=ids is not None), -torch.inf)
        weights = scaled.softmax(-1).mul_(2**RANDOM_BITS).int()
        if ids is not None:
            ids, order = ids.sort()
            weights = weights.gather(1, order)
        sums = weights.cumsum(-1, dtype=torch.int32)
        targets = self.random_numbers() * sums[:, -1] >> RANDOM_BITS  # below the last sum
        drawn = torch.searchsorted(sums, targets.int()[:, None], right=True)
        return (drawn if ids is None else ids.gather(1, drawn))[:, 0]

    def lowest_kept(self, scaled: torch.Tensor, is_sorted: bool) -> torch.Tensor:
        """Lowest logit [B, 1] that top_k, then top_p, then min_p keep; ties with it are kept, too."""
        lowest = self.min_logit
        if self.has_top_k or self.has_top_p:
            ordered = scaled if is_sorted else scaled.sort(-1, descending=True).values
            kth = ordered.gather(1, self.last)
            lowest = torch.maximum(lowest, kth)
        if self.has_top_p:
            probabilities = ordered.masked_fill(ordered < kth, -torch.inf).softmax(-1)
            num_kept = (probabilities.cumsum(-1) - probabilities < self.top_p).sum(-1, keepdim=True)
            lowest = torch.maximum(lowest, ordered.gather(1, (num_kept - 1).clamp_(min=0)))  # a top_p that rounds to 0
        return lowest

    def random_numbers(self) -> torch.Tensor:
        """A random number [B] int64 below 2**RANDOM_BITS for each row; 0 for greedy ones."""
        numbers = [0] * self.num_rows
        for index, row in self.rows:
            assert row.random is not None, "a sampled row has random numbers"
            numbers[index] = int(row.random.random() * 2**RANDOM_BITS)
        return to_device(torch.tensor(numbers, dtype=torch.int64), self.device)


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
