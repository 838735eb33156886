# SPDX-License-Identifier: Apache-2.0
"""Chat template rendering with time and output limits: a template is untrusted code from the checkpoint.

transformers renders it in a Jinja sandbox without access to files or Python, but without these limits.
"""

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from executor.loading.prompts import check_text
from executor.utils.reading import refusing
from executor.utils.text import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDER_TIMEOUT_S = 10.0  # for all renderings of one prompt together; one usually takes milliseconds
MAX_TEMPLATE_CHARACTERS = 1_000_000  # of the output, beside 4 times the length of the messages


class RenderTimeout(ValueError):
    """Raised when all renderings of a prompt together take longer than RENDER_TIMEOUT_S."""


class ChatTemplate:
    """Renders conversations for one prompt. Its errors are ValueErrors that name the prompt and the template."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", model_path: Path, enable_thinking: bool, name: str):
        self.tokenizer = tokenizer
        self.enable_thinking = enable_thinking
        own_file = model_path / "chat_template.jinja"
        file = own_file if own_file.exists() else model_path / "tokenizer_config.json"
        self.problem = f"chat template of {file}"
        self.name = name
        self.left_s = RENDER_TIMEOUT_S

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """Renders the conversation with the generation prompt."""
        text = self._render_in_time(messages)
        if text is None:
            limit = f"takes more than {RENDER_TIMEOUT_S:.0f} s"
            raise RenderTimeout(one_line(f"{self.name}: {self.problem}: {limit}"))
        with refusing(self.name, self.problem):
            given = sum(len(str(value)) for message in messages for value in message.values())
            if len(text) > MAX_TEMPLATE_CHARACTERS + 4 * given:
                raise ValueError(f"makes {len(text)} characters of {given}")
            check_text(text, "its output")
        return text

    def _render_in_time(self, messages: Sequence[dict[str, Any]]) -> str | None:
        """Renders within the time left for this prompt; None on timeout."""
        started_s = time.monotonic()
        with refusing(self.name, self.problem):
            refuse_powers(self.tokenizer.get_chat_template())
            try:
                return call_within(
                    self.left_s,
                    lambda: self.tokenizer.apply_chat_template(
                        list(messages), tokenize=False, add_generation_prompt=True, enable_thinking=self.enable_thinking
                    ),
                )
            except TimeoutError:
                return None
            finally:
                self.left_s -= time.monotonic() - started_s


@lru_cache
def refuse_powers(template: str) -> None:
    """Rejects a template with the operator ** (ValueError): a thread that computes 9**9**9 cannot be interrupted."""
    before = ""
    for _, kind, token in jinja2.Environment().lex(template):
        if kind == "operator" and token == "**" and before not in "(,":  # f(**kwargs) is unpacking
            raise ValueError("uses the operator **")
        if kind != "whitespace":
            before = token


def call_within(timeout_s: float, call: Callable[[], Any]) -> Any:
    """Runs `call` in a thread; stops the thread and raises TimeoutError after the time limit."""
    if timeout_s <= 0:
        raise TimeoutError
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        thread.join(timeout_s)
    finally:
        if thread.ident is not None and thread.is_alive():  # templates cannot catch SystemExit
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
    if not outcome:
        raise TimeoutError
    result, error = outcome[0]
    if error is not None:
        raise error
    return result
