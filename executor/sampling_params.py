# SPDX-License-Identifier: Apache-2.0
"""Sampling parameters and stop conditions of a request."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from executor.utils.known_names import hint
from executor.utils.text import quoted
from executor.utils.values import is_unicode

if TYPE_CHECKING:  # settings are checked before torch is loaded
    import torch

    Mask = Callable[[Sequence[int]], torch.Tensor | None]
else:
    Mask = Callable[[Sequence[int]], Any]

WHOLE = ("max_new_tokens", "top_k", "seed", "n", "logprobs", "prompt_logprobs", "min_tokens")
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
NUMBERS = (*WHOLE, *PENALTIES, "temperature", "top_p", "min_p")
TEXTS = ("stop", "bad_words")
MAX_SAMPLES = 16384
MAX_LOGPROBS = 100
MAX_TOKEN_ID = 2**31 - 1


class FrozenDict(dict[int, float]):
    """A dict that cannot be changed."""

    def _refuse(self, *arguments: Any, **named: Any) -> Any:
        raise TypeError("sampling parameters are read-only: dataclasses.replace makes new ones")

    refuse: Any = _refuse
    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = refuse

    def __reduce__(self) -> Any:
        return FrozenDict, (dict(self),)

    def __hash__(self) -> int:  # type: ignore[override] # of a frozen class
        return hash(frozenset(self.items()))


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request.

    They replace the LLM's defaults (data_config) entirely: a parameter that is omitted or None has the default below,
    not that of the LLM's settings or the checkpoint.

    Length and end:
    max_new_tokens: maximum number of generated tokens. min_tokens: before so many tokens, neither end tokens nor
    stop_token_ids are chosen, and stop strings do not end the output. stop: strings that end the output, which does not
    include them. stop_token_ids: tokens that end it besides the checkpoint's end tokens. ignore_eos: continue after EOS
    up to max_new_tokens.

    Choice of a token:
    temperature: 0 is greedy decoding, which ignores top_k, top_p and min_p. top_k: sample from the k most likely
    tokens, 0 for all. top_p: nucleus sampling, from the smallest set of most likely tokens whose cumulative probability
    reaches top_p. min_p: minimum probability relative to the most likely token. seed: makes sampling reproducible.
    repetition_penalty: above 1 penalizes tokens of the prompt and the output. presence_penalty, frequency_penalty:
    subtracted from the logits of tokens of the output, once or for each occurrence. logit_bias: added to the logits of
    these token ids. bad_words: texts whose token sequences are never completed. mask: called before each token with the
    token ids generated so far, must not change them; returns which tokens are allowed, a bool tensor [V] on the CPU, or
    None for all.

    Results:
    n: number of samples. logprobs: return the log-likelihood of each token, and the k most likely tokens beside it.
    prompt_logprobs: the same for the tokens of the prompt.

    Raises ValueError for values of a wrong type or range, TypeError for unknown parameters.
    """

    max_new_tokens: int = 32
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    ignore_eos: bool = False
    mask: Mask | None = None

    def __new__(cls, **settings: Any) -> "SamplingParams":
        for key in settings:
            if key not in cls.__dataclass_fields__:
                advice = hint(key) or f"possible are {', '.join(cls.__dataclass_fields__)}"
                advice = advice.replace("data_config.", "")
                raise TypeError(f"SamplingParams: {quoted(key)}: unknown setting; {advice}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            value = field.default if value is None else converted(field.name, value)
            object.__setattr__(self, field.name, value)
        checks = {
            "max_new_tokens": (1 <= self.max_new_tokens < 2**31, "at least 1 and below 2**31"),
            "temperature": (self.temperature == 0 or 1e-5 <= self.temperature <= 1e5, "0, or from 0.00001 to 100000"),
            "top_k": (0 <= self.top_k < 2**31, "at least 0 (0 keeps all) and below 2**31"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p < 1, "at least 0 and below 1"),
            "repetition_penalty": (0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "from -2 to 2"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "from -2 to 2"),
            "seed": (self.seed is None or 0 <= self.seed < 2**63, "at least 0 and below 2**63"),
            "n": (1 <= self.n <= MAX_SAMPLES, f"from 1 to {MAX_SAMPLES}"),
            "logprobs": (0 <= (self.logprobs or 0) <= MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}"),
            "prompt_logprobs": (0 <= (self.prompt_logprobs or 0) <= MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}"),
            "min_tokens": (
                0 <= self.min_tokens <= self.max_new_tokens,
                f"at least 0 and at most max_new_tokens ({quoted(self.max_new_tokens)})",
            ),
            "stop": (all(self.stop), "not the empty string"),
            "bad_words": (all(self.bad_words), "not the empty string"),
        }
        for key, (valid, allowed) in checks.items():
            if not valid:
                raise ValueError(f"{key}: {quoted(getattr(self, key))} is impossible, must be {allowed}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def converted(key: str, value: Any) -> Any:
    """Checks the type of a parameter's value and makes it a plain, immutable one; ValueError."""
    if key in NUMBERS:
        return number(key, value)
    if key in TEXTS:
        return texts(key, value)
    if key == "stop_token_ids":
        if not isinstance(value, list | tuple):
            raise ValueError(f"{key}: expected token ids in a tuple or list, got {quoted(value)}")
        return tuple(token_id(key, item) for item in value)
    if key == "logit_bias":
        return biases(key, value)
    if key == "ignore_eos" and not isinstance(value, bool):
        raise ValueError(f"{key}: expected True or False, got {quoted(value)}")
    if key == "mask" and not callable(value):
        raise ValueError(f"{key}: expected a function of the generated token ids, got {quoted(value)}")
    return value


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


def texts(key: str, value: Any) -> tuple[str, ...]:
    """Tuple of texts; ValueError for other types and for what no text can contain."""
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{key}: expected strings in a tuple or list, got {quoted(value)}")
    for text in value:
        if not is_unicode(text):
            raise ValueError(f"{key}: {quoted(text)} holds half of a surrogate pair, which no text can contain")
    return tuple(value)


def token_id(key: str, value: Any) -> int:
    """A token id; whether the vocabulary has it is checked by the LLM."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{key}: expected token ids, which are whole numbers, got {quoted(value)}")
    if not 0 <= value <= MAX_TOKEN_ID:
        raise ValueError(f"{key}: token id {quoted(value)} is impossible, must be at least 0 and below 2**31")
    return int(value)


def biases(key: str, value: Any) -> FrozenDict:
    """Read-only copy of token ids and what is added to their logits; ValueError for other types and ranges."""
    if not isinstance(value, dict):
        raise ValueError(f"{key}: expected a dict of token ids and numbers, got {quoted(value)}")
    found = {token_id(key, item): number(key, bias) for item, bias in value.items()}
    for item, bias in found.items():
        if not -100 <= bias <= 100:
            raise ValueError(f"{key}: {bias} for token {item} is impossible, must be from -100 to 100")
    return FrozenDict(found)
