# SPDX-License-Identifier: Apache-2.0
"""Sampling parameters and stop conditions of a request."""

import math
from dataclasses import dataclass
from typing import Any

from executor.utils.known_names import hint
from executor.utils.text import quoted
from executor.utils.values import is_unicode

WHOLE = ("max_new_tokens", "top_k", "seed")
NUMBERS = (*WHOLE, "temperature", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request.

    They replace the LLM's defaults (data_config) entirely: an omitted parameter has the default below, not that of the
    LLM's settings or the checkpoint.

    max_new_tokens: maximum number of generated tokens. temperature: 0 is greedy decoding, which ignores top_k, top_p
    and min_p. top_k: sample from the k most likely tokens, 0 for all. top_p: nucleus sampling, from the smallest set
    of most likely tokens whose cumulative probability reaches top_p. min_p: minimum probability relative to the most
    likely token. repetition_penalty: above 1 penalizes tokens of the prompt and the output. seed: makes sampling
    reproducible. stop: strings that end the output, which does not include them. ignore_eos: continue after EOS up to
    max_new_tokens.

    Raises ValueError for values of a wrong type or range, TypeError for unknown parameters.
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

    def __new__(cls, **settings: Any) -> "SamplingParams":
        for key in settings:
            if key not in cls.__dataclass_fields__:
                advice = hint(key) or f"possible are {', '.join(cls.__dataclass_fields__)}"
                advice = advice.replace("data_config.", "")
                raise TypeError(f"SamplingParams: {quoted(key)}: unknown setting; {advice}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for key in NUMBERS:
            value = getattr(self, key)
            if not (key == "seed" and value is None):
                object.__setattr__(self, key, number(key, value))
        if not isinstance(self.stop, list | tuple) or not all(isinstance(text, str) for text in self.stop):
            raise ValueError(f"stop: expected strings in a tuple or list, got {quoted(self.stop)}")
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos: expected True or False, got {quoted(self.ignore_eos)}")
        object.__setattr__(self, "stop", tuple(self.stop))
        checks = {
            "max_new_tokens": (1 <= self.max_new_tokens < 2**31, "at least 1 and below 2**31"),
            "temperature": (self.temperature == 0 or 1e-5 <= self.temperature < math.inf, "0, or at least 0.00001"),
            "top_k": (0 <= self.top_k < 2**31, "at least 0 (0 keeps all) and below 2**31"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p < 1, "at least 0 and below 1"),
            "repetition_penalty": (0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"),
            "seed": (self.seed is None or 0 <= self.seed < 2**63, "at least 0 and below 2**63"),
            "stop": (all(self.stop), "not the empty string"),
        }
        for key, (valid, allowed) in checks.items():
            if not valid:
                raise ValueError(f"{key}: {quoted(getattr(self, key))} is impossible, must be {allowed}")
        for text in self.stop:
            if not is_unicode(text):
                raise ValueError(f"stop: {quoted(text)} holds half of a surrogate pair, which no text can contain")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def number(key: str, value: Any) -> int | float:
    """Converts the value of `key` to a plain int or float; ValueError for other types."""
    kinds = int if key in WHOLE else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ValueError(f"{key}: expected a {'whole ' if kinds is int else ''}number, got {quoted(value)}")
    if kinds is int:
        return int(value)
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{key}: {quoted(value)} is impossible, must be a finite number") from None
