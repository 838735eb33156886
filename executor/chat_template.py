# SPDX-License-Identifier: Apache-2.0
"""Conversations as text, by a checkpoint's chat template: a program of the checkpoint's author, so it is given bounds.

transformers runs it in a sandbox, where it reaches neither files nor Python; time and length are bounded here.
"""

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from executor.prompts import check_text
from executor.utils.reading import refusing

RENDER_TIMEOUT_S = 10.0  # all renderings of one prompt together; one takes milliseconds
MAX_TEMPLATE_CHARACTERS = 1_000_000  # beside what stands in the messages


class ChatTemplate:
    """Renders conversations for one prompt. Its errors are ValueErrors that name the prompt and the template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model_path: Path, enable_thinking: bool, name: str):
        self.tokenizer = tokenizer
        self.enable_thinking = enable_thinking
        own_file = model_path / "chat_template.jinja"
        file = own_file if own_file.exists() else model_path / "tokenizer_config.json"
        self.problem = f"chat template of {file}"
        self.name = name
        self.left_s = RENDER_TIMEOUT_S

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """The prompt's text, up to where the answer begins."""
        with refusing(self.name, self.problem):
            refuse_powers(self.tokenizer.get_chat_template())
            started_s = time.monotonic()
            text = call_within(
                self.left_s,
                lambda: self.tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=True, enable_thinking=self.enable_thinking
                ),
            )
            self.left_s -= time.monotonic() - started_s
            given = sum(len(str(value)) for message in messages for value in message.values())
            if len(text) > MAX_TEMPLATE_CHARACTERS + 4 * given:
                raise ValueError(f"makes {len(text)} characters of {given}")
            check_text(text, "its output")
        return text


@lru_cache
def refuse_powers(template: str) -> None:
    """ValueError for the operator **: nothing can end a thread while Python computes 9**9**9."""
    before = ""
    for _, kind, token in jinja2.Environment().lex(template):
        if kind == "operator" and token == "**" and before not in "(,":  # f(**names) is another thing
            raise ValueError("uses the operator **")
        if kind != "whitespace":
            before = token


def call_within(timeout_s: float, call: Callable[[], Any]) -> Any:
    """The result of `call`, which runs in a thread that is ended with TimeoutError here when it takes longer."""
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        thread.join(max(timeout_s, 0))
    finally:
        if thread.ident is not None and thread.is_alive():  # SystemExit is what no template's code catches
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
    if not outcome:
        raise TimeoutError(f"takes more than {RENDER_TIMEOUT_S:.0f} s")
    result, error = outcome[0]
    if error is not None:
        raise error
    return result
