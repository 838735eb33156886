# SPDX-License-Identifier: Apache-2.0
"""Scheduling, paged KV cache and stop conditions: tokens equal transformers' in every batch."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from executor import LLM, RequestOutput, SamplingParams
from executor.config import REPOSITORY
from executor.engine.kv_cache import BLOCK_SIZE, BlockAllocator, blocks_for, cache_tensors
from executor.engine.model_runner import ModelRunner
from tests.checkpoints import TINY, make_model

BORDERS = [1, 2, 127, 128, 129, 255, 256]


def random_prompt(num_tokens: int) -> list[int]:
    return random.choices(range(TINY["vocab_size"]), k=num_tokens)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Checkpoint folder and model; peaked attention makes the output depend on every cached token."""
    folder = tmp_path_factory.mktemp("sharp")
    model = make_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight *= 4
            layer.self_attn.v_proj.weight *= 4
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory) -> Path:
    """A random model with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("texts")
    make_model(vocab_size=2048).save_pretrained(folder)
    for file in (REPOSITORY / "models/qwen3_moe/demo").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def build(checkpoint, runs_ahead: bool = False, **settings) -> LLM:
    llm = LLM(checkpoint[0], device="cpu", dtype="float32", **settings)
    llm.engine.runs_ahead = runs_ahead  # as on devices that run asynchronously
    return llm


def generated(model, prompt: list[int], max_new_tokens: int) -> list[int]:
    """Greedy tokens by transformers."""
    token_ids = torch.tensor([prompt])
    mask = torch.ones_like(token_ids)
    return model.generate(token_ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)[
        0, len(prompt) :
    ].tolist()


def assert_all_free(llm: LLM) -> None:
    [scheduler] = llm.engine.schedulers
    assert sorted(scheduler.allocator.free_blocks) == list(range(1, llm.num_blocks + 1))
    assert not scheduler.running and not scheduler.waiting


# Tokens


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_tokens_equal_transformers_across_block_boundaries(batch_size, checkpoint):
    prompts = [random_prompt(length) for length in random.sample(BORDERS, len(BORDERS))]
    llm = build(checkpoint, batch_size=batch_size)
    outputs = llm.generate(prompts, SamplingParams(max_new_tokens=10))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.prompt_token_ids == prompt
        assert output.token_ids == generated(checkpoint[1], prompt, 10)
        assert output.finish_reason == "length"
    assert_all_free(llm)


def test_decode_spans_several_blocks(checkpoint):
    prompt = random_prompt(120)
    [output] = build(checkpoint).generate([prompt], SamplingParams(max_new_tokens=270))
    assert output.token_ids == generated(checkpoint[1], prompt, 270)


def test_long_prompt(checkpoint):
    prompt = random_prompt(4080)
    [output] = build(checkpoint).generate([prompt], SamplingParams(max_new_tokens=32))
    assert output.token_ids == generated(checkpoint[1], prompt, 32)


def test_cache_too_small_for_all_sequences(checkpoint):
    lengths = [250, 3, 130, 250, 1, 128]
    prompts = [random_prompt(length) for length in lengths]
    llm = build(checkpoint, batch_size=len(prompts), cache_tokens=3 * BLOCK_SIZE)
    largest = 0
    decode = llm.runner.decode

    def watched_decode(batches, *latest):
        nonlocal largest
        [sequences], [scheduler] = batches, llm.engine.schedulers
        largest = max(largest, len(sequences))
        assert sum(blocks_for(s.max_len) for s in sequences) + len(scheduler.allocator.free_blocks) == 3
        return decode(batches, *latest)

    llm.runner.decode = watched_decode
    outputs = llm.generate(prompts, SamplingParams(max_new_tokens=6))
    assert 1 < largest < len(prompts)
    assert [o.token_ids for o in outputs] == [generated(checkpoint[1], prompt, 6) for prompt in prompts]
    assert_all_free(llm)


def test_stale_cache_is_ignored(checkpoint):
    prompt = random_prompt(200)
    llm = build(checkpoint)
    for keys, values in llm.kv_caches:
        keys.normal_(0, 100)
        values.normal_(0, 100)
    [output] = llm.generate([prompt], SamplingParams(max_new_tokens=6))
    assert output.token_ids == generated(checkpoint[1], prompt, 6)


def test_packed_prefill_is_bounded(checkpoint, monkeypatch):
    monkeypatch.setattr("executor.engine.scheduler.MAX_PREFILL_TOKENS", 100)
    llm = build(checkpoint, batch_size=8)
    packed = []
    prefill = llm.runner.prefill
    llm.runner.prefill = lambda batches: packed.append([len(s) for s in batches[0]]) or prefill(batches)
    llm.generate([random_prompt(length) for length in (60, 40, 1, 150, 50)], SamplingParams(max_new_tokens=2))
    assert packed == [[60, 40], [1], [150], [50]]


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
def test_rejected_requests(num_tokens, max_new_tokens, named, checkpoint):
    llm = build(checkpoint, cache_tokens=256)
    with pytest.raises(ValueError, match=named):
        llm.generate([random_prompt(5), random_prompt(num_tokens)], SamplingParams(max_new_tokens=max_new_tokens))
    assert_all_free(llm)
    assert llm.generate([random_prompt(250)], SamplingParams(max_new_tokens=6))[0].finish_reason == "length"


@pytest.mark.parametrize("token_id", [-1, 211])
def test_token_ids_out_of_vocabulary(token_id, checkpoint):
    with pytest.raises(ValueError, match="each from 0 to 210"):
        build(checkpoint).generate([[1, token_id]])
    with pytest.raises(ValueError, match="each from 0 to 210"):
        build(checkpoint).logits([1, token_id])


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_abandoned_run_frees_blocks(runs_ahead, checkpoint):
    llm = build(checkpoint, runs_ahead, batch_size=2)
    short, long = (SamplingParams(max_new_tokens=n) for n in (2, 9))
    prompts = [("", random_prompt(n)) for n in (130, 5)]
    stream = llm.stream(llm.requests(prompts, long) + llm.requests(prompts, short))
    llm.engine.schedulers[0].batch_size = 3
    next(stream)
    assert llm.engine.schedulers[0].running and llm.engine.schedulers[0].waiting
    stream.close()
    assert_all_free(llm)
    assert llm.generate([[7]], short)[0].token_ids == generated(checkpoint[1], [7], 2)


@pytest.mark.parametrize("failing", ["prefill", "decode"])
@pytest.mark.parametrize("runs_ahead", [False, True])
def test_failed_step_frees_blocks(runs_ahead, failing, checkpoint, monkeypatch):
    prompt = random_prompt(130)
    llm = build(checkpoint, runs_ahead, batch_size=2)

    def fail(*_):
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the device is gone"):
        patch.setattr(ModelRunner, failing, fail)
        llm.generate([prompt] * 3, SamplingParams(max_new_tokens=5))
    assert_all_free(llm)
    [output] = llm.generate([prompt], SamplingParams(max_new_tokens=5))
    assert output.token_ids == generated(checkpoint[1], prompt, 5)


def test_concurrent_runs_are_rejected(checkpoint):
    """A second run during another one is rejected: it would receive the first one's outputs."""
    llm = build(checkpoint, batch_size=2)
    short, long = (llm.requests([("", [1, 2])], SamplingParams(max_new_tokens=n)) for n in (2, 5))
    stream = llm.stream(short + long)
    next(stream)
    with pytest.raises(RuntimeError, match="run"):
        llm.generate([random_prompt(3)])
    [(_, output)] = stream
    assert output.token_ids == generated(checkpoint[1], [1, 2], 5)
    assert_all_free(llm)


def test_logits_frees_blocks(checkpoint):
    llm = build(checkpoint)
    llm.logits(random_prompt(300))
    assert_all_free(llm)


def test_allocator_allocates_each_block_once():
    cache = BlockAllocator(9)
    held: list[list[int]] = []
    for _ in range(200):
        if held and random.random() < 0.5:
            cache.free(held.pop(random.randrange(len(held))))
        else:
            num_tokens = random.randint(1, 4 * BLOCK_SIZE)
            blocks = cache.allocate(num_tokens)
            assert (blocks is None) == (-(-num_tokens // BLOCK_SIZE) > 9 - sum(map(len, held)))
            held += [blocks] if blocks else []
        taken = [block for blocks in held for block in blocks]
        assert sorted(taken + cache.free_blocks) == list(range(1, 10))
    layers = cache_tensors(2, 9, 1, 4, torch.float32, torch.device("cpu"))
    assert all(keys.shape == (10, BLOCK_SIZE, 1, 4) == values.shape for keys, values in layers)


# Stop conditions


def set_eos(checkpoint, folder: Path, eos_token_id) -> LLM:
    shutil.copytree(checkpoint[0], folder, dirs_exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_token_id}))
    return build((folder,))


def test_every_eos_id_stops(checkpoint, tmp_path):
    prompt = random_prompt(20)
    token_ids = generated(checkpoint[1], prompt, 30)
    unused = next(i for i in range(211) if i not in token_ids)
    for eos in (token_ids[0], token_ids[7], token_ids[-1]):
        stated = eos if eos == token_ids[0] else [unused, eos]
        llm = set_eos(checkpoint, tmp_path, stated)
        for max_new_tokens in (1, 30):
            [output] = llm.generate([prompt], SamplingParams(max_new_tokens=max_new_tokens))
            expected = token_ids[: min(token_ids.index(eos) + 1, max_new_tokens)]
            assert output.token_ids == expected
            assert output.finish_reason == ("stop" if expected[-1] == eos else "length")
        [output] = llm.generate([prompt], SamplingParams(max_new_tokens=30, ignore_eos=True))
        assert output.token_ids == token_ids and output.finish_reason == "length"


def test_sequences_of_a_batch_finish_independently(checkpoint, tmp_path):
    prompts = [random_prompt(length) for length in (3, 130, 20, 64)]
    expected = [generated(checkpoint[1], prompt, 12) for prompt in prompts]
    eos = expected[1][3]
    llm = set_eos(checkpoint, tmp_path, eos)
    llm.engine.schedulers[0].batch_size = 4
    for token_ids, output in zip(expected, llm.generate(prompts, SamplingParams(max_new_tokens=12)), strict=True):
        end = token_ids.index(eos) + 1 if eos in token_ids else 12
        assert output.token_ids == token_ids[:end]


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.5, "seed": 5}, {"repetition_penalty": 1.3}], ids=["greedy", "random", "penalty"]
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_asynchronous_scheduling_equals_synchronous(batch_size, sampling, checkpoint, tmp_path):
    """EOS, length limits, waiting sequences and block boundaries, with the host one step ahead."""
    prompts = [random_prompt(length) for length in (126, 3, 128, 20, 255)]
    params = [SamplingParams(max_new_tokens=n, ignore_eos=n == 9, **sampling) for n in (25, 9, 12, 1, 2)]
    found = {}
    for runs_ahead in (False, True):
        llm = build(checkpoint, runs_ahead, batch_size=batch_size, cache_tokens=4 * BLOCK_SIZE)
        [free] = llm.generate(prompts[:1], SamplingParams(max_new_tokens=25, ignore_eos=True, **sampling))
        llm = set_eos(checkpoint, tmp_path, free.token_ids[6])
        llm.engine.runs_ahead = runs_ahead
        llm.engine.schedulers[0].batch_size = batch_size
        ahead = 0
        decode = llm.runner.decode

        def watched_decode(batches, latest=None, decode=decode):
            nonlocal ahead
            ahead += latest is not None
            for sequence in batches[0]:
                position = len(sequence) - 1 + (latest is not None)
                assert position < sequence.max_len and position // BLOCK_SIZE < len(sequence.blocks)
            return decode(batches, latest)

        llm.runner.decode = watched_decode
        requests = [llm.requests([("", prompt)], one)[0] for prompt, one in zip(prompts, params, strict=True)]
        for index, sequence in enumerate(requests):
            sequence.index = index
        outputs = dict(llm.stream(requests))
        assert (ahead > 0) == (runs_ahead and "repetition_penalty" not in sampling)
        assert outputs[0].finish_reason == "stop" and len(outputs[0].token_ids) <= 7
        assert all(len(o.token_intervals_ms) == len(o.token_ids) - 1 for o in outputs.values())
        found[runs_ahead] = [(outputs[i].token_ids, outputs[i].finish_reason) for i in range(len(prompts))]
        assert_all_free(llm)
    assert found[True] == found[False]


def test_eos_of_the_tokenizer_stops(with_tokenizer):
    llm = build((with_tokenizer,))
    assert llm.tokenizer.eos_token_ids == {llm.tokenizer.tokenizer.eos_token_id}
    (with_tokenizer / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert build((with_tokenizer,)).tokenizer.eos_token_ids == {5, 6, llm.tokenizer.tokenizer.eos_token_id}


@pytest.mark.parametrize("length", [1, 2, 5, 15, 40])
def test_stop_strings(length, with_tokenizer):
    """Generation ends at the first match; the text ends before it."""
    llm = build((with_tokenizer,))
    prompt = random_prompt(30)
    sampling = {"max_new_tokens": 60, "temperature": 2.0, "seed": random.randrange(2**32), "ignore_eos": True}
    [free] = llm.generate([prompt], SamplingParams(**sampling))
    places = [i for i in range(len(free.text) - length) if "\ufffd" not in free.text[i : i + length]]
    for start in random.sample(places, min(5, len(places))):
        stop = free.text[start : start + length]
        [output] = llm.generate([prompt], SamplingParams(stop=(stop[length // 2 :], "never seen", stop), **sampling))
        stops = (stop, stop[length // 2 :])
        texts = {n: llm.tokenizer.decode(free.token_ids[:n]) for n in range(1, 61)}
        needed = next(n for n, text in texts.items() if any(stop in text for stop in stops))
        assert output.token_ids == free.token_ids[:needed]
        assert output.text == texts[needed][: min(texts[needed].find(stop) for stop in stops if stop in texts[needed])]
        assert output.finish_reason == "stop"


def test_stop_string_without_match(with_tokenizer):
    llm = build((with_tokenizer,))
    [output] = llm.generate([random_prompt(5)], SamplingParams(max_new_tokens=9, stop=("never seen",)))
    assert output.finish_reason == "length" and output.text == llm.tokenizer.decode(output.token_ids)


# Times


@pytest.mark.parametrize("max_new_tokens", [1, 2, 5])
def test_times(max_new_tokens, checkpoint):
    outputs = build(checkpoint, batch_size=2).generate([[1], [2], [3]], SamplingParams(max_new_tokens=max_new_tokens))
    for output in outputs:
        assert isinstance(output, RequestOutput) and output.ttft_ms > 0
        assert len(output.token_ids) == max_new_tokens and len(output.token_intervals_ms) == max_new_tokens - 1
        if max_new_tokens == 1:
            assert output.tpot_ms is None
        else:
            assert output.tpot_ms == pytest.approx(sum(output.token_intervals_ms) / (max_new_tokens - 1))
            assert all(interval > 0 for interval in output.token_intervals_ms)
