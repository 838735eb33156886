# SPDX-License-Identifier: Apache-2.0
"""Chat template rendering, within limits of time, memory and output."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from executor.loading.prompts import check_text
from executor.loading.template_process import TemplateProcess
from executor.utils.reading import refusing
from executor.utils.text import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDER_TIMEOUT_S = 10.0  # for all renderings of one prompt together; one usually takes milliseconds
MAX_TEMPLATE_CHARACTERS = 1_000_000  # of the output, beside 4 times the length of the messages

template_process = TemplateProcess()


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
        text = None
        with refusing(self.name, self.problem):
            given = sum(len(str(value)) for message in messages for value in message.values())
            variables = {
                **self.tokenizer.special_tokens_map,
                "messages": list(messages),
                "tools": None,
                "documents": None,
                "add_generation_prompt": True,
                "enable_thinking": self.enable_thinking,
            }
            try:
                if self.left_s > 0:
                    max_len = MAX_TEMPLATE_CHARACTERS + 4 * given
                    text, seconds = template_process.render(
                        self.left_s, self.tokenizer.get_chat_template(), variables, max_len
                    )
                    check_text(text, "its output")
                    self.left_s -= seconds
            except TimeoutError:
                self.left_s = 0.0
        if text is None:
            limit = f"takes more than {RENDER_TIMEOUT_S:.0f} s"
            raise RenderTimeout(one_line(f"{self.name}: {self.problem}: {limit}"))
        return text
