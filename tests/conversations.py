# SPDX-License-Identifier: Apache-2.0
"""Chat templates of several styles and helpers for conversations, shared by tests."""

import random
from typing import Any

from transformers import AutoTokenizer

from executor.config import REPOSITORY
from executor.loading.tokenizer import Tokenizer

DEMO = REPOSITORY / "models/qwen3_moe/demo"
WORDS = ["thou", "art", "king", "speak", "night", "crown", "love", "é", "東京", "🎭"]

# Like Qwen3's: thinking before the last query is dropped, after it kept; tool results are user turns.
THINKING = """
{%- set ns = namespace(query=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
  {%- set text = message.content %}
  {%- if ns.searching and message.role == 'user' and not text.startswith('<tool_response>') %}
    {%- set ns.searching = false %}
    {%- set ns.query = messages|length - 1 - loop.index0 %}
  {%- endif %}
{%- endfor %}
{%- for message in messages %}
  {%- set text = message.content %}
  {%- if message.role == 'assistant' %}
    {%- set answer = text.split('</think>')[-1].lstrip('\\n') %}
    {%- set thoughts = '' %}
    {%- if '</think>' in text %}
      {%- set thoughts = text.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
    {%- endif %}
    {%- if loop.index0 > ns.query and (thoughts or loop.last) %}
      {%- set answer = '<think>\\n' + thoughts + '\\n</think>\\n\\n' + answer %}
    {%- endif %}
    {{- '<|im_start|>assistant\\n' + answer + '<|im_end|>\\n' }}
  {%- elif message.role == 'tool' %}
    {{- '<|im_start|>user\\n<tool_response>\\n' + text + '\\n</tool_response><|im_end|>\\n' }}
  {%- else %}
    {{- '<|im_start|>' + message.role + '\\n' + text + '<|im_end|>\\n' }}
  {%- endif %}
{%- endfor %}
{{- '<|im_start|>assistant\\n' }}
{%- if not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
"""
ALTERNATING = """
{%- set talk = messages[1:] if messages[0].role == 'system' else messages %}
{%- for message in talk %}
  {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
  {%- endif %}
  {%- set system = messages[0].content + '\\n\\n' if loop.first and messages[0].role == 'system' else '' %}
  {%- set text = message.content.strip() %}
  {{- '[INST] ' + system + text + ' [/INST]' if message.role == 'user' else ' ' + text + '</s>' }}
{%- endfor %}
"""
NO_SYSTEM = """
{%- for message in messages %}
  {%- if message.role == 'system' %}{{- raise_exception('System role not supported') }}{% endif %}
  {{- '<|' + message.role + '|>' + message.content.split('|>')[-1].strip() + '\n' }}
{%- endfor %}
{{- '<|assistant|>' }}
"""


def words(count: int) -> str:
    return " ".join(random.choices(WORDS, k=count))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "You are a poet."}


def with_template(template: Any, limit: int = 4080, long_prompt: str = "cut", thinking: bool = False) -> Tokenizer:
    """The demo's tokenizer with another chat template; None keeps the demo's."""
    tokenizer = Tokenizer(DEMO, limit, long_prompt, thinking)
    if template is not None:
        tokenizer.loaded.chat_template = template
    return tokenizer


def cut_text(template: str, messages: list[dict[str, str]], limit: int, name: str = "the prompt", **settings) -> str:
    tokenizer = with_template(template, limit, **settings)
    token_ids = tokenizer.encode_chat(messages, name)
    assert 0 < len(token_ids) <= limit
    return tokenizer.loaded.decode(token_ids)


def rendered(template: str, messages: list[dict[str, str]], thinking: bool = False) -> str:
    return AutoTokenizer.from_pretrained(DEMO).apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )


def num_tokens(template: str, messages: list[dict[str, str]]) -> int:
    return len(with_template(template, 10**6).encode_chat(messages))
