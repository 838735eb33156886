# SPDX-License-Identifier: Apache-2.0
"""Encoding conversations, and truncation of long ones."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from executor.loading.chat_template import ChatTemplate
from executor.loading.tokenizer import Tokenizer
from tests.conversations import (
    ALTERNATING,
    DEMO,
    NO_SYSTEM,
    SYSTEM,
    THINKING,
    assistant,
    cut_text,
    num_tokens,
    rendered,
    user,
    with_template,
    words,
)


@pytest.fixture(scope="module")
def demo_tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.mark.parametrize("thinking", [False, True])
def test_chat_template(thinking, demo_tokenizer):
    messages = [{"role": "system", "content": "You are a poet."}, {"role": "user", "content": "Go on: é\n 🎭"}]
    expected = demo_tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=thinking)
    found = with_template(None, thinking=thinking).encode_chat(messages)
    assert found == expected["input_ids"]
    other = with_template(None, thinking=not thinking).encode_chat(messages)
    assert found != other
    assert ("<think>" in demo_tokenizer.decode(found)) == (not thinking)


@pytest.mark.parametrize("limit", [40, 41, 64, 120])
def test_long_conversation_keeps_its_template(limit, demo_tokenizer):
    messages = [
        {"role": "system", "content": "You are a poet."},
        {"role": "user", "content": "BEGIN " + words(900) + " END"},
    ]
    cut = with_template(None, limit).encode_chat(messages)
    assert len(cut) <= limit
    text = demo_tokenizer.decode(cut)
    assert text.startswith("<|im_start|>system\nYou are a poet.<|im_end|>\n<|im_start|>user\nBE")
    assert text.endswith("END<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_limit_below_the_template():
    with pytest.raises(ValueError, match="data_config.input_max_len: 8 leaves no room"):
        with_template(None, 8).encode_chat([{"role": "user", "content": words(200)}])


def test_long_conversation_is_rejected():
    with pytest.raises(ValueError, match="data_config.input_max_len is 20 "):
        with_template(None, 20, "refuse").encode_chat([{"role": "user", "content": words(200)}])


def test_tokenizer_without_chat_template(tmp_path):
    for file in DEMO.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(tmp_path, 100, "cut", False)
    with pytest.raises(ValueError, match="data_config.chat_template: this checkpoint's tokenizer has none"):
        tokenizer.encode_chat([{"role": "user", "content": "a"}])


# Truncation of long conversations


def long_conversation(num_turns: int) -> list[dict[str, str]]:
    """Turns whose long thinking is dropped by templates in later turns."""
    messages = []
    for number in range(num_turns - 1):
        thoughts = f"<think>\nSECRET{number} {words(200)}\n</think>\n\n"
        messages += [user(f"Q{number} {words(20)}"), assistant(f"{thoughts}A{number} {words(20)}")]
    return [*messages, user(f"LAST {words(20)} END")]


@pytest.mark.parametrize("template", [THINKING, ALTERNATING], ids=["thinking", "alternating"])
@pytest.mark.parametrize("system", [False, True])
def test_oldest_turns_are_left_out(system, template, caplog):
    messages = [SYSTEM] * system + long_conversation(21)
    if template == ALTERNATING:
        messages = [{**m, "content": m["content"].split("</think>\n\n")[-1]} for m in messages]
    full = num_tokens(template, messages)
    found = cut_text(template, messages, full - 60, "prompt 4 of 9")
    assert found == rendered(template, [SYSTEM] * system + messages[system + 2 :])  # without the oldest turn
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"prompt 4 of 9 of {full} tokens was cut to ")
    assert caplog.messages[0].endswith(": 1 of 20 earlier turns left out, 0 texts cut in the middle")
    for left_out in (7, 20):
        kept = [SYSTEM] * system + messages[system + 2 * left_out :]
        assert cut_text(template, messages, num_tokens(template, kept)) == rendered(template, kept)


@pytest.mark.parametrize("limit", [60, 90, 200, 700, 1500])
@pytest.mark.parametrize("thinking", [False, True])
def test_earlier_thoughts_never_enter_the_prompt(thinking, limit):
    messages = [SYSTEM, *long_conversation(21)]
    messages[-1]["content"] = f"LAST {words(100)} END"
    found = cut_text(THINKING, messages, limit, thinking=thinking)
    assert "SECRET" not in found and found.count("<think>") == found.count("</think>") == (not thinking)
    assert found.startswith("<|im_start|>system\nYou are") and "<|im_start|>user\nLAST" in found
    assert found.split("<|im_start|>assistant\n")[-2].endswith("END<|im_end|>\n")


@pytest.mark.parametrize("limit", [80, 150, 400, 900])
def test_tool_results_after_the_last_user_message_are_cut(limit):
    thoughts = f"<think>\nPLAN {words(300)} DONE\n</think>\n\nCALL {words(150)} IT"
    results = f"FOUND {words(1000)} NOTHING"
    messages = [*long_conversation(3), assistant(thoughts), {"role": "tool", "content": results}]
    found = cut_text(THINKING, messages, limit)
    template_only = [user(""), assistant("<think>\nx\n</think>\n\ny"), {"role": "tool", "content": ""}]
    marks = rendered(THINKING, template_only).replace("x", "").replace("y", "")
    assert "SECRET" not in found
    pattern = ["<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n", "\n</think>\n\n"]
    pattern += ["<|im_end|>\n<|im_start|>user\n<tool_response>\n"]
    pattern += ["\n</tool_response><|im_end|>\n<|im_start|>assistant\n"]
    assert marks.startswith("".join(pattern))
    rest = found
    for mark in pattern:
        assert rest.count(mark) >= 1
        before, rest = rest.split(mark, 1)
        assert "<" not in before
    assert rest == "<think>\n\n</think>\n\n"


def test_user_messages_that_are_tool_results_do_not_replace_the_question():
    result = user(f"<tool_response>\n{words(300)}\n</tool_response>")
    messages = [*long_conversation(3), assistant(f"<think>\nPLAN\n</think>\n\nCALL {words(9)}"), result]
    found = cut_text(THINKING, messages, 150)
    assert "LAST" in found and "PLAN" in found and "Q1" not in found and "SECRET" not in found
    assert "<tool_response>\n" in found and "\n</tool_response><|im_end|>" in found


def test_longest_texts_are_cut():
    system = {"role": "system", "content": f"BEGIN {words(900)} STOP"}
    messages = [system, *long_conversation(3)[:-1], user(f"LAST {words(500)} END")]
    found = cut_text(THINKING, messages, 200)
    assert found.startswith("<|im_start|>system\nBEGIN ") and "STOP<|im_end|>\n<|im_start|>user\nLAST " in found
    first, second = (len(part.split()) for part in found.split("<|im_start|>user\n"))
    assert abs(first - second) < 40  # both are cut to the same length
    messages[-1] = user("LAST short END")
    assert "LAST short END" in cut_text(THINKING, messages, 200)


@pytest.mark.parametrize("limit", [40, 70])
@pytest.mark.parametrize("padding", ["", "\n\n", "  \n", "<|x|>\n", "a|>"])
@pytest.mark.parametrize("template", [NO_SYSTEM, ALTERNATING], ids=["marks", "instruct"])
def test_template_markup_beside_stripped_text_is_kept(template, padding, limit):
    text = f"{padding}BEGIN {words(300)} END{padding[::-1].replace('>|', '').replace('>', '')}"
    found = cut_text(template, [user(text)], limit)
    first, last = ("<|user|>", "\n<|assistant|>") if template == NO_SYSTEM else ("[INST] ", " [/INST]")
    assert found.startswith(first) and found.endswith(last)
    inner = found.removeprefix(first).removesuffix(last)
    shown = rendered(template, [user(text)]).removeprefix(first).removesuffix(last)
    assert any(shown.startswith(inner[:i]) and shown.endswith(inner[i:]) for i in range(1, len(inner)))


def test_user_text_with_special_tokens_is_cut():
    found = cut_text(THINKING, [user(f"BEGIN {'a <|im_end|> b <think> ' * 300} END")], 100)
    assert "BEGIN" in found and found.endswith(" END<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_conversation_without_user_keeps_its_last_message():
    messages = [assistant(f"A{number} {words(50)}") for number in range(9)]
    found = cut_text(THINKING, messages, 200)
    assert "A8" in found and "A0" not in found


@pytest.mark.parametrize("name", ["the prompt", "prompt 17 of 40"])
def test_errors_name_the_prompt_and_its_excess_tokens(name):
    messages = [SYSTEM, *long_conversation(3)]
    full = num_tokens(THINKING, messages)
    with pytest.raises(ValueError) as raised:
        with_template(THINKING, full - 3, "refuse").encode_chat(messages, name)
    assert str(raised.value).startswith(
        f"{name} has {full} tokens, data_config.input_max_len is {full - 3} (3 too many; "
    )
    with pytest.raises(ValueError) as raised:
        with_template(THINKING, 9).encode_chat(messages, name)
    line = str(raised.value)
    assert line.startswith(f"{name} has {full} tokens, data_config.input_max_len: 9 leaves no room beside the template")
    assert int(line.split()[-4]) > 0 and line.endswith("tokens too long")


def test_text_transformed_by_the_template_is_not_cut():
    template = "{% for m in messages %}{{ m.content|reverse }}{{ m.content|length }}{% endfor %}"
    with pytest.raises(ValueError, match="leaves no room beside the template: cut as far as possible"):
        cut_text(template, [user("a b" * 99)], 40)


def agent_run(num_steps: int) -> list[dict[str, str]]:
    """One question with many steps after it, whose texts are of similar lengths."""
    messages = [SYSTEM, user("LAST question")]
    for number in range(num_steps):
        messages += [
            assistant(f"CALL{number} {words(30)} IT"),
            {"role": "tool", "content": f"SEEN{number} {words(30)}"},
        ]
    return messages


@pytest.mark.parametrize("num_steps", [5, 100, 400])
def test_any_number_of_texts_is_cut_with_few_renderings(num_steps, monkeypatch):
    messages, calls = agent_run(num_steps), []
    short = [{**message, "content": " ".join(message["content"].split()[:8])} for message in messages]
    render = ChatTemplate.render
    monkeypatch.setattr(ChatTemplate, "render", lambda self, given: calls.append(1) or render(self, given))
    found = cut_text(THINKING, messages, num_tokens(THINKING, short))
    assert len(calls) < 40
    assert all(f"CALL{number} " in found and f"SEEN{number} " in found for number in range(num_steps))
    assert found.count("<|im_end|>") == len(messages)


def test_texts_that_cannot_be_cut_keep_no_other_from_it():
    """This template rejects a change of any tool result, and shows the lengths of two."""
    messages = agent_run(60)
    for number in (8, 90):
        messages[number]["content"] = f"WHOLE {words(20)}"
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{% if not m.content.startswith(('SEEN', 'WHOLE')) %}"
        "{{ raise_exception('no') }}{% endif %}{{ m.content|upper }}{% elif m.content.startswith('WHOLE') %}"
        "{{ m.content|length }}{% endif %}<{{ m.content if m.role != 'tool' }}>{% endfor %}"
    )
    full = num_tokens(template, messages)
    found = cut_text(template, messages, full - 300)
    for message in messages:
        if message["role"] == "tool" or "WHOLE" in message["content"]:
            shown = message["content"].upper() if message["role"] == "tool" else message["content"]
            assert shown in found
