# SPDX-License-Identifier: Apache-2.0
"""Requests and their results."""

from dataclasses import dataclass

import torch

from executor.engine.engine import TokenEvent
from executor.engine.sequence import Sequence
from executor.engine.text_stream import TextStream, find_stop
from executor.loading.tokenizer import Tokenizer
from executor.outputs import Completion, RequestOutput, StreamChunk, TokenLogprobs


@dataclass(eq=False, kw_only=True)
class Request:
    """A prompt and the sequences of its samples."""

    request_id: str
    index: int  # of the prompt among those of one call
    prompt: str
    prompt_token_ids: list[int]
    samples: list[Sequence]

    @property
    def is_finished(self) -> bool:
        return all(sample.finish_reason for sample in self.samples)

    @property
    def is_complete(self) -> bool:
        """Whether all samples have finished, none by cancellation."""
        return all(sample.finish_reason not in (None, "cancelled") for sample in self.samples)


def request_output(request: Request, tokenizer: Tokenizer, cause: str) -> RequestOutput:
    """Result of a finished request. cause: likely cause of logits that are not finite, for errors."""
    first = request.samples[0]
    return RequestOutput(
        prompt=request.prompt,
        prompt_token_ids=request.prompt_token_ids,
        outputs=[completion(sample, tokenizer, cause) for sample in request.samples],
        num_cached_tokens=first.num_cached,
        prompt_logprobs=prompt_logprobs(first),
    )


def completion(sequence: Sequence, tokenizer: Tokenizer, cause: str) -> Completion:
    """Result of a finished sequence."""
    assert sequence.finish_reason is not None, "it has not finished"
    times = [sequence.started_s or 0.0, *sequence.token_times_s]
    intervals_ms = [(after - before) * 1e3 for before, after in zip(times, times[1:], strict=False)]
    later = intervals_ms[1:]
    return Completion(
        index=sequence.sample,
        text=final_text(sequence, tokenizer),
        token_ids=sequence.token_ids,
        finish_reason=sequence.finish_reason,
        error=error_of(sequence, cause),
        ttft_ms=intervals_ms[0] if intervals_ms else None,
        tpot_ms=sum(later) / len(later) if later else None,
        token_intervals_ms=later,
        logprobs=token_logprobs(sequence),
    )


def stream_chunk(event: TokenEvent, text: TextStream, tokenizer: Tokenizer, cause: str) -> StreamChunk:
    """Stream chunk of an event. cause: as in `request_output`."""
    sequence, token_ids = event.sequence, [] if event.token_id is None else [event.token_id]
    new_text = "".join(map(text.push, token_ids))
    if event.is_last:
        new_text += text.finish(final_text(sequence, tokenizer))
    return StreamChunk(
        index=sequence.index,
        sample=sequence.sample,
        text=new_text,
        token_ids=token_ids,
        logprobs=token_logprobs(sequence, event.position, 1) if token_ids else None,
        finish_reason=sequence.finish_reason if event.is_last else None,
        error=error_of(sequence, cause) if event.is_last else None,
        prompt_logprobs=prompt_logprobs(sequence) if sequence.sample == event.position == 0 else None,
    )


def error_of(sequence: Sequence, cause: str) -> str | None:
    """Why a sequence has ended with "error"; None if it has not. cause: as in `request_output`."""
    if sequence.finish_reason != "error":
        return None
    if sequence.mask_error is not None:
        return sequence.mask_error
    if not sequence.nothing_allowed:
        return not_finite(f"new token {len(sequence.token_ids) + 1}", cause)
    mask = "its mask, " if sequence.sampling.mask is not None else ""
    return f"no token is allowed by {mask}min_tokens and bad_words"


def final_text(sequence: Sequence, tokenizer: Tokenizer) -> str:
    """Text of a sequence, up to the stop string that ended it."""
    text, sampling = tokenizer.decode(sequence.token_ids), sequence.sampling
    if sequence.finish_reason != "stop" or not sampling.stop:
        return text
    before = tokenizer.decode(sequence.token_ids[: max(0, sampling.min_tokens - 1)])
    ends = [find_stop(text, before, stop) for stop in sampling.stop]
    return text[: min((end for end in ends if end >= 0), default=None)]


def not_finite(where: str, cause: str) -> str:
    return f"the logits of {where} are not finite (NaN or infinity): {cause}"


def token_logprobs(sequence: Sequence, first: int = 0, count: int | None = None) -> list[TokenLogprobs] | None:
    """Log-likelihoods of `count` generated tokens from the `first` on, or all; None if they were not asked for."""
    top_k = sequence.sampling.logprobs
    if top_k is None:
        return None
    part = slice(first, None if count is None else first + count)
    rows = zip(sequence.token_ids[part], sequence.logprobs[part], sequence.top_ids[part], strict=True)
    return [as_logprobs(*row, top_k) for row in rows]


def prompt_logprobs(sequence: Sequence) -> list[TokenLogprobs | None] | None:
    """Log-likelihoods of the prompt's tokens; None if they were not asked for."""
    top_k = sequence.sampling.prompt_logprobs
    if top_k is None or sequence.finish_reason in ("error", "cancelled"):
        return None
    values = [row for part in sequence.prompt_logprobs for row in part]
    top_ids = [row for part in sequence.prompt_top_ids for row in part]
    rows = zip(sequence.prompt_token_ids[1:], values, top_ids, strict=True)
    return [None, *(as_logprobs(*row, top_k) for row in rows)]


def as_logprobs(token_id: int, values: torch.Tensor, top_ids: torch.Tensor | None, top_k: int) -> TokenLogprobs:
    chosen, *top = values[: 1 + top_k].tolist()
    ids = [] if top_ids is None else top_ids[:top_k].tolist()
    return TokenLogprobs(token_id=token_id, logprob=chosen, top=list(zip(ids, top, strict=True)))
