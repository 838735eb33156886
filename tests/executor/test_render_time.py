# SPDX-License-Identifier: Apache-2.0
"""The time that all renderings of one conversation may take together."""

import pytest

import executor.loading.chat_template
from executor.loading.chat_template import ChatTemplate, RenderTimeout
from tests.conversations import SYSTEM, THINKING, assistant, user, with_template


def test_conversation_that_time_ends_says_so_whenever_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cut, and whether, would else depend on how fast a machine is."""
    tokenizer = with_template(THINKING, 100)
    messages = [SYSTEM, user("thou " * 100), assistant("art " * 100), user("king " * 100)]
    render, calls = ChatTemplate.render, []

    def counted(self: ChatTemplate, given: list[dict[str, str]]) -> str:
        calls.append(given)
        if len(calls) == last:
            self.left_s = 0
        return render(self, given)

    monkeypatch.setattr(ChatTemplate, "render", counted)
    last = 0
    assert 0 < len(tokenizer.encode_chat(messages)) <= 100
    num_calls = len(calls)
    assert num_calls > 5
    for last in range(1, num_calls + 1):  # noqa: B007
        calls.clear()
        with pytest.raises(RenderTimeout, match="^prompt 1 of 2: chat template of .*: takes more than 10 s$"):
            tokenizer.encode_chat(messages, "prompt 1 of 2")


@pytest.mark.parametrize("left_s", [0, -1])
def test_nothing_is_rendered_when_no_time_is_left(left_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor.loading.chat_template, "template_process", None)
    monkeypatch.setattr(executor.loading.chat_template, "RENDER_TIMEOUT_S", left_s)
    with pytest.raises(RenderTimeout):
        with_template(THINKING).encode_chat([user("a")])
