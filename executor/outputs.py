# SPDX-License-Identifier: Apache-2.0
"""Results of requests: what `LLM.generate` returns and what streams yield."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Log-likelihood of a token under the model's own distribution, before penalties and temperature.

    top: the most likely tokens of its position, (token id, log-likelihood), as many as were asked for.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sample of a request. Times are in milliseconds.

    ttft_ms: from the start of the prompt's prefill to the first token. tpot_ms: mean time per token after the first,
    None if there is only one. token_intervals_ms: the times that tpot_ms is the mean of.
    finish_reason: "stop", "length", "cancelled", or "error" if its logits were not finite or no token was allowed:
    `error` then says why, the tokens before are kept, and ttft_ms is None if there is none. logprobs: per token, if
    asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    error: str | None = None
    ttft_ms: float | None
    tpot_ms: float | None
    token_intervals_ms: list[float]
    logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """A finished request; its text, token_ids and so on are those of the first sample.

    num_cached_tokens: prompt tokens found in the prefix cache. prompt_logprobs: per prompt token, if asked for; None
    for the first one.
    """

    prompt: str
    prompt_token_ids: list[int]
    outputs: list[Completion]
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.outputs[0].finish_reason

    @property
    def error(self) -> str | None:
        return self.outputs[0].error

    @property
    def ttft_ms(self) -> float | None:
        return self.outputs[0].ttft_ms

    @property
    def tpot_ms(self) -> float | None:
        return self.outputs[0].tpot_ms

    @property
    def token_intervals_ms(self) -> list[float]:
        return self.outputs[0].token_intervals_ms

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        return self.outputs[0].logprobs


@dataclass(frozen=True, kw_only=True)
class StreamChunk:
    """New part of one sample: whole characters of text, token ids, log-likelihoods if asked for.

    The texts of a sample's chunks make up its final text. finish_reason, and error as in `Completion`, are set in its
    last chunk, prompt_logprobs as in `RequestOutput` in the first chunk of sample 0.
    """

    index: int  # of the prompt
    sample: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    error: str | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
