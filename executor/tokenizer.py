# SPDX-License-Identifier: Apache-2.0
"""Text to tokens and back, by the checkpoint's own tokenizer and chat template."""

import json
import logging
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Messages = list[dict[str, str]]  # [{"role": "user", "content": "..."}, ...]


class Tokenizer:
    """Encodes prompts within a length limit and decodes tokens; knows which tokens end a text.

    A checkpoint without tokenizer files works with token ids: texts raise ValueError, decoded text is empty.
    """

    def __init__(self, model_path: Path, input_max_len: int, long_prompt: str, enable_thinking: bool):
        self.model_path = model_path
        self.loaded = load_tokenizer(model_path) if has_tokenizer(model_path) else None
        self.input_max_len = input_max_len
        self.long_prompt = long_prompt
        self.enable_thinking = enable_thinking
        self.eos_token_ids = eos_token_ids(model_path, self.loaded)

    @property
    def can_decode(self) -> bool:
        return self.loaded is not None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self.loaded is None:
            raise ValueError(f"model_path: {self.model_path} has no tokenizer, only token ids can be given")
        return self.loaded

    def encode(self, text: str) -> list[int]:
        """Tokens of plain text, cut to the limit or refused (ValueError) as the settings say."""
        return self.fit(self.tokenizer.encode(text), text, self.tokenizer.encode)

    def encode_chat(self, messages: Messages) -> list[int]:
        """Tokens of a conversation in the chat template, ready for the answer; the longest message is what is cut."""
        if self.tokenizer.chat_template is None:
            raise ValueError("data_config.chat_template: this checkpoint's tokenizer has none, set it to False")
        longest = max(range(len(messages)), key=lambda i: len(messages[i]["content"]))

        def render(content: str) -> list[int]:
            changed = [{**m, "content": content} if i == longest else m for i, m in enumerate(messages)]
            text = self.tokenizer.apply_chat_template(
                changed, tokenize=False, add_generation_prompt=True, enable_thinking=self.enable_thinking
            )
            return self.tokenizer.encode(text, add_special_tokens=False)

        content = messages[longest]["content"]
        return self.fit(render(content), content, render)

    def fit(self, token_ids: list[int], text: str, encode: Any) -> list[int]:
        """`token_ids` if they are within the limit; otherwise `text` loses tokens in its middle until `encode` fits."""
        original_len = len(token_ids)
        if original_len == 0:
            raise ValueError("a prompt is empty: it has no tokens")
        if original_len <= self.input_max_len:
            return token_ids
        if self.long_prompt == "refuse":
            raise ValueError(
                f"a prompt has {original_len} tokens, data_config.input_max_len is {self.input_max_len} "
                "(data_config.long_prompt: cut would cut it)"
            )
        kept = self.tokenizer.encode(text, add_special_tokens=False)
        while len(token_ids) > self.input_max_len:
            keep = len(kept) - (len(token_ids) - self.input_max_len)
            if keep < 1:
                raise ValueError(f"data_config.input_max_len: {self.input_max_len} leaves no room beside the template")
            kept = kept[: keep - keep // 2] + kept[len(kept) - keep // 2 :]
            halves = kept[: keep - keep // 2], kept[keep - keep // 2 :]
            token_ids = encode("".join(whole_characters(self.tokenizer.decode(half)) for half in halves))
            if not token_ids:
                raise ValueError(
                    f"data_config.input_max_len: {self.input_max_len} is less than one character of a prompt"
                )
        logger.warning("a prompt of %d tokens was cut in the middle to %d", original_len, len(token_ids))
        return token_ids

    def decode(self, token_ids: list[int]) -> str:
        """Text of generated tokens, without special tokens."""
        if self.loaded is None:
            return ""
        known = [token_id for token_id in token_ids if token_id < len(self.tokenizer)]  # the model may have spare rows
        return self.tokenizer.decode(known, skip_special_tokens=True)


def whole_characters(text: str) -> str:
    """Without the marks of characters whose bytes were cut at the ends."""
    return text.strip("\N{REPLACEMENT CHARACTER}")


def check_messages(messages: Messages) -> None:
    """ValueError unless it is a list of messages with a role and a text."""
    valid = isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    )
    if not valid or not messages:
        raise ValueError(f'messages: expected [{{"role": "user", "content": "..."}}, ...], got {messages!r}')


def has_tokenizer(model_path: Path) -> bool:
    return any((model_path / name).is_file() for name in ("tokenizer.json", "vocab.json"))


def load_tokenizer(model_path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder; ValueError if it cannot be read."""
    try:
        return AutoTokenizer.from_pretrained(str(model_path), local_files_only=True)
    except Exception as error:  # transformers raises many types for a missing or broken tokenizer
        raise ValueError(f"model_path: no tokenizer could be read from {model_path}: {first_line(error)}") from None


def eos_token_ids(model_path: Path, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """Every token that ends a text according to generation_config.json or the tokenizer."""
    stated = read_generation_config(model_path).get("eos_token_id")
    stated = stated if isinstance(stated, list) else [stated]
    if not all(token_id is None or type(token_id) is int for token_id in stated):
        raise ValueError(f"{model_path}/generation_config.json: eos_token_id: expected whole numbers, got {stated!r}")
    tokenizers_own = None if tokenizer is None else tokenizer.eos_token_id
    return frozenset(token_id for token_id in (*stated, tokenizers_own) if token_id is not None)


def read_generation_config(model_path: Path) -> dict[str, Any]:
    """generation_config.json, or nothing if the checkpoint has none; ValueError if it is not JSON."""
    file = model_path / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected a JSON object")
    return found


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
