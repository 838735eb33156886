# SPDX-License-Identifier: Apache-2.0
"""A launched step: forward pass, sampling, exchange of results between attention DP groups, and copy to the host."""

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace

import torch

from executor.engine.decode_inputs import Unread
from executor.engine.model_runner import Batches, ModelRunner, Output, is_decode
from executor.engine.sampler import Sampler, token_logprobs
from executor.engine.scheduler import Scheduled
from executor.engine.sequence import Sequence
from executor.sampling_params import SamplingParams
from models.layers.lm_head import ShardedLogits
from models.layers.padding import pad_rows
from ops.comm import ParallelContext
from ops.transfer import to_device


@dataclass(frozen=True)
class RowResult:
    """Result of a step for one of its sequences, on the host."""

    token_id: int | None = None  # None if it sampled nothing
    is_finite: bool = True
    nothing_allowed: bool = False  # whether it is not finite only because no token is allowed
    logprobs: torch.Tensor | None = None  # [1 + K] float32, of the token and of the K most likely ones
    top_ids: torch.Tensor | None = None  # [K] int64
    prompt_logprobs: list[torch.Tensor] = field(default_factory=list)  # [N, 1 + K] of N prompt tokens, or nothing
    prompt_top_ids: list[torch.Tensor] = field(default_factory=list)


class HostCopy:
    """Asynchronous device-to-host copy of tensors."""

    def __init__(self, tensors: Items[torch.Tensor]):
        self.tensors = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self.copied = torch.get_device_module(tensors[0].device).Event()
        self.copied.record()

    def wait(self) -> list[torch.Tensor]:
        """Waits for this copy, not for later steps (host sync)."""
        self.copied.synchronize()
        return self.tensors


class Launched:
    """A step in flight; G attention DP groups, R sampled rows of the largest."""

    def __init__(
        self,
        batches: Batches,
        token_ids: torch.Tensor,  # [G, R] integers
        largest: torch.Tensor,  # [G, R] float32: finite where all logits of the row are
        logprobs: torch.Tensor | None,  # [G, R, 1 + K] float32
        top_ids: torch.Tensor | None,  # [G, R, K]
        prompt: tuple[torch.Tensor, torch.Tensor] | None,  # [G, N, 1 + K] float32 and [G, N, K], of prompt tokens
    ):
        self.batches = batches
        self.is_decode = is_decode(batches)
        self.token_ids = token_ids
        self.num_extras = sum(part is not None for part in (logprobs, top_ids))
        parts = [token_ids, largest, *(part for part in (logprobs, top_ids) if part is not None), *(prompt or ())]
        self.copy = HostCopy(parts)

    def unread(self, dp_index: int) -> Unread:
        """Sampled tokens of this rank's group, for the next step."""
        sampled = [work.sequence for work in self.batches[dp_index] if work.samples]
        return Unread(self.token_ids[dp_index], {id(sequence): row for row, sequence in enumerate(sampled)})

    def read(self) -> list[list[RowResult]]:
        """Waits for the step (host sync); returns the results of every group in batch order."""
        token_ids, largest, *others = self.copy.wait()
        extras, prompt = others[: self.num_extras], others[self.num_extras :]
        results = []
        for group, batch in enumerate(self.batches):
            tokens, highest = token_ids[group].tolist(), largest[group].tolist()
            found, row, prompt_row = [], 0, 0
            for work in batch:
                result = RowResult()
                if work.samples:
                    nothing_allowed = highest[row] == -math.inf and may_allow_nothing(work.sequence.sampling)
                    result = RowResult(tokens[row], math.isfinite(highest[row]), nothing_allowed)
                    if wants_logprobs(work):
                        result = replace(result, logprobs=extras[0][group, row])
                        result = replace(result, top_ids=extras[1][group, row]) if len(extras) > 1 else result
                    row += 1
                count = num_prompt_rows(work)
                if count:
                    values, ids = (part[group, prompt_row : prompt_row + count] for part in prompt)
                    result = with_prompt(result, values, ids)
                    prompt_row += count
                found.append(result)
            results.append(found)
        return results


def launch(
    runner: ModelRunner, sampler: Sampler, parallel: ParallelContext, batches: Batches, previous: Launched | None
) -> Launched:
    """Launches a step. batches: of all groups. previous: the step whose tokens are unread."""
    output = runner.run(batches, None if previous is None else previous.unread(runner.dp_index))
    sampled = sampler.sample(output.logits, rows_of(output.logits, batches, runner.dp_index, parallel))
    prompt = prompt_results(runner, output, batches, parallel)
    if parallel.control.size == 1:
        logprobs, top_ids = (None if part is None else part[None] for part in (sampled.logprobs, sampled.top_ids))
        return Launched(batches, sampled.token_ids[None], sampled.largest[None], logprobs, top_ids, prompt)
    width = max(sum(work.samples for work in batch) for batch in batches)
    columns = [sampled.token_ids.int()[:, None], bits(sampled.largest)[:, None]]
    asked = [work.sequence.sampling.logprobs for batch in batches for work in batch if wants_logprobs(work)]
    top_k = max((count for count in asked if count is not None), default=None)
    if top_k is not None:
        columns.append(extra_columns(sampled.logprobs, sampled.top_ids, len(sampled.token_ids), top_k, runner.device))
    gathered = gather_groups(torch.cat(columns, dim=1), width, parallel)
    token_ids, largest = gathered[..., 0], gathered[..., 1].contiguous().view(torch.float32)
    if top_k is None:
        return Launched(batches, token_ids, largest, None, None, prompt)
    logprobs, top_ids = gathered[..., 2:].split([1 + top_k, top_k], dim=-1)
    return Launched(batches, token_ids, largest, logprobs.contiguous().view(torch.float32), top_ids, prompt)


def rows_of(logits: ShardedLogits, batches: Batches, dp_index: int, parallel: ParallelContext) -> list[Sequence | None]:
    """Sequences whose logits are the rows of `logits.local`; None for padding."""
    sampled: list[list[Sequence | None]] = [[work.sequence for work in batch if work.samples] for batch in batches]
    if parallel.holds_same_tokens(logits.group):
        return sampled[dp_index] + [None] * (logits.local.shape[0] - len(sampled[dp_index]))
    rows_per_rank = logits.local.shape[0] // logits.group.size
    rows: list[Sequence | None] = []
    for rank in logits.group.ranks:
        group = sampled[rank // parallel.attn_tp.size]
        rows += group + [None] * (rows_per_rank - len(group))
    return rows


def prompt_results(
    runner: ModelRunner, output: Output, batches: Batches, parallel: ParallelContext
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Log-likelihoods [G, N, 1 + K] float32 of prompt tokens and the ids [G, N, K] of the K most likely ones.

    Also stores logits where a sequence collects them. None if no sequence wants log-likelihoods.
    """
    if not any(work.wants_prompt_rows for batch in batches for work in batch):
        return None
    counts = [sum(map(num_prompt_rows, batch)) for batch in batches]
    asked = [work.sequence.sampling.prompt_logprobs for batch in batches for work in batch if num_prompt_rows(work)]
    top_k = max((count for count in asked if count is not None), default=None)
    parts = []
    for pieces, logits in runner.prompt_logits(output, batches):
        own = next((piece for piece in pieces if piece.group == runner.dp_index), None)
        if any(piece.work.sequence.collects_logits for piece in pieces):
            whole = logits.whole()
            if own is not None and own.work.sequence.collects_logits:
                own.work.sequence.prompt_logits.append(whole.cpu())
        if any(num_prompt_rows(piece.work) for piece in pieces):
            following = []
            if own is not None and num_prompt_rows(own.work):
                following = own.work.sequence.prompt_token_ids[own.position + 1 :][: logits.num_rows]
            ids = torch.tensor(following + [0] * (logits.num_rows - len(following)), dtype=torch.int64)
            values, top_ids = token_logprobs(logits, to_device(ids, runner.device), top_k)
            parts.append(extra_columns(values, top_ids, len(ids), top_k or 0, runner.device)[: len(following)])
    if top_k is None:
        return None
    found = torch.cat([torch.zeros(0, 1 + 2 * top_k, dtype=torch.int32, device=runner.device), *parts])
    gathered = gather_groups(found, max(counts), parallel) if parallel.control.size > 1 else found[None]
    values, top_ids = gathered.split([1 + top_k, top_k], dim=-1)
    return values.contiguous().view(torch.float32), top_ids


def extra_columns(
    logprobs: torch.Tensor | None, top_ids: torch.Tensor | None, num_rows: int, top_k: int, device: torch.device
) -> torch.Tensor:
    """[num_rows, 1 + K + K] int32: bits of log-likelihoods, then token ids, padded to the K of all groups."""
    columns = torch.zeros(num_rows, 1 + 2 * top_k, dtype=torch.int32, device=device)
    if logprobs is not None:
        columns[:, : logprobs.shape[1]] = bits(logprobs)
    if top_ids is not None:
        columns[:, 1 + top_k : 1 + top_k + top_ids.shape[1]] = top_ids.int()
    return columns


def bits(values: torch.Tensor) -> torch.Tensor:
    """float32 reinterpreted as int32, so that both travel in one exchange."""
    return values.contiguous().view(torch.int32)


def gather_groups(own: torch.Tensor, width: int, parallel: ParallelContext) -> torch.Tensor:
    """[B, N] of this rank's group -> [G, width, N] of all groups, as the first rank of each has it."""
    gathered = parallel.control.all_gather(pad_rows(own, width)).view(parallel.control.size, width, own.shape[1])
    return gathered[:: parallel.attn_tp.size]


def may_allow_nothing(sampling: SamplingParams) -> bool:
    return bool(sampling.mask or sampling.min_tokens or sampling.bad_words)


def wants_logprobs(work: Scheduled) -> bool:
    return work.samples and work.sequence.sampling.logprobs is not None


def num_prompt_rows(work: Scheduled) -> int:
    """Prompt tokens whose log-likelihoods a step computes: those that follow one of its positions."""
    sequence = work.sequence
    if sequence.sampling.prompt_logprobs is None or not work.wants_prompt_rows:
        return 0
    return min(work.end, len(sequence.prompt_token_ids) - 1) - work.num_computed


def with_prompt(result: RowResult, values: torch.Tensor, top_ids: torch.Tensor) -> RowResult:
    is_finite = result.is_finite and bool(values[:, 0].isfinite().all())
    return replace(result, is_finite=is_finite, prompt_logprobs=[values], prompt_top_ids=[top_ids])
