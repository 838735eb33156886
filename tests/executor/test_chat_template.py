# SPDX-License-Identifier: Apache-2.0
"""Chat templates that raise, do not terminate, produce too much text, or try to leave the sandbox."""

import shutil
import threading
import time

import pytest

import executor.loading.chat_template
from executor.loading.tokenizer import Tokenizer
from tests.conversations import DEMO, THINKING, cut_text, user, with_template, words


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for", "unexpected"),
        ("{{ messages.x.y }}", "has no attribute 'x'"),
        ("{{ raise_exception('no\n\nthanks\x1b') }}", "no thanks"),
        ("{{ raise_exception(messages) }}", "Good"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0]['content'] + 3 }}", "str"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply"),
        ("{{ '\\ud83d' }}", "half of a surrogate pair"),
        ("{% include '/etc/passwd' %}", "loader"),
        ("{% import 'os' as os %}", "loader"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ range(999999999) }}", "Range too big"),
        ("{{ 9 ** 9 ** 9 }}", "uses the operator **"),
        ("{% set n = messages|length + 8 %}{{ n**n**n**n }}", "uses the operator **"),
        ("{{ '#' * 20_000_000 }}", "makes 20000000 characters of"),
        ("{% for i in range(1000) %}{% for j in range(1000) %}word {% endfor %}{% endfor %}", "makes 5000000"),
        ("{{ '" + "x" * 10**6 + "'.y.z }}", "has no attribute 'y'"),
        ("(" * 10**5 + "{{" + "(" * 10**5, ""),
        (5, ""),
        ({"a": "b"}, ""),
        ("", "is empty: it has no tokens"),
        ("{# #}", "is empty: it has no tokens"),
    ],
)
def test_invalid_templates(template, problem):
    with pytest.raises(ValueError) as raised:
        with_template(template).encode_chat([user("Good morrow")], "prompt 2 of 3")
    line = str(raised.value)
    assert line.startswith("prompt 2 of 3") and problem in line and len(line) < 500 and line.isprintable()
    assert f"chat template of {DEMO / 'tokenizer_config.json'}: " in line or "is empty" in line


def test_stars_that_are_not_the_power_operator():
    template = "**bold** {# 9**9 #}{{ '**' }}{% set d = {'a': 1} %}{{ dict(**d).a }}{{ dict({}, **d).a }}"
    assert cut_text(template, [user("a")], 100) == "**bold** **11"


def test_error_names_the_template_file(tmp_path):
    for file in DEMO.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    with pytest.raises(ValueError, match=f"^the prompt: chat template of {tmp_path}/chat_template.jinja: never$"):
        Tokenizer(tmp_path, 100, "cut", False).encode_chat([user("a")])


LOOPS = "".join(f"{{% for {name} in range(99999) %}}" for name in "ijk") + "{% endfor %}" * 3
LOOPS_OVER_TEXT = LOOPS.replace("range(99999)", "'x' * 99999")


@pytest.mark.parametrize("in_main_thread", [True, False])
@pytest.mark.parametrize("template", [LOOPS, LOOPS_OVER_TEXT], ids=["numbers", "text"])
def test_templates_that_do_not_end(template, in_main_thread, monkeypatch):
    monkeypatch.setattr(executor.loading.chat_template, "RENDER_TIMEOUT_S", 1.0)
    tokenizer, lines, before = with_template(template), [], threading.active_count()

    def encode() -> None:
        with pytest.raises(ValueError) as raised:
            tokenizer.encode_chat([user("a")], "prompt 1 of 2")
        lines.append(str(raised.value))

    started_s = time.monotonic()
    if in_main_thread:
        encode()
    else:
        thread = threading.Thread(target=encode)
        thread.start()
        thread.join()
    assert time.monotonic() - started_s < 10
    file = DEMO / "tokenizer_config.json"
    assert lines == [f"prompt 1 of 2: chat template of {file}: takes more than 1 s"]
    deadline_s = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert threading.active_count() == before  # its thread was stopped


def test_time_limit_is_per_prompt_not_per_rendering(monkeypatch):
    """A slow template below the limit cannot exceed it by being rendered repeatedly for truncation."""
    monkeypatch.setattr(executor.loading.chat_template, "RENDER_TIMEOUT_S", 2.0)
    slow = "{% for i in range(40000) %}{% for j in 'abcdefghij' %}{% endfor %}{% endfor %}" + THINKING
    started_s = time.monotonic()
    with pytest.raises(ValueError, match="takes more than 2 s|leaves no room"):
        with_template(slow, 30).encode_chat([{"role": "tool", "content": words(99)} for _ in range(300)])
    assert time.monotonic() - started_s < 20


@pytest.mark.parametrize("key", ["name", "tool_calls"])
def test_extra_message_keys_reach_the_template(key):
    template = "{% for m in messages %}{{ m.content }}{{ m['" + key + "'] }}{% endfor %}"
    message = user("Good ") | {key: ["morrow"]}
    assert cut_text(template, [message], 100) == "Good ['morrow']"
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        cut_text(template, [message | {key: "\ud83d"}], 100)
