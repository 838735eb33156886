# SPDX-License-Identifier: Apache-2.0
"""Paged KV cache, rejected requests, failures and times: tokens equal transformers' in every batch."""

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from executor import LLM, RequestOutput, SamplingParams
from executor.engine.launched import Launched
from executor.engine.model_runner import ModelRunner
from executor.engine.scheduler import Scheduler
from ops.step import blocks_for
from tests.engine.engines import assert_all_free, generated, random_prompt, reset, sharp_model

BORDERS = [1, 2, 127, 128, 129, 255, 256]
AHEAD = pytest.mark.parametrize("runs_ahead", [False, True])


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM, Qwen3MoeForCausalLM]:
    folder = tmp_path_factory.mktemp("sharp")
    model = sharp_model(folder)
    return LLM(folder, device="cpu", dtype="float32", batch_size=8, cache_tokens=40 * 128), model


@pytest.fixture
def llm(loaded: tuple[LLM, Qwen3MoeForCausalLM]) -> LLM:
    return reset(loaded[0])


@pytest.fixture
def model(loaded: tuple[LLM, Qwen3MoeForCausalLM]) -> Qwen3MoeForCausalLM:
    return loaded[1]


@pytest.fixture(scope="module")
def texts(loaded: tuple[LLM, Qwen3MoeForCausalLM]) -> list[tuple[list[int], list[int]]]:
    """Prompts and what follows them."""
    prompts = map(random_prompt, BORDERS)
    return [(prompt, generated(loaded[1], prompt, 10)) for prompt in prompts]


# Tokens


@AHEAD
@pytest.mark.parametrize(("batch_size", "max_step_tokens"), [(1, 8192), (3, 150), (8, 8192), (8, 60)])
def test_tokens_equal_transformers_across_block_boundaries(
    batch_size: int, max_step_tokens: int, runs_ahead: bool, llm: LLM, texts: list[tuple[list[int], list[int]]]
) -> None:
    reset(llm, batch_size=batch_size, max_step_tokens=max_step_tokens, runs_ahead=runs_ahead)
    random.shuffle(texts)
    outputs = llm.generate([prompt for prompt, _ in texts], SamplingParams(max_new_tokens=10))
    for (prompt, expected), output in zip(texts, outputs, strict=True):
        assert output.prompt_token_ids == prompt and output.token_ids == expected
        assert output.finish_reason == "length" and output.num_cached_tokens == 0
    assert_all_free(llm)


def test_decode_spans_several_blocks(llm: LLM, model: Qwen3MoeForCausalLM) -> None:
    prompt = random_prompt(250)
    [output] = llm.generate([prompt], SamplingParams(max_new_tokens=140))
    assert output.token_ids == generated(model, prompt, 140)


def test_long_prompt(llm: LLM, model: Qwen3MoeForCausalLM) -> None:
    prompt = random_prompt(4080)
    expected = generated(model, prompt, 32)
    for max_step_tokens in (8192, 1000):
        reset(llm, max_step_tokens=max_step_tokens)
        [output] = llm.generate([prompt], SamplingParams(max_new_tokens=32))
        assert output.token_ids == expected


@AHEAD
def test_cache_too_small_for_all_sequences(
    runs_ahead: bool, llm: LLM, model: Qwen3MoeForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [250, 3, 130, 250, 1, 128]
    prompts = [random_prompt(length) for length in lengths]
    reset(llm, batch_size=len(prompts), num_blocks=3, runs_ahead=runs_ahead)
    largest, schedule = 0, Scheduler.schedule

    def watched_schedule(scheduler: Scheduler, *arguments: bool) -> Any:
        nonlocal largest
        batch = schedule(scheduler, *arguments)
        in_use = {block for sequence in scheduler.running for block in sequence.blocks}
        assert sorted({*in_use, *scheduler.pool.free}) == [1, 2, 3] and not in_use & set(scheduler.pool.free)
        assert all(len(work.sequence.blocks) >= blocks_for(work.end) for work in batch or [])
        largest = max(largest, len(scheduler.running))
        return batch

    monkeypatch.setattr(Scheduler, "schedule", watched_schedule)
    outputs = llm.generate(prompts, SamplingParams(max_new_tokens=6))
    assert 1 < largest < len(prompts)
    assert [o.token_ids for o in outputs] == [generated(model, prompt, 6) for prompt in prompts]
    assert_all_free(llm)


def test_stale_cache_is_ignored(llm: LLM, model: Qwen3MoeForCausalLM) -> None:
    prompt = random_prompt(200)
    for keys, values in llm.kv_caches:
        keys.normal_(0, 100)
        values.normal_(0, 100)
    for max_step_tokens in (8192, 70):
        reset(llm, max_step_tokens=max_step_tokens)
        [output] = llm.generate([prompt], SamplingParams(max_new_tokens=6))
        assert output.token_ids == generated(model, prompt, 6)


@AHEAD
def test_cached_prefixes(runs_ahead: bool, llm: LLM, model: Qwen3MoeForCausalLM) -> None:
    """One sequence's tokens are found by later ones and by those that run beside it; the result stays the same."""
    reset(llm, runs_ahead=runs_ahead)
    prefix = random_prompt(300)
    [first] = llm.generate([prefix], SamplingParams(max_new_tokens=100))
    prompts = [prefix + first.token_ids[:length] for length in (0, 1, 84)]
    prompts.append([*prefix[:200], (prefix[200] + 1) % 211, *random_prompt(30)])
    before = llm.runner.tokens_run
    outputs = llm.generate(prompts, SamplingParams(max_new_tokens=5))
    cached = [output.num_cached_tokens for output in outputs]
    assert cached == [299, 300, 383, 200]  # at least one token is left to compute
    assert llm.runner.tokens_run - before == sum(map(len, prompts)) - sum(cached) + 4 * 4
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == generated(model, prompt, 5)
    assert_all_free(llm)
    reset(llm, prefix_cache=False)
    assert [output.num_cached_tokens for output in llm.generate(prompts[:1] * 2)] == [0, 0]


@AHEAD
def test_runs_at_the_same_time(runs_ahead: bool, llm: LLM, model: Qwen3MoeForCausalLM) -> None:
    """Each gets its own outputs, though all share the engine's steps."""
    reset(llm, batch_size=3, runs_ahead=runs_ahead)
    prompts = [random_prompt(length) for length in (130, 5, 40, 200)]
    expected = [generated(model, prompt, 12) for prompt in prompts]
    params = SamplingParams(max_new_tokens=12)
    streams = [llm.stream(prompts[:2], params), llm.stream(prompts[2:3], params)]
    found: list[list[int]] = [[], [], [], []]
    for number in (0, 1, 1, 0):
        chunk = next(streams[number])
        found[2 * number + chunk.index] += chunk.token_ids
    assert llm.generate(prompts[3], params)[0].token_ids == expected[3]
    for number, stream in enumerate(streams):
        for chunk in stream:
            found[2 * number + chunk.index] += chunk.token_ids
    assert found[:3] == expected[:3]
    assert_all_free(llm)


# Rejected requests and early termination


@pytest.mark.parametrize(
    ("num_tokens", "max_new_tokens", "named"),
    [
        (250, 8, "250 tokens and 8 new ones needs more than the cache's 256 tokens"),
        (1, 4112, "is more than 4112: raise data_config.input_max_len or data_config.max_new_tokens"),
        (4113, 1, "is more than 4112"),
        (0, 1, "token ids must be at least one, each from 0 to 210"),
    ],
)
def test_rejected_requests(num_tokens: int, max_new_tokens: int, named: str, llm: LLM) -> None:
    reset(llm, num_blocks=2)
    for run in (llm.generate, llm.stream):
        with pytest.raises(ValueError, match=named):
            run([random_prompt(5), random_prompt(num_tokens)], SamplingParams(max_new_tokens=max_new_tokens))
    assert not llm.engine.has_work
    assert_all_free(llm)
    assert llm.generate([random_prompt(250)], SamplingParams(max_new_tokens=6))[0].finish_reason == "length"


@pytest.mark.parametrize("token_id", [-1, 211])
def test_token_ids_out_of_vocabulary(token_id: int, llm: LLM) -> None:
    for run in (llm.generate, llm.stream, llm.score, llm.logits):
        with pytest.raises(ValueError, match="each from 0 to 210"):
            run([1, token_id])  # type: ignore[operator]


@AHEAD
def test_abandoned_run_frees_blocks(runs_ahead: bool, llm: LLM, model: Qwen3MoeForCausalLM) -> None:
    reset(llm, batch_size=3, runs_ahead=runs_ahead)
    prompts = [random_prompt(n) for n in (130, 5)]
    stream = llm.stream(prompts * 2, [SamplingParams(max_new_tokens=n) for n in (9, 9, 2, 2)])
    for _ in range(4):
        next(stream)
    assert llm.engine.schedulers[0].running and llm.engine.schedulers[0].waiting
    assert bool(llm.engine.in_flight) == runs_ahead
    stream.close()
    assert not llm.engine.schedulers[0].running and not llm.engine.schedulers[0].waiting
    assert_all_free(llm)
    assert llm.generate([[7]], SamplingParams(max_new_tokens=2))[0].token_ids == generated(model, [7], 2)
    llm.stream(prompts).close()  # not begun
    assert not llm.engine.has_work


@pytest.mark.parametrize("failing", ["prompt", "decode", "read"])
@AHEAD
def test_failed_step_frees_blocks(
    runs_ahead: bool, failing: str, llm: LLM, model: Qwen3MoeForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has written is trusted by nobody."""
    prompt = random_prompt(130)
    reset(llm, batch_size=2, runs_ahead=runs_ahead)
    place = {"prompt": (ModelRunner, "mixed_inputs"), "decode": (ModelRunner, "decode"), "read": (Launched, "read")}

    def fail(*arguments: Any) -> None:
        for cache in (cache for layer in llm.kv_caches for cache in layer):
            for sequence in llm.engine.schedulers[0].running:
                cache[sequence.blocks] = torch.nan
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the device is gone"):
        patch.setattr(*place[failing], fail)
        llm.generate([prompt] * 3, SamplingParams(max_new_tokens=5))
    assert not llm.engine.has_work
    assert_all_free(llm)
    outputs = llm.generate([prompt] * 2, SamplingParams(max_new_tokens=5))
    assert [output.token_ids for output in outputs] == [generated(model, prompt, 5)] * 2
    assert outputs[0].num_cached_tokens == 0


def test_a_run_beside_a_failed_one_ends_with_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = llm.stream([random_prompt(5)], SamplingParams(max_new_tokens=9))
    next(stream)

    def fail(*arguments: Any) -> None:
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the device is gone"):
        patch.setattr(ModelRunner, "run", fail)
        llm.generate([1, 2])
    with pytest.raises(RuntimeError, match="another request's failure"):
        list(stream)
    assert_all_free(llm)


def test_logits_frees_blocks(llm: LLM) -> None:
    llm.logits(random_prompt(300))
    assert_all_free(llm)


# Times


@pytest.mark.parametrize("max_new_tokens", [1, 2, 5])
def test_times(max_new_tokens: int, llm: LLM) -> None:
    reset(llm, batch_size=2)
    outputs = llm.generate([[1], [2], [3]], SamplingParams(max_new_tokens=max_new_tokens))
    for output in outputs:
        assert isinstance(output, RequestOutput) and output.ttft_ms is not None and output.ttft_ms > 0
        assert len(output.token_ids) == max_new_tokens and len(output.token_intervals_ms) == max_new_tokens - 1
        if max_new_tokens == 1:
            assert output.tpot_ms is None
        else:
            assert output.tpot_ms == pytest.approx(sum(output.token_intervals_ms) / (max_new_tokens - 1))
            assert all(interval > 0 for interval in output.token_intervals_ms)


def test_a_stream_closed_within_a_step(llm: LLM, model: Qwen3MoeForCausalLM) -> None:
    """As garbage collection may do, or a mask: the others go on, and no block is lost."""
    prompts = [random_prompt(130) for _ in range(2)]
    other = llm.stream([prompts[0]], SamplingParams(max_new_tokens=100, ignore_eos=True))
    next(other)
    closing = SamplingParams(max_new_tokens=9, ignore_eos=True, mask=lambda ids: other.close())
    [output] = llm.generate([prompts[1]], closing)
    assert output.token_ids == generated(model, prompts[1], 9)
    assert_all_free(llm)


def test_a_mask_that_uses_the_llm(llm: LLM) -> None:
    within = SamplingParams(max_new_tokens=3, mask=lambda ids: llm.generate([[1, 2]]) and None)
    [output] = llm.generate([random_prompt(5)], within)
    assert output.error == "mask: a mask cannot use the LLM that calls it"
    assert_all_free(llm)


def test_a_mask_cannot_change_the_output(llm: LLM, model: Qwen3MoeForCausalLM) -> None:
    prompt = random_prompt(20)
    [output] = llm.generate([prompt], SamplingParams(max_new_tokens=6, ignore_eos=True, mask=lambda ids: ids.clear()))
    assert output.token_ids == generated(model, prompt, 6)


def test_several_threads(llm: LLM, model: Qwen3MoeForCausalLM) -> None:
    prompts = [random_prompt(random.randint(1, 200)) for _ in range(12)]
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)

    def run(number: int) -> list[list[int]]:
        return [llm.generate([prompt], params)[0].token_ids for prompt in prompts[number::3]]

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(run, range(3), timeout=120))
    for number in range(3):
        assert found[number] == [generated(model, prompt, 8) for prompt in prompts[number::3]]
    assert_all_free(llm)


@pytest.mark.parametrize("cause", ["mask", "min_tokens", "both"])
def test_where_no_token_is_allowed_the_prefix_stays_cached(cause: str, llm: LLM) -> None:
    """The logits are finite: the request ends alone, and its error names what forbids all tokens."""
    prompt, vocab_size = random_prompt(300), llm.config.vocab_size
    llm.generate([prompt], SamplingParams(max_new_tokens=1))
    only_5 = torch.arange(vocab_size) == 5
    stop_token_ids = tuple(range(vocab_size)) if cause == "min_tokens" else (5,)
    mask = {"mask": lambda ids: 1 / 0, "both": lambda ids: only_5}.get(cause)
    params = SamplingParams(max_new_tokens=4, min_tokens=2, stop_token_ids=stop_token_ids, mask=mask)
    [output] = llm.generate([prompt], params)
    assert output.finish_reason == "error" and output.token_ids == []
    assert (
        output.error
        == {
            "mask": "mask: division by zero",
            "min_tokens": "no token is allowed by min_tokens and bad_words",
            "both": "no token is allowed by its mask, min_tokens and bad_words",
        }[cause]
    )
    [again] = llm.generate([prompt], SamplingParams(max_new_tokens=1))
    assert again.num_cached_tokens == len(prompt) - 1
    assert_all_free(llm)
