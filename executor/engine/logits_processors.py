# SPDX-License-Identifier: Apache-2.0
"""Logits processors: bias, penalties, minimum length, bad words and masks, in the order of transformers.

B rows with a penalty or mask among the R rows of a step, N size of this rank's vocabulary shard.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

import torch

from executor.sampling_params import Mask, SamplingParams
from executor.utils.text import one_line
from models.layers.lm_head import ShardedLogits
from ops.transfer import to_device


class SamplingRow(Protocol):
    """Protocol of a sequence, as far as sampling needs it."""

    mask_error: str | None  # set if `sampling.mask` fails

    @property
    def sampling(self) -> SamplingParams: ...

    @property
    def prompt_token_ids(self) -> list[int]: ...

    @property
    def token_ids(self) -> list[int]:
        """Generated tokens that the host has read; all of them if `needs_host_tokens`."""

    @property
    def num_generated(self) -> int:
        """Generated tokens, read or not."""

    @property
    def bad_word_ids(self) -> list[list[int]]:
        """Token ids of `sampling.bad_words`."""

    @property
    def random(self) -> Random | None:
        """Random numbers of the sequence, one for each sampled token; None for greedy decoding."""


PlacedRows = list[tuple[int, SamplingRow]]  # rows of a step and their indices


def has_penalty(sampling: SamplingParams) -> bool:
    return (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1, 0, 0)


def needs_host_tokens(sampling: SamplingParams) -> bool:
    """Whether the host must have read all generated tokens before it can prepare the choice of the next."""
    return has_penalty(sampling) or bool(sampling.bad_words) or sampling.mask is not None


@dataclass(frozen=True)
class Shard:
    """This rank's vocabulary shard."""

    first_id: int
    size: int
    vocab_size: int
    device: torch.device

    def positions(self, tokens: Iterable[tuple[int, Iterable[int]]]) -> list[int]:
        """Positions in a flattened [rows, N] of the given token ids of the given rows, where the shard has them."""
        return [
            row * self.size + token_id - self.first_id
            for row, token_ids in tokens
            for token_id in token_ids
            if 0 <= token_id - self.first_id < self.size
        ]

    def tensor(self, values: list[int]) -> torch.Tensor:
        """int64 on the device."""
        return to_device(torch.tensor(values, dtype=torch.int64), self.device)


class LogitsProcessors:
    """The logits processors that the rows of a step ask for; valid while steps have the same rows.

    Rows are those of all ranks of the vocabulary group, so that its ranks agree on `active`.
    """

    def __init__(
        self,
        rows: Sequence[SamplingRow | None],
        logits: ShardedLogits,
        end_token_ids: Collection[int],
        previous: "LogitsProcessors | None" = None,
    ):
        """previous: of the step before, whose token counts are kept."""
        vocab_size = logits.part_size * logits.group.size
        self.shard = Shard(logits.first_id, logits.part_size, vocab_size, logits.local.device)
        self.end_token_ids = end_token_ids
        placed = [(index, row) for index, row in enumerate(rows) if row is not None]
        biased = [(index, row.sampling.logit_bias) for index, row in placed if row.sampling.logit_bias]
        self.restricted = [item for item in placed if item[1].sampling.min_tokens or item[1].bad_word_ids]
        self.masks: list[tuple[int, SamplingRow, Mask]] = [
            (index, row, row.sampling.mask) for index, row in placed if row.sampling.mask is not None
        ]
        penalized = [item for item in placed if has_penalty(item[1].sampling)]
        self.active = bool(biased or self.restricted or self.masks or penalized)
        self.penalties = None
        if penalized:
            self.penalties = Penalties(penalized, self.shard, previous.penalties if previous else None)
        added = {
            position: value
            for index, bias in biased
            for token_id, value in bias.items()
            for position in self.shard.positions([(index, [token_id])])
        }
        self.bias_positions = self.shard.tensor(list(added))
        self.bias_values = to_device(torch.tensor(list(added.values()), dtype=torch.float32), self.shard.device)
        self.masked_rows = self.shard.tensor([index for index, _, _ in self.masks])
        self.forbidden: list[int] = []  # positions in the flattened logits
        self.forbidden_positions = self.shard.tensor([])

    def apply(self, logits: torch.Tensor) -> None:
        """Changes this rank's logits [R, N] in place."""
        flat = logits.view(-1)
        if len(self.bias_positions):
            flat.index_add_(0, self.bias_positions, self.bias_values)
        if self.penalties is not None:
            self.penalties.apply(logits)
        forbidden = self.shard.positions((index, self.forbidden_ids(row)) for index, row in self.restricted)
        if forbidden != self.forbidden:
            self.forbidden, self.forbidden_positions = forbidden, self.shard.tensor(forbidden)
        if forbidden:
            flat.index_fill_(0, self.forbidden_positions, -torch.inf)
        allowed = self.allowed()
        if allowed is not None:
            logits.index_copy_(0, self.masked_rows, logits[self.masked_rows].masked_fill_(~allowed, -torch.inf))

    def forbidden_ids(self, row: SamplingRow) -> list[int]:
        """Token ids that would end the output before `min_tokens` or complete a bad word."""
        sampling, found = row.sampling, []
        if row.num_generated < sampling.min_tokens:
            found += [*self.end_token_ids, *sampling.stop_token_ids]
        if row.bad_word_ids:
            longest = max(map(len, row.bad_word_ids))
            tail = (row.prompt_token_ids[-longest:] + row.token_ids[-longest:])[-longest:]
            found += [word[-1] for word in row.bad_word_ids if word and ends_with(tail, word[:-1])]
        return found

    def allowed(self) -> torch.Tensor | None:
        """Allowed tokens [B, N] bool of the rows that have a mask; None if all are allowed."""
        masks = [call_mask(row, mask, self.shard.vocab_size) for _, row, mask in self.masks]
        if all(mask is None for mask in masks):
            return None
        part = slice(self.shard.first_id, self.shard.first_id + self.shard.size)
        everything = torch.ones(self.shard.vocab_size, dtype=torch.bool)
        parts = [(everything if mask is None else mask)[part] for mask in masks]
        return to_device(torch.stack(parts), self.shard.device)


class Penalties:
    """Repetition, presence and frequency penalties, from token counts that stay on the device."""

    def __init__(self, placed: PlacedRows, shard: Shard, previous: "Penalties | None"):
        self.shard = shard
        self.rows = [row for _, row in placed]
        self.indices = shard.tensor([index for index, _ in placed])
        samplings = [row.sampling for row in self.rows]
        values = [[s.repetition_penalty, s.presence_penalty, s.frequency_penalty] for s in samplings]
        settings = to_device(torch.tensor(values, dtype=torch.float32).T.contiguous(), shard.device)
        self.repetition, self.presence, self.frequency = settings.unsqueeze(-1)  # [B, 1] each
        shape = (len(placed), shard.size)
        self.counts = torch.zeros(shape, dtype=torch.int32, device=shard.device)  # of generated tokens
        self.in_prompt = torch.zeros(shape, dtype=torch.bool, device=shard.device)
        self.num_counted = [0] * len(placed)
        fresh = self.copy_counts(previous) if previous is not None else list(range(len(placed)))
        prompts = shard.positions((i, set(self.rows[i].prompt_token_ids)) for i in fresh)
        self.in_prompt.view(-1).index_fill_(0, shard.tensor(prompts), True)

    def copy_counts(self, previous: "Penalties") -> list[int]:
        """Takes over the counts of rows that were there before; returns the others."""
        old_places = {id(row): place for place, row in enumerate(previous.rows)}
        kept = [place for place, row in enumerate(self.rows) if id(row) in old_places]
        sources = [old_places[id(self.rows[place])] for place in kept]
        places, old = self.shard.tensor(kept), self.shard.tensor(sources)
        self.counts.index_copy_(0, places, previous.counts[old])
        self.in_prompt.index_copy_(0, places, previous.in_prompt[old])
        for place, source in zip(kept, sources, strict=True):
            self.num_counted[place] = previous.num_counted[source]
        return [place for place, row in enumerate(self.rows) if id(row) not in old_places]

    def count_new_tokens(self) -> None:
        """Counts tokens that were generated since the last call."""
        new = enumerate(row.token_ids[counted:] for row, counted in zip(self.rows, self.num_counted, strict=True))
        self.num_counted = [len(row.token_ids) for row in self.rows]
        positions = self.shard.tensor(self.shard.positions(new))
        ones = torch.ones_like(positions, dtype=torch.int32)
        self.counts.view(-1).index_add_(0, positions, ones)

    def apply(self, logits: torch.Tensor) -> None:
        """Changes logits [R, N] in place: repetition (Keskar et al. 2019, CTRL), then frequency and presence."""
        self.count_new_tokens()
        scores = logits[self.indices]
        generated = self.counts > 0
        repeated = torch.where(scores < 0, scores * self.repetition, scores / self.repetition)
        scores = torch.where(generated | self.in_prompt, repeated, scores)
        scores -= self.frequency * self.counts
        scores -= self.presence * generated
        logits.index_copy_(0, self.indices, scores)


def ends_with(token_ids: list[int], ending: list[int]) -> bool:
    return not ending or token_ids[-len(ending) :] == ending


def call_mask(row: SamplingRow, mask: Mask, vocab_size: int) -> torch.Tensor | None:
    """Calls a row's mask: allowed tokens [V] bool, None for all. If it fails: none, and `row.mask_error` is set."""
    try:
        allowed = mask(row.token_ids.copy())
        if allowed is None:
            return None
        if not isinstance(allowed, torch.Tensor) or allowed.dtype != torch.bool or allowed.shape != (vocab_size,):
            is_tensor = isinstance(allowed, torch.Tensor)
            got = f"{allowed.dtype} {list(allowed.shape)}" if is_tensor else f"a {type(allowed).__name__}"
            raise ValueError(f"expected a bool tensor of {vocab_size} values or None from the function, got {got}")
        if not allowed.any():
            raise ValueError("it allows no token")
        return allowed.cpu()
    except Exception as error:  # of the caller's function: only its own request ends
        row.mask_error = f"mask: {one_line(str(error) or type(error).__name__)}"
        return torch.zeros(vocab_size, dtype=torch.bool)
