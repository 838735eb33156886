# SPDX-License-Identifier: Apache-2.0
"""Incremental detokenization: whole characters, without what may become a stop string."""

from tokenizers.decoders import DecodeStream

from executor.loading.tokenizer import Tokenizer
from executor.sampling_params import SamplingParams


class TextStream:
    """Incremental detokenizer of one sequence."""

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams):
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.num_tokens = 0
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.held = ""  # decoded text that is not yet returned
        self.returned = ""

    def push(self, token_id: int) -> str:
        """Adds a token; returns the text that is complete now."""
        self.num_tokens += 1
        before = len(self.held)
        if self.tokenizer.can_decode and self.tokenizer.knows(token_id):
            self.held += self.decoder.step(self.tokenizer.backend, token_id) or ""
        if self.num_tokens < self.sampling.min_tokens:
            before = len(self.held)
        ready = len(self.held) - longest_overlap(self.held, self.sampling.stop, before)
        text, self.held = self.held[:ready], self.held[ready:]
        self.returned += text
        return text

    def finish(self, final_text: str) -> str:
        """The rest of the final text, which ends before a stop string."""
        return final_text[len(self.returned) :] if final_text.startswith(self.returned) else ""


def longest_overlap(text: str, stops: tuple[str, ...], before: int = 0) -> int:
    """Characters at the end of `text` from the first possible beginning of a stop string, or from a whole one that ends
    after the first `before` characters."""
    found = 0
    for stop in stops:
        position = text.find(stop, max(0, before - len(stop) + 1))
        if position >= 0:
            found = max(found, len(text) - position)
        for length in range(min(len(stop) - 1, len(text)), found, -1):
            if text.endswith(stop[:length]):
                found = length
                break
    return found


def find_stop(text: str, before: str, stop: str) -> int:
    """Position of a stop string that ends after `before`, the beginning of `text`; -1 if there is none.

    `before` may end within a character, which is then decoded as U+FFFD.
    """
    return text.find(stop, max(0, len(before.rstrip("\ufffd")) - len(stop) + 1))
