# SPDX-License-Identifier: Apache-2.0
"""Chat templates that raise, do not terminate, produce too much text, or try to leave the sandbox."""

import os
import random
import shutil
import signal
import threading
import time

import pytest

import executor.loading.chat_template
from executor.launch.interrupts import Interrupted
from executor.loading.chat_template import ChatTemplate, template_process
from executor.loading.template_process import TemplateProcess
from executor.loading.tokenizer import Tokenizer
from tests.conversations import DEMO, THINKING, cut_text, user, with_template, words

DOUBLED = "{{% set ns = namespace(n=3) %}}{{% for i in range(99) %}}{{% set ns.n = ns.n {} ns.n %}}{{% endfor %}}"


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
        ("{{ '#' * 8_000_000_000 }}", "not enough memory"),
        ("{{ messages[0].content * 800_000_000 }}", "not enough memory"),
        ("{{ range(10)|batch(10**9, 'x')|list }}", "not enough memory"),
        ("{{ 'a'.center(10**10) }}", "not enough memory"),
        (
            "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
            "not enough",
        ),
        ("{{ '#' * 20_000_000 }}", "makes 20000000 characters, more than 10000"),
        ("{% for i in range(1000) %}{% for j in range(1000) %}word {% endfor %}{% endfor %}", "makes 5000000"),
        ("{{ '" + "x" * 10**6 + "'.y.z }}", "has no attribute 'y'"),
        ("(" * 10**5 + "{{" + "(" * 10**5, ""),
        (5, ""),
        ({"a": "b"}, ""),
        ("", "is empty: it has no tokens"),
        ("{# #}", "is empty: it has no tokens"),
    ],
)
def test_invalid_templates(template, problem, monkeypatch):
    monkeypatch.setattr(executor.loading.chat_template, "RENDER_TIMEOUT_S", 60.0)  # for slow machines
    with pytest.raises(ValueError) as raised:
        with_template(template).encode_chat([user("Good morrow")], "prompt 2 of 3")
    line = str(raised.value)
    assert line.startswith("prompt 2 of 3") and problem in line and len(line) < 500 and line.isprintable()
    assert f"chat template of {DEMO / 'tokenizer_config.json'}: " in line or "is empty" in line


def test_templates_have_what_transformers_gives_them():
    template = (
        "{%- for m in messages %}\n  {%- if loop.first %}{% continue %}{% endif %}\n{{ m|tojson(indent=2) }}"
        "{{ {'a': '<é>'}|tojson }}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% if loop.index > 2 %}{% break %}{% endif %}\n  {%- endfor %}\n{{ strftime_now('%Y')[:2] }}"
        "{{ eos_token }}{{ pad_token }}{{ add_generation_prompt }}{{ enable_thinking }}{{ tools is none }}"
        "{{ documents is defined }}{{ 9 ** 2 }}{{ dict({}, **{'a': 1}) }}{% if missing %}no{% endif %}"
    )
    messages = [user(f"{random.random()} é"), user("<b> 🎭"), user("c"), user("d")]
    tokenizer = with_template(template)
    expected = tokenizer.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert ChatTemplate(tokenizer.tokenizer, DEMO, False, "x").render(messages) == expected and "81{'a': 1}" in expected


def test_error_names_the_template_file(tmp_path):
    for file in DEMO.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    with pytest.raises(ValueError, match=f"^the prompt: chat template of {tmp_path}/chat_template.jinja: never$"):
        Tokenizer(tmp_path, 100, "cut", False).encode_chat([user("a")])


LOOPS = "".join(f"{{% for {name} in range(99999) %}}" for name in "ijk") + "{% endfor %}" * 3


@pytest.mark.parametrize("in_main_thread", [True, False])
@pytest.mark.parametrize(
    "template", [LOOPS, LOOPS.replace("range(99999)", "'x' * 99999"), DOUBLED.format("*"), "{{ 9 ** (9 ** 9) }}"],
    ids=["numbers", "text", "squares", "a power"],
)  # fmt: skip
def test_templates_that_do_not_end(template, in_main_thread, monkeypatch):
    monkeypatch.setattr(executor.loading.chat_template, "RENDER_TIMEOUT_S", 1.0)
    tokenizer, lines = with_template(template), []

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
    assert template_process.process is None  # it was stopped
    assert cut_text("{{ messages[0].content }} two", [user("one")], 100) == "one two"


def test_killed_process_is_replaced():
    process = TemplateProcess()
    for number in range(3):
        assert process.render(10, "{{ a }}", {"a": number}, 9)[0] == str(number)
        process.process.kill()
        process.process.wait()


def test_processes_of_threads_and_forks_do_not_mix():
    """Answers belong to their requests, even with 8 threads, and in a fork, which must not use its parent's pipes."""
    process, found = TemplateProcess(), {}

    def ask(number: int) -> None:
        for _ in range(20):
            found.setdefault(number, set()).add(process.render(10, "{{ a }}", {"a": "x" * number}, 9999)[0])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: {"x" * number} for number in range(8)}
    before = process.process.pid
    child = os.fork()
    if child == 0:
        process.render(10, "{{ a }}", {"a": 1}, 9)
        os._exit(process.process.pid == before)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert process.render(10, "{{ a }}", {"a": 2}, 9)[0] == "2" and process.process.pid == before


def test_interrupted_request_leaves_no_answer_for_the_next():
    process = TemplateProcess()
    process.render(10, "{{ a }}", {"a": 1}, 9)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    old = signal.signal(signal.SIGALRM, raise_interrupted)
    try:
        with pytest.raises(Interrupted):
            process.render(60, LOOPS, {}, 9)
    finally:
        signal.signal(signal.SIGALRM, old)
    assert process.render(10, "{{ a }}", {"a": 2}, 9)[0] == "2"


def raise_interrupted(*_: object) -> None:
    raise Interrupted


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
