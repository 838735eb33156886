# SPDX-License-Identifier: Apache-2.0
"""Prompt types of generate and chat, and errors that name the prompt."""

import array
import collections
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BatchEncoding

from executor import LLM, SamplingParams
from executor.loading.prompts import conversation_list, prompt_list, token_id_list
from tests.checkpoints import make_checkpoint
from tests.conversations import DEMO, assistant, user

IDS = [3, 1, 2]


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> LLM:
    """A random model with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("texts")
    make_checkpoint(folder, vocab_size=2048)
    for file in DEMO.glob("tokenizer*"):
        shutil.copy(file, folder)
    return LLM(folder, device="cpu", dtype="float32", max_new_tokens=2, input_max_len=64)


@pytest.mark.parametrize(
    "one",
    [IDS, tuple(IDS), range(3, 0, -1), np.array(IDS), np.array(IDS, np.uint8), np.array(IDS, np.uint64)]
    + [torch.tensor(IDS), torch.tensor(IDS, dtype=torch.int32), list(np.array(IDS)), list(torch.tensor(IDS))]
    + [[3, np.int32(1), torch.tensor(2)], np.array([[3, 1, 2]])[0], torch.tensor([[3, 1, 2]])[0]],
)
def test_token_ids_of_one_prompt(one):
    expected = list(range(3, 0, -1)) if isinstance(one, range) else IDS
    for found in (token_id_list(one), *prompt_list(one), *prompt_list([one]), *prompt_list((one,))):
        assert found == expected and all(type(token_id) is int for token_id in found)
    assert prompt_list(["a", one, "b"]) == ["a", expected, "b"]


def test_rows_of_an_array_are_prompts():
    rows = [[3, 1], [2, 0]]
    assert prompt_list(np.array(rows)) == prompt_list(torch.tensor(rows)) == prompt_list(rows) == rows
    assert prompt_list(list(torch.tensor(rows))) == prompt_list(tuple(np.array(rows))) == rows


def test_no_prompts_and_empty_prompts(llm):
    for nothing in ([], (), np.zeros((0, 3), int), torch.zeros((0, 3), dtype=torch.int64)):
        assert prompt_list(nothing) == [] == llm.generate(nothing)
    assert llm.chat([]) == [] == llm.chat(())
    assert prompt_list([[]]) == prompt_list(range(0)) == prompt_list(torch.tensor([], dtype=torch.int64)) == [[]]
    for prompts in ([[1], []], [[1], ()], [[1], np.array([], int)], [[1], range(0)]):
        with pytest.raises(ValueError, match="^prompt 2 of 2: token ids must be at least one"):
            llm.generate(prompts)
    with pytest.raises(ValueError, match="^prompt 3 of 3 is empty: it has no tokens"):
        llm.generate(["a", "b", ""])
    with pytest.raises(ValueError, match="^the prompt is empty"):
        llm.generate("")


def encoding() -> BatchEncoding:
    return AutoTokenizer.from_pretrained(DEMO)(["Good morrow"])


@pytest.mark.parametrize(
    ("prompts", "named"),
    [
        (b"abc", "a bytes"),
        (bytearray(b"abc"), "a bytearray"),
        (memoryview(b"abc"), "a memoryview"),
        (array.array("i", IDS), "a array"),
        (encoding(), "a BatchEncoding; give its input_ids"),
        ({"input_ids": IDS}, "a dict; give its input_ids"),
        ({1: 2}, "a dict"),
        (collections.UserDict({"prompt": "a"}), "a UserDict"),
        (None, "None"),
        (3, "3"),
        (True, "True"),
        (1.5, "1.5"),
        ({1, 2}, "a set"),
        (iter(["a"]), "a list_iterator; give a list"),
        ((text for text in "ab"), "a generator; give a list"),
        (map(str, IDS), "a map; give a list"),
        (collections.deque(IDS), "a deque"),
        (torch.tensor([1.0]), "a Tensor of torch.float32"),
        (torch.tensor([True]), "a Tensor of torch.bool"),
        (torch.tensor(3), "a Tensor of torch.int64 with 0 dimensions"),
        (torch.zeros((2, 2, 2), dtype=torch.int64), "a Tensor of torch.int64 with 3 dimensions"),
        (np.array([1.5]), "a ndarray of float64"),
        (np.array([True]), "a ndarray of bool"),
        (np.array(["a", "b"]), "a ndarray of <U1"),
        (np.array([1, None]), "a ndarray of object"),
        (np.array([]), "a ndarray of float64"),
    ],
)
def test_invalid_prompt_types(prompts, named, llm):
    """TypeError alone and in a list, before any prompt runs."""
    for call in (llm.stream, llm.generate):
        with pytest.raises(TypeError) as raised:
            call(prompts)
        assert str(raised.value).startswith("prompts: expected a text, token ids (") and named in str(raised.value)
    if isinstance(prompts, int) and not isinstance(prompts, bool):
        return  # a list of it is the token ids of one prompt
    if isinstance(prompts, torch.Tensor) and prompts.ndim == 0:
        return
    with pytest.raises(TypeError, match="^prompt 2 of 2: expected a text, token ids") as raised:
        llm.generate(["a", prompts])
    assert named in str(raised.value)


@pytest.mark.parametrize(
    "mixed", [[1, "a"], [1, None], [1, 1.5], [1, True], [1, [2]], [1, 2, b"a"], [1, np.bool_(True)]]
)
def test_mixed_token_ids(mixed, llm):
    for prompts in (mixed, [mixed]):
        with pytest.raises(TypeError, match="^the prompt: token ids must be whole numbers, one is "):
            llm.generate(prompts)


@pytest.mark.parametrize("inner", [[["a"]], [[1.5]], [[None]], [[True]], [[[1]]], [["a", 2]], [{}], [torch.zeros(2)]])
def test_lists_of_invalid_prompts(inner, llm):
    with pytest.raises(TypeError, match="^the prompt: expected a text, token ids"):
        llm.generate(inner)


@pytest.mark.parametrize("token_id", [-1, 2048, 2**63, 10**400])
def test_token_ids_out_of_vocabulary(token_id, llm):
    with pytest.raises(ValueError, match="^prompt 2 of 2: token ids must be at least one, each from 0 to 2047$"):
        llm.generate([[1], [2, token_id]])
    with pytest.raises(ValueError, match="each from 0 to 2047"):
        llm.generate(np.array([np.iinfo(np.uint64).max], np.uint64))


def test_outputs_have_plain_python_types(llm):
    [output] = llm.generate(np.array(IDS))
    json.dumps([output.prompt_token_ids, output.token_ids])
    [text] = llm.generate([np.str_("Good morrow")])
    assert type(text.prompt) is str


def test_lone_surrogates_are_rejected_before_running(llm):
    with pytest.raises(ValueError, match="^prompt 2 of 3: character 3 is "):
        llm.generate(["a", "ab\ud83d", "c"])
    with pytest.raises(ValueError, match="^messages: prompt 2 of 2: message 3: content: character 1 is "):
        llm.chat([[user("a")], [user("a"), assistant("b"), user("\ude00")]])


def test_warnings_and_errors_name_the_prompt(llm, caplog):
    llm.generate(["a", "Good morrow " * 99])
    assert "prompt 2 of 2 of " in caplog.text and "was cut in the middle to 64" in caplog.text
    llm.chat([[user("a")], [user("b")], [user("Good morrow " * 99)]])
    assert "prompt 3 of 3 of " in caplog.text and "1 texts cut in the middle" in caplog.text
    with pytest.raises(ValueError, match="^prompt 2 of 2 of 400 tokens and 200 new ones is more than"):
        llm.generate([[1], [5] * 400], SamplingParams(max_new_tokens=200))


# Conversations


def test_conversation_types():
    one = [user("a"), assistant("b") | {"tool_calls": [1]}, user("c")]
    assert conversation_list(one) == [one] and conversation_list([one, one]) == [one, one]
    assert conversation_list(tuple(one)) == [tuple(one)] and conversation_list((tuple(one),)) == [tuple(one)]


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        (None, "messages: expected"),
        ("Good morrow", "messages: expected"),
        (b"a", "messages: expected"),
        (user("a"), "messages: expected"),
        (iter([user("a")]), "give a list"),
        (["a"], "messages: the prompt: expected"),
        ([[user("a")], user("b")], "messages: prompt 2 of 2: expected"),
        ([[user("a")], None], "messages: prompt 2 of 2: expected"),
        ([user("a"), [user("b")]], "messages: the prompt: message 2: expected"),
        ([user("a"), "b"], "messages: the prompt: message 2: expected"),
        ([[user("a")], [user("a"), {"role": "user"}]], "messages: prompt 2 of 2: message 2: content must be a text"),
        ([{"content": "a"}], "messages: the prompt: message 1: role must be a text, got None"),
        ([user(None)], "content must be a text, got None"),
        ([user(b"a")], "content must be a text, got a bytes"),
        ([user([{"type": "text", "text": "a"}])], "content must be a text, got a list"),
        ([{"role": 3, "content": "a"}], "role must be a text, got 3"),
        ([collections.UserDict(user("a"))], "message 1: expected"),
    ],
)
def test_invalid_conversation_types(messages, named, llm):
    with pytest.raises(TypeError) as raised:
        llm.chat(messages)
    assert named in str(raised.value) and len(str(raised.value)) < 300


@pytest.mark.parametrize("messages", [[[]], [[user("a")], []], [[user("a")], ()]])
def test_empty_conversations(messages, llm):
    with pytest.raises(ValueError, match="is empty: it has no message"):
        llm.chat(messages)


@pytest.mark.parametrize("given", [{"max_new_tokens": 3}, 3, [SamplingParams(), 3], "greedy", SamplingParams])
def test_invalid_sampling_params_type(given, llm):
    for call in (llm.generate, llm.chat):
        with pytest.raises(TypeError, match="^sampling_params: expected one SamplingParams or a list of them, got a "):
            call([[user("a")]] if call == llm.chat else "a", given)


def test_sampling_params_of_each_prompt(llm):
    params = [SamplingParams(max_new_tokens=count) for count in (1, 3, 2)]
    for outputs in (llm.generate(["a", IDS, "b"], params), llm.chat([[user("a")]] * 3, tuple(params))):
        assert [len(output.token_ids) for output in outputs] == [1, 3, 2]
    counts = {index: 0 for index in range(3)}
    for chunk in llm.stream(["a", IDS, "b"], params):
        counts[chunk.index] += len(chunk.token_ids)
    assert counts == {0: 1, 1: 3, 2: 2}
    for call in (llm.generate, llm.stream):
        with pytest.raises(ValueError, match="^sampling_params: 3 of them for 2 prompts, must be one for each$"):
            call(["a", "b"], params)


# The folder of a checkpoint


@pytest.mark.parametrize(
    "path", [None, 3, "", b"models", True, ["a"], "~nobody/x", "x" * 300, "a\0b", "\ud83d", "a\nb"]
)
def test_invalid_model_paths(path):
    with pytest.raises(ValueError) as raised:
        LLM(path, device="cpu")
    line = str(raised.value)
    assert line.startswith("model_path: ") and len(line) < 500 and line.isprintable()


def test_model_path_is_a_file(tmp_path):
    file = Path(shutil.copy(DEMO / "config.json", tmp_path / "model.safetensors"))
    for path in (file, file / "x"):
        with pytest.raises(ValueError) as raised:
            LLM(path, device="cpu")
        assert str(file) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["x" * 200, "a\nb", "東京" * 20])
def test_unusual_folder_names(name, tmp_path):
    make_checkpoint(tmp_path / name)
    assert LLM(tmp_path / name, device="cpu").logits([1]).shape == (1, 211)


@pytest.mark.parametrize("overrides", ["device=cpu", [3], None, b"device=cpu"])
def test_overrides_are_a_list_of_texts(overrides):
    with pytest.raises(TypeError):
        LLM.from_yaml("demo.yaml", overrides)
