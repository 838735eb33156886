# SPDX-License-Identifier: Apache-2.0
"""Where outputs end: end tokens, limits and stop strings, with the host a step behind or not."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from executor import LLM, RequestOutput, SamplingParams
from executor.config import REPOSITORY
from executor.engine.model_runner import Batches, ModelRunner, Unread
from executor.engine.text_stream import find_stop, longest_overlap
from ops.step import BLOCK_SIZE
from tests.checkpoints import make_model
from tests.engine.engines import SMALL, assert_all_free, generated, random_prompt, reset, sharp_model

AHEAD = pytest.mark.parametrize("runs_ahead", [False, True])
SAMPLINGS = {"greedy": {}, "random": {"temperature": 1.5, "seed": 5}, "penalty": {"repetition_penalty": 1.3}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Qwen3MoeForCausalLM]:
    folder = tmp_path_factory.mktemp("sharp")
    return folder, sharp_model(folder)


@pytest.fixture(scope="module")
def llm(checkpoint: tuple[Path, Qwen3MoeForCausalLM]) -> LLM:
    return build(checkpoint[0])


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("texts")
    make_model(**SMALL, vocab_size=2048).save_pretrained(folder)
    for file in (REPOSITORY / "models/qwen3_moe/demo").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def writer(with_tokenizer: Path) -> LLM:
    return build(with_tokenizer)


def build(folder: Path) -> LLM:
    return LLM(folder, device="cpu", dtype="float32", batch_size=8, cache_tokens=20 * BLOCK_SIZE)


def set_eos(checkpoint: Path, folder: Path, eos_token_id: int | list[int]) -> LLM:
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_token_id}))
    return build(folder)


# End tokens


def test_every_eos_id_stops(checkpoint: tuple[Path, Qwen3MoeForCausalLM], tmp_path: Path) -> None:
    prompt = random_prompt(20)
    token_ids = generated(checkpoint[1], prompt, 30)
    unused = next(i for i in range(211) if i not in token_ids)
    for eos in (token_ids[0], token_ids[7], token_ids[-1]):
        stated = eos if eos == token_ids[0] else [unused, eos]
        llm = set_eos(checkpoint[0], tmp_path, stated)
        for max_new_tokens in (1, 30):
            [output] = llm.generate([prompt], SamplingParams(max_new_tokens=max_new_tokens))
            expected = token_ids[: min(token_ids.index(eos) + 1, max_new_tokens)]
            assert output.token_ids == expected
            assert output.finish_reason == ("stop" if expected[-1] == eos else "length")
        [output] = llm.generate([prompt], SamplingParams(max_new_tokens=30, ignore_eos=True))
        assert output.token_ids == token_ids and output.finish_reason == "length"


def test_stop_token_ids(llm: LLM, checkpoint: tuple[Path, Qwen3MoeForCausalLM]) -> None:
    """They end one request, even one that ignores end tokens."""
    prompt = random_prompt(20)
    token_ids = generated(checkpoint[1], prompt, 20)
    stop = token_ids[random.randrange(20)]
    params = [SamplingParams(max_new_tokens=20, stop_token_ids=ids, ignore_eos=True) for ids in ((stop,), ())]
    first, second = reset(llm).generate([prompt] * 2, params)
    assert first.token_ids == token_ids[: token_ids.index(stop) + 1] and first.finish_reason == "stop"
    assert second.token_ids == token_ids and second.finish_reason == "length"


@AHEAD
def test_sequences_of_a_batch_finish_independently(
    runs_ahead: bool, llm: LLM, checkpoint: tuple[Path, Qwen3MoeForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [random_prompt(length) for length in (3, 130, 20, 64)]
    expected = [generated(checkpoint[1], prompt, 12) for prompt in prompts]
    eos = expected[1][3]
    reset(llm, batch_size=4, runs_ahead=runs_ahead)
    monkeypatch.setattr(llm.tokenizer, "eos_token_ids", frozenset({eos}))
    for token_ids, output in zip(expected, llm.generate(prompts, SamplingParams(max_new_tokens=12)), strict=True):
        end = token_ids.index(eos) + 1 if eos in token_ids else 12
        assert output.token_ids == token_ids[:end]
    assert_all_free(llm)


# A step ahead


def watched_run(
    llm: LLM, prompts: list[list[int]], params: list[SamplingParams], monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[int, RequestOutput], int]:
    """Outputs, and the number of decode steps that were launched before the tokens of the one before were read."""
    ahead, decode = 0, ModelRunner.decode

    def watched_decode(runner: ModelRunner, batches: Batches, unread: Unread | None) -> Any:
        nonlocal ahead
        ahead += unread is not None
        for work in batches[0]:
            assert work.end <= work.sequence.max_len and work.num_computed // BLOCK_SIZE < len(work.sequence.blocks)
        return decode(runner, batches, unread)

    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "decode", watched_decode)
        requests = [
            llm.request("", prompt, one, index) for index, (prompt, one) in enumerate(zip(prompts, params, strict=True))
        ]
        return dict(llm.finished(requests)), ahead


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_asynchronous_scheduling_equals_synchronous(
    batch_size: int, sampling: str, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EOS, length limits, waiting sequences and block boundaries, with the host one step ahead."""
    prompts = [random_prompt(length) for length in (126, 3, 128, 20, 255)]
    more = SAMPLINGS[sampling]
    params = [SamplingParams(max_new_tokens=n, ignore_eos=n == 9, **more) for n in (25, 9, 12, 1, 2)]
    found = {}
    for runs_ahead in (False, True):
        reset(llm, batch_size=batch_size, num_blocks=4, runs_ahead=runs_ahead)
        [free] = llm.generate(prompts[:1], SamplingParams(max_new_tokens=25, ignore_eos=True, **more))
        reset(llm, batch_size=batch_size, num_blocks=4, runs_ahead=runs_ahead)
        with monkeypatch.context() as patch:
            patch.setattr(llm.tokenizer, "eos_token_ids", frozenset({free.token_ids[6]}))
            outputs, ahead = watched_run(llm, prompts, params, monkeypatch)
        assert (ahead > 0) == (runs_ahead and sampling != "penalty")
        assert outputs[0].finish_reason == "stop" and len(outputs[0].token_ids) <= 7
        assert all(len(o.token_intervals_ms) == len(o.token_ids) - 1 for o in outputs.values())
        found[runs_ahead] = [(outputs[i].token_ids, outputs[i].finish_reason) for i in range(len(prompts))]
        assert_all_free(llm)
    assert found[True] == found[False]


# Texts


def test_eos_of_the_tokenizer_stops(with_tokenizer: Path, writer: LLM, tmp_path: Path) -> None:
    own = writer.tokenizer.tokenizer.eos_token_id
    assert writer.tokenizer.eos_token_ids == {own}
    assert set_eos(with_tokenizer, tmp_path, [5, 6]).tokenizer.eos_token_ids == {5, 6, own}


@AHEAD
@pytest.mark.parametrize("length", [1, 2, 5, 15, 40])
def test_stop_strings(length: int, runs_ahead: bool, writer: LLM) -> None:
    """Generation ends at the first match; the text ends before it."""
    llm = reset(writer, runs_ahead=runs_ahead)
    prompt = random_prompt(30)
    sampling = {"max_new_tokens": 60, "temperature": 2.0, "seed": random.randrange(2**32), "ignore_eos": True}
    [free] = llm.generate([prompt], SamplingParams(**sampling))
    places = [i for i in range(len(free.text) - length) if "\ufffd" not in free.text[i : i + length]]
    for start in random.sample(places, min(3, len(places))):
        stop = free.text[start : start + length]
        params = SamplingParams(stop=(stop[length // 2 :], "never seen", stop), **sampling)
        [output] = llm.generate([prompt], params)
        stops = (stop, stop[length // 2 :])
        texts = {n: llm.tokenizer.decode(free.token_ids[:n]) for n in range(1, 61)}
        needed = next(n for n, text in texts.items() if any(stop in text for stop in stops))
        assert output.token_ids == free.token_ids[:needed]
        assert output.text == texts[needed][: min(texts[needed].find(stop) for stop in stops if stop in texts[needed])]
        assert output.finish_reason == "stop"
        chunks = list(llm.stream([prompt], params))
        assert "".join(chunk.text for chunk in chunks) == output.text
        assert [token_id for chunk in chunks for token_id in chunk.token_ids] == output.token_ids
        assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert_all_free(llm)


def test_stop_string_without_match(writer: LLM) -> None:
    [output] = reset(writer).generate([random_prompt(5)], SamplingParams(max_new_tokens=9, stop=("never seen",)))
    assert output.finish_reason == "length" and output.text == writer.tokenizer.decode(output.token_ids)


@AHEAD
def test_stop_strings_before_min_tokens(runs_ahead: bool, writer: LLM) -> None:
    """One that was complete earlier does not end the output later, and its text is streamed."""
    llm = reset(writer, runs_ahead=runs_ahead)
    prompt, sampling = random_prompt(30), {"max_new_tokens": 40, "temperature": 2.0, "seed": random.randrange(2**32)}
    for min_tokens in (10, 20, 40):
        sampling |= {"ignore_eos": True, "min_tokens": min_tokens}
        [free] = llm.generate([prompt], SamplingParams(**sampling))
        stop = llm.tokenizer.decode(free.token_ids[2:5]).strip("\ufffd")
        texts = [llm.tokenizer.decode(free.token_ids[:n]) for n in range(41)]
        later = (n for n in range(min_tokens, 41) if find_stop(texts[n], texts[n - 1], stop) >= 0)
        expected = free.token_ids[: next(later, 40)]
        params = SamplingParams(**sampling, stop=(stop,))
        [output] = llm.generate([prompt], params)
        assert output.token_ids == expected
        chunks = list(llm.stream([prompt], params))
        assert "".join(chunk.text for chunk in chunks) == output.text
        assert stop in output.text and sum(bool(chunk.text) for chunk in chunks) > min_tokens // 3


def test_a_stop_string_across_tokens_without_text(writer: LLM) -> None:
    """Special tokens are skipped in the text, however many there are."""
    [eos] = [token_id for token_id in writer.tokenizer.eos_token_ids][:1]
    first, last = (writer.tokenizer.encode(text)[0] for text in ("c", "t"))
    order = [first, *[eos] * 30, last]
    allowed = torch.zeros(writer.config.vocab_size, dtype=torch.bool)

    def mask(ids: list[int]) -> torch.Tensor:
        return allowed.index_fill(0, torch.tensor(order[len(ids)]), True)

    params = SamplingParams(max_new_tokens=len(order), ignore_eos=True, stop=("ct",), mask=mask)
    [output] = reset(writer).generate([random_prompt(5)], params)
    assert output.finish_reason == "stop" and output.text == "" and output.token_ids == order


def test_the_beginning_of_a_longer_stop_string_is_returned_once_no_stop_string_counts() -> None:
    """Where a whole stop string came before min_tokens, as its characters would else be held as that beginning."""
    stops = ("abcd", "bc")
    assert longest_overlap("abc", stops) == 3 and longest_overlap("abcx", stops, before=3) == 0
    assert longest_overlap("abcxbc", stops, before=4) == 2 and longest_overlap("abcd", stops, before=3) == 4


def test_a_stop_string_whose_first_character_has_several_tokens(writer: LLM) -> None:
    """The text of the last tokens may begin within it."""
    stop = "鿿abcdef"
    ids = [token_id for byte in stop for token_id in writer.tokenizer.encode(byte)]
    allowed = torch.zeros(writer.config.vocab_size, dtype=torch.bool)

    def mask(generated: list[int]) -> torch.Tensor:
        return allowed.index_fill(0, torch.tensor(ids[len(generated)]), True)

    params = SamplingParams(max_new_tokens=len(ids) + 1, ignore_eos=True, stop=(stop,), mask=mask)
    [output] = reset(writer).generate([random_prompt(5)], params)
    assert writer.tokenizer.decode(ids) == stop and len(ids) > len(stop)
    assert output.finish_reason == "stop" and output.text == "" and output.token_ids == ids


def test_a_stop_string_that_ends_in_a_character_of_several_tokens() -> None:
    assert find_stop("café au lait", "caf\ufffd", "é") == 3
    assert find_stop("café", "café", "é") == -1
