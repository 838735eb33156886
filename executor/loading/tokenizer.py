# SPDX-License-Identifier: Apache-2.0
"""Tokenizer of a checkpoint: encoding, with or without the chat template, decoding, EOS token ids."""

import logging
import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from executor.loading.chat_template import ChatTemplate
from executor.loading.prompts import Messages, check_text
from executor.loading.shorten import fewest_turns_left_out, shorten, shown_pieces
from executor.utils.reading import read_json_object, read_text, refusing
from executor.utils.text import one_line, quoted

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

QWEN_TOKENIZERS = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
PROBED = 16  # characters for each token of the limit, of a text that may be far too long
# all files that transformers may read for a tokenizer
TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.jinja "
    "chat_template.json vocab.json merges.txt config.json"
).split()


class Tokenizer:
    """Encodes prompts within a length limit and decodes tokens; holds the EOS token ids.

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
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        if self.loaded is None:
            raise ValueError(
                f"model_path: {self.model_path} has no tokenizer, only token ids can be given, from Python"
            )
        return self.loaded

    def encode(self, text: str, name: str = "the prompt") -> list[int]:
        """Encodes plain text.

        Beyond `input_max_len` tokens its middle is cut out, or, with `long_prompt` "refuse", ValueError is raised.

        name: the prompt in errors and warnings.
        """
        token_ids = self.tokens_of(text, name, self.tokenizer.encode)
        if self.fits(token_ids, name):
            return token_ids
        whole = [(0, len(text))]
        shortened, _ = shorten(text, token_ids, whole, self.input_max_len, self.tokenizer.encode, self.tokenizer)
        if not 0 < len(shortened) <= self.input_max_len:
            raise ValueError(
                f"{name}: data_config.input_max_len: {self.input_max_len} is less than one character of its text"
            )
        logger.warning("%s of %d tokens was cut in the middle to %d", name, len(token_ids), len(shortened))
        return shortened

    def encode_whole(self, text: str, name: str, vocab_size: int) -> list[int]:
        """Encodes a text of any length; ValueError for tokens that a model of `vocab_size` does not have."""
        token_ids = self.tokens_of(text, name, lambda text: self.tokenizer.encode(text, verbose=False))
        if max(token_ids) >= vocab_size:
            raise ValueError(f"{name}: the tokenizer gives token {max(token_ids)}, the model has 0 to {vocab_size - 1}")
        return token_ids

    def encode_chat(self, messages: Messages, name: str = "the prompt") -> list[int]:
        """Encodes a conversation with the chat template, including the generation prompt.

        Beyond `input_max_len` tokens it drops as few of the oldest turns as needed, or, with `long_prompt` "refuse",
        raises ValueError.
        System messages and the last user message with what follows it are kept; if these alone are too long, the
        middles of their longest texts are cut out, only where the template renders them. The template's own markup is
        kept, and text that it drops never appears. name: the prompt in errors and warnings.
        """
        if self.tokenizer.chat_template is None:
            raise ValueError("data_config.chat_template: this checkpoint's tokenizer has none, set it to False")
        template = ChatTemplate(self.tokenizer, self.model_path, self.enable_thinking, name)

        @lru_cache(maxsize=2)
        def tokens(text: str) -> list[int]:
            return self.tokenizer.encode(text, add_special_tokens=False)

        limit = self.input_max_len
        token_ids = self.tokens_of(template.render(messages), name, tokens)
        if self.fits(token_ids, name):
            return token_ids
        kept, num_left_out, num_turns = fewest_turns_left_out(
            messages, lambda kept: len(tokens(template.render(kept))) <= limit
        )
        text = template.render(kept)
        shortened, num_cut = tokens(text), 0
        if len(shortened) > limit:
            pieces = shown_pieces(kept, text, template.render, self.tokenizer)
            shortened, num_cut = shorten(text, shortened, pieces, limit, tokens, self.tokenizer)
        if len(shortened) > limit:
            raise ValueError(
                f"{name} has {len(token_ids)} tokens, data_config.input_max_len: {limit} leaves no room beside the "
                f"template: cut as far as possible it is {len(shortened) - limit} tokens too long"
            )
        logger.warning(
            "%s of %d tokens was cut to %d: %d of %d earlier turns left out, %d texts cut in the middle",
            *(name, len(token_ids), len(shortened), num_left_out, num_turns, num_cut),
        )
        return shortened

    def tokens_of(self, text: str, name: str, encode: Any) -> list[int]:
        """Encodes a prompt's text; ValueError if it has no tokens, or far too many and `long_prompt` is "refuse"."""
        check_text(text, name)
        problem, limit = f"tokenizer of {self.model_path}", self.input_max_len
        if self.long_prompt == "refuse" and len(text) > PROBED * limit:  # megabytes would take many seconds
            with refusing(name, problem):
                count = len(encode(text[: PROBED * limit]))
            if count > 2 * limit:  # surely too long, though the last tokens depend on what follows
                raise ValueError(
                    f"{name} has more than {count // 2} tokens, data_config.input_max_len is {limit} "
                    "(data_config.long_prompt: cut would cut it)"
                )
        with refusing(name, problem):
            token_ids = encode(text)
        if not token_ids:
            raise ValueError(f"{name} is empty: it has no tokens")
        return token_ids

    def fits(self, token_ids: list[int], name: str) -> bool:
        """Returns whether a prompt is within `input_max_len`; ValueError if it is not and `long_prompt` is "refuse"."""
        too_many = len(token_ids) - self.input_max_len
        if too_many > 0 and self.long_prompt == "refuse":
            raise ValueError(
                f"{name} has {len(token_ids)} tokens, data_config.input_max_len is {self.input_max_len} "
                f"({too_many} too many; data_config.long_prompt: cut would cut it)"
            )
        return too_many <= 0

    def bad_word_ids(self, text: str) -> list[list[int]]:
        """Token ids of a text as it stands at the beginning of a line and after a space."""
        spellings = (text, f" {text.lstrip()}")
        return [self.tokenizer.encode(spelling, add_special_tokens=False) for spelling in spellings]

    @property
    def backend(self) -> Any:
        """The underlying tokenizer of the tokenizers library, for incremental decoding."""
        return self.tokenizer.backend_tokenizer

    def knows(self, token_id: int) -> bool:
        """Returns whether the tokenizer has this token: the model's vocabulary may be padded."""
        return 0 <= token_id < len(self.tokenizer)

    def decode(self, token_ids: list[int]) -> str:
        """Decodes generated tokens; special tokens and ids beyond the tokenizer's vocabulary are skipped."""
        if self.loaded is None:
            return ""
        num_tokens = len(self.loaded)  # the embedding may be padded
        known = [token_id for token_id in token_ids if 0 <= token_id < num_tokens]
        return self.loaded.decode(known, skip_special_tokens=True)


def has_tokenizer(model_path: Path) -> bool:
    return any(os.path.lexists(model_path / name) for name in ("tokenizer.json", "vocab.json"))


def load_tokenizer(model_path: Path) -> "PreTrainedTokenizerBase":
    """Loads a checkpoint folder's tokenizer; ValueError if it cannot be read. Never runs code from the folder."""
    for file in (model_path / name for name in TOKENIZER_FILES):
        if os.path.lexists(file):
            read_text(file)  # the error names the file; a device or pipe is rejected instead of blocking
    problem = f"no tokenizer could be read from {model_path}"
    try:
        with refusing("model_path", problem):
            tokenizer = from_pretrained(model_path)
            tokenizer.encode("a")
        return tokenizer
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of the tokenizers library; not derived from Exception
            raise
        raise ValueError(one_line(f"model_path: {problem}: {error}")) from None


def from_pretrained(model_path: Path) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer of the class that transformers selects."""
    from transformers import Qwen2Tokenizer, Qwen3MoeConfig

    config, own = (
        read_json_object(file) if file.exists() else {}
        for file in (model_path / "config.json", model_path / "tokenizer_config.json")
    )
    is_qwen3_moe = config.get("model_type") == "qwen3_moe"
    if is_qwen3_moe and own.get("tokenizer_class") in QWEN_TOKENIZERS and "auto_map" not in own:
        return Qwen2Tokenizer.from_pretrained(str(model_path), local_files_only=True)
    from transformers import AutoTokenizer  # takes seconds to import

    minimal = None
    if is_qwen3_moe:  # without it, a config of all keys is built, even ignored ones: num_labels of 10**12 labels
        name = config.get("tokenizer_class")
        minimal = Qwen3MoeConfig(tokenizer_class=name if isinstance(name, str) else None)
    return AutoTokenizer.from_pretrained(
        str(model_path), config=minimal, local_files_only=True, trust_remote_code=False
    )


def eos_token_ids(model_path: Path, tokenizer: "PreTrainedTokenizerBase | None") -> frozenset[int]:
    """EOS token ids: all those of the generation config and the tokenizer."""
    file, generation = read_generation_config(model_path)
    stated = generation.eos_token_id
    stated = [token_id for token_id in (stated if isinstance(stated, list) else [stated]) if token_id is not None]
    for token_id in stated:
        if type(token_id) is not int:
            raise ValueError(f"{file}: eos_token_id: expected whole numbers, got {quoted(token_id)}")
    tokenizers_own = None if tokenizer is None else tokenizer.eos_token_id
    return frozenset(stated if tokenizers_own is None else [*stated, tokenizers_own])


def read_generation_config(model_path: Path) -> tuple[Path, "GenerationConfig"]:
    """Reads a checkpoint's generation config as transformers does; returns the file's path and the config.

    It is generation_config.json, else config.json: an existing generation_config.json replaces config.json entirely,
    even if it has fewer keys. ValueError if the file is not a JSON object or transformers rejects it.
    """
    from transformers import GenerationConfig

    file = model_path / "generation_config.json"
    parse = GenerationConfig.from_dict
    if not os.path.lexists(file):
        file, parse = model_path / "config.json", GenerationConfig.from_model_config
        if not file.exists():
            return file, GenerationConfig()
    raw = read_json_object(file)
    with refusing(str(file), "generation settings"):
        return file, parse(raw)
