# SPDX-License-Identifier: Apache-2.0
"""State of one sequence, from its prompt to its last token."""

from dataclasses import dataclass, field
from random import Random

import torch

from executor.engine.block_pool import block_digest
from executor.sampling_params import SamplingParams
from ops.step import BLOCK_SIZE


@dataclass(eq=False, kw_only=True)
class Sequence:
    """One sample of a request: its tokens, cache blocks, progress and results.

    Tokens are computed in order; `num_computed` counts those whose keys and values are cached, or will be when the
    steps in flight are done. A sampled token is unread while the host does not know it yet.
    """

    request_id: str
    index: int = 0  # of the prompt among those of one call
    sample: int = 0  # of the request's `n`
    prompt_token_ids: list[int]
    sampling: SamplingParams
    random: Random | None = None  # None for greedy decoding
    bad_word_ids: list[list[int]] = field(default_factory=list)
    collects_logits: bool = False  # whether the logits of all prompt positions are kept in `prompt_logits`

    token_ids: list[int] = field(default_factory=list)  # generated
    num_unread: int = 0  # generated tokens that are only on the device
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_verified: int = 0  # computed tokens that are known to be finite
    num_registered: int = 0  # blocks that the prefix cache knows
    num_cached: int = 0  # prompt tokens found in the prefix cache when it was first admitted
    num_in_flight: int = 0  # launched steps with tokens of this sequence that have not been read
    is_suspect: bool = False  # whether its cache may hold NaN or infinity
    digests: list[bytes] = field(default_factory=list)  # of its full blocks
    mask_error: str | None = None  # why `sampling.mask` gave no allowed token, on ranks that called it
    nothing_allowed: bool = False  # whether it ended because no token was allowed, though its logits were finite
    finish_reason: str | None = None  # "stop", "length", "cancelled" or "error"
    started_s: float | None = None
    token_times_s: list[float] = field(default_factory=list)
    logprobs: list[torch.Tensor] = field(default_factory=list)  # per token [1 + K]: of it, of the K most likely
    top_ids: list[torch.Tensor | None] = field(default_factory=list)  # per token [K]
    prompt_logprobs: list[torch.Tensor] = field(default_factory=list)  # [N, 1 + K] of each step
    prompt_top_ids: list[torch.Tensor] = field(default_factory=list)  # [N, K] of each step
    prompt_logits: list[torch.Tensor] = field(default_factory=list)  # [N, V] of each step, on the CPU

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) + self.num_unread

    @property
    def length(self) -> int:
        """Tokens of prompt and output, read or not."""
        return len(self.prompt_token_ids) + self.num_generated

    @property
    def max_len(self) -> int:
        """Maximum number of cached tokens; the last generated token is never cached."""
        return len(self.prompt_token_ids) + self.sampling.max_new_tokens - 1

    @property
    def num_pending(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return self.length - self.num_computed

    @property
    def wants_prompt_rows(self) -> bool:
        """Whether the logits of all prompt positions are needed, so that none may come from the prefix cache."""
        return self.collects_logits or self.sampling.prompt_logprobs is not None

    def tokens(self, start: int, end: int) -> list[int]:
        """Known token ids of positions `start` to `end`; fewer if the last ones are unread."""
        prompt_len = len(self.prompt_token_ids)
        if start >= prompt_len:
            return self.token_ids[start - prompt_len : end - prompt_len]
        return self.prompt_token_ids[start:end] + self.token_ids[: max(0, end - prompt_len)]

    def block_digests(self, count: int) -> list[bytes]:
        """Digests of the first `count` blocks, whose tokens must be known."""
        while len(self.digests) < count:
            start = len(self.digests) * BLOCK_SIZE
            previous = self.digests[-1] if self.digests else b""
            self.digests.append(block_digest(previous, self.tokens(start, start + BLOCK_SIZE)))
        return self.digests[:count]
