# SPDX-License-Identifier: Apache-2.0
"""Validation and normalization of prompts: texts, token ids and conversations."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from executor.utils.text import quoted

TokenIds = list[int] | tuple[int, ...] | range | np.ndarray | torch.Tensor
Prompt = str | TokenIds
Message = dict[str, Any]  # {"role": "user", "content": "..."} and any keys that the template uses
Messages = list[Message] | tuple[Message, ...]

MAX_TOKEN_IDS = 1 << 24  # of one sequence, as many as a prompt may have characters
ACCEPTED = "a text, token ids (a list, tuple or range of whole numbers, an integer array or tensor), or a list of those"
CONVERSATION = '[{"role": "user", "content": "..."}, ...]'


def which(index: int, count: int) -> str:
    """Name of a prompt in errors and warnings."""
    return "the prompt" if count == 1 else f"prompt {index + 1} of {count}"


def prompt_list(prompts: Any) -> list[str | list[int]]:
    """Normalizes the prompts of `generate` to a list of texts and token id lists; TypeError for other types."""
    if isinstance(prompts, str) or is_row(prompts):
        prompts = [prompts]
    elif is_array(prompts) and prompts.ndim == 2:  # several prompts of one length
        prompts = list(prompts)
    if not isinstance(prompts, list | tuple):
        raise TypeError(f"prompts: expected {ACCEPTED}, got {described(prompts)}")
    return [
        str(prompt) if isinstance(prompt, str) else token_id_list(prompt, which(index, len(prompts)))
        for index, prompt in enumerate(prompts)
    ]


def token_id_list(value: Any, name: str = "token_ids") -> list[int]:
    """Converts the token ids of one sequence to a list of ints. name: the sequence in errors.

    Raises TypeError unless it is a list, tuple or range of whole numbers, or an integer array or tensor of one
    dimension, ValueError for more than MAX_TOKEN_IDS.
    """
    if not is_row(value) and not (isinstance(value, list | tuple) and not value):
        raise TypeError(f"{name}: expected {ACCEPTED}, got {described(value)}")
    if len(value[: MAX_TOKEN_IDS + 1]) > MAX_TOKEN_IDS:  # a range has no length beyond sys.maxsize
        raise ValueError(f"{name}: more than {MAX_TOKEN_IDS} token ids")
    token_ids = value.tolist() if is_array(value) else value
    for token_id in token_ids:
        if type(token_id) is not int and not is_whole_number(token_id):
            raise TypeError(f"{name}: token ids must be whole numbers, one is {described(token_id)}")
    return [int(token_id) for token_id in token_ids]


def is_row(value: Any) -> bool:
    """Returns whether `value` is the token ids of one sequence, judged by its first element."""
    if is_array(value):
        return value.ndim == 1
    return isinstance(value, range) or isinstance(value, list | tuple) and bool(value) and is_whole_number(value[0])


def is_array(value: Any) -> bool:
    """Returns whether `value` is an integer array or tensor with readable data (dense, not on the meta device)."""
    if isinstance(value, torch.Tensor):
        has_numbers = value.layout == torch.strided and not value.is_meta
        return has_numbers and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return isinstance(value, np.ndarray) and value.dtype.kind in "iu"


def is_whole_number(value: Any) -> bool:
    if isinstance(value, int | np.integer):
        return not isinstance(value, bool)
    return is_array(value) and value.ndim == 0


def conversation_list(messages: Any) -> list[Messages]:
    """Normalizes the messages of `chat` to a list of conversations of at least one message each.

    Raises TypeError unless given a list of messages or of such lists, ValueError for an empty conversation or text
    with lone surrogates.
    """
    expected = f"expected {CONVERSATION} or a list of those"
    if not isinstance(messages, list | tuple):
        raise TypeError(f"messages: {expected}, got {described(messages)}")
    conversations = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
    for index, conversation in enumerate(conversations):
        name = which(index, len(conversations))
        if not isinstance(conversation, list | tuple):
            raise TypeError(f"messages: {name}: {expected}, got {described(conversation)}")
        if not conversation:
            raise ValueError(f"messages: {name} is empty: it has no message")
        for number, message in enumerate(conversation, 1):
            check_message(message, f"messages: {name}: message {number}")
    return conversations


def check_message(message: Any, name: str) -> None:
    if not isinstance(message, dict):
        raise TypeError(f'{name}: expected {{"role": "user", "content": "..."}}, got {described(message)}')
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise TypeError(f"{name}: {key} must be a text, got {described(message.get(key))}")
        check_text(message[key], f"{name}: {key}")


def check_text(text: str, name: str) -> None:
    """Raises ValueError for text with lone surrogates, which cannot be tokenized."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(
            f"{name}: character {error.start + 1} is {half!r}, half of a surrogate pair, which is no text"
        ) from None


def described(value: Any) -> str:
    """Describes a value of a wrong type, for errors."""
    if isinstance(value, Mapping):
        return f"a {type(value).__name__}" + ("; give its input_ids" if "input_ids" in value else "")
    if isinstance(value, torch.Tensor | np.ndarray):
        where = f" on {value.device}, {value.layout}" if isinstance(value, torch.Tensor) else ""
        return f"a {type(value).__name__} of {value.dtype} with {value.ndim} dimensions{where}"
    if hasattr(value, "__next__"):
        return f"a {type(value).__name__}; give a list"
    if value is None or isinstance(value, bool | int | float | str):
        return quoted(value)
    return f"a {type(value).__name__}"
