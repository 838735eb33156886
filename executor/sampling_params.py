# SPDX-License-Identifier: Apache-2.0
"""How the next token is chosen and when a text ends."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Settings of one request.

    max_new_tokens: tokens to generate at most. temperature: 0 takes the most likely token, whatever the other three
    filters say. top_k: keep that many, 0 for all. top_p: keep the most likely ones that reach this probability
    together. min_p: drop what is less likely than this share of the most likely one. repetition_penalty: above 1 makes
    tokens of prompt and text less likely. seed: makes sampling repeatable. stop: strings that end the text, which are
    not part of it. ignore_eos: go on to max_new_tokens.

    Raises ValueError for values out of range.
    """

    max_new_tokens: int = 32
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self):
        for key in ("max_new_tokens", "top_k", "temperature", "top_p", "min_p", "repetition_penalty", "seed"):
            kinds = int if key in ("max_new_tokens", "top_k", "seed") else (int, float)
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, kinds) and not (key == "seed" and value is None):
                raise ValueError(f"{key}: expected a {'whole ' if kinds is int else ''}number, got {value!r}")
        if not isinstance(self.stop, list | tuple) or not all(isinstance(text, str) for text in self.stop):
            raise ValueError(f"stop: expected strings in a tuple or list, got {self.stop!r}")
        object.__setattr__(self, "stop", tuple(self.stop))
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature == 0 or 1e-5 <= self.temperature < math.inf, "0, or at least 0.00001"),
            "top_k": (self.top_k >= 0, "at least 0 (0 keeps all)"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p < 1, "at least 0 and below 1"),
            "repetition_penalty": (0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"),
            "seed": (self.seed is None or 0 <= self.seed < 2**63, "at least 0 and below 2**63"),
            "stop": (all(self.stop), "not the empty string"),
        }
        for key, (valid, allowed) in checks.items():
            if not valid:
                raise ValueError(f"{key}: {getattr(self, key)!r} is impossible, must be {allowed}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0
