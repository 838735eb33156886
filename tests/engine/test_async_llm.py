# SPDX-License-Identifier: Apache-2.0
"""AsyncLLM: streams, cancellation, failures of one request, idle ranks."""

import asyncio
import contextlib
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from executor import LLM, AsyncLLM, SamplingParams, StreamChunk
from executor.config import REPOSITORY
from tests.checkpoints import make_model
from tests.parallel.ranks import run_ranks, settings_of

CONFIG = {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 2048}
SETTINGS = {"device": "cpu", "dtype": "float32", "batch_size": 4, "cache_memory_fraction": 0.001, "chunk_tokens": 16}
PROMPTS = ["Once upon a time", "To be, or not to be, that is the question", "7", "A horse! " * 30]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("texts")
    make_model(**CONFIG).save_pretrained(folder)
    for file in (REPOSITORY / "models/qwen3_moe/demo").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path):
    llm = AsyncLLM(folder, **SETTINGS)
    yield llm
    llm.close()


def params(number: int = 0, **settings: Any) -> SamplingParams:
    settings = {"max_new_tokens": 12, "ignore_eos": True, "temperature": 0.9, "seed": number} | settings
    return SamplingParams(**settings)


async def collect(llm: AsyncLLM, prompt: str, sampling: SamplingParams, wait_s: float = 0) -> list[StreamChunk]:
    await asyncio.sleep(wait_s)
    return [chunk async for chunk in llm.generate(prompt, sampling)]


def text_of(chunks: list[StreamChunk], sample: int = 0) -> tuple[str, list[int], str | None]:
    own = [chunk for chunk in chunks if chunk.sample == sample]
    tokens = [token_id for chunk in own for token_id in chunk.token_ids]
    return "".join(chunk.text for chunk in own), tokens, own[-1].finish_reason


def expected(folder: Path, samplings: list[SamplingParams]) -> list[tuple[str, list[int], str | None]]:
    alone = LLM(folder, **(SETTINGS | {"batch_size": 1}))
    outputs = [alone.generate(prompt, sampling)[0] for prompt, sampling in zip(PROMPTS, samplings, strict=True)]
    return [(output.text, output.token_ids, output.finish_reason) for output in outputs]


def test_requests_that_come_at_different_times_get_their_own_text(llm: AsyncLLM, folder: Path) -> None:
    samplings = [params(number, max_new_tokens=12 + 5 * number) for number in range(len(PROMPTS))]

    async def run() -> list[list[StreamChunk]]:
        tasks = [
            collect(llm, prompt, sampling, 0.05 * number)
            for number, (prompt, sampling) in enumerate(zip(PROMPTS, samplings, strict=True))
        ]
        return await asyncio.gather(*tasks)

    assert [text_of(chunks) for chunks in asyncio.run(run())] == expected(folder, samplings)


def test_a_closed_iterator_cancels_its_request(llm: AsyncLLM) -> None:
    async def run() -> None:
        stream = llm.generate(PROMPTS[0], params(max_new_tokens=400))
        async for _ in stream:
            break
        await stream.aclose()
        chunks = await collect(llm, PROMPTS[1], params())
        assert text_of(chunks)[2] == "length"

    asyncio.run(run())
    wait_until_idle(llm)
    [scheduler] = llm.llm.engine.schedulers
    assert sum(scheduler.pool.references) == 0 and not llm.clients


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("after", [1, 7])  # chunks: before and after the other samples start
def test_abort_ends_a_stream(num_samples: int, after: int, llm: AsyncLLM) -> None:
    async def run() -> list[StreamChunk]:
        chunks = []
        async for chunk in llm.generate(PROMPTS[0], params(max_new_tokens=400, n=num_samples), request_id="mine"):
            chunks.append(chunk)
            if len(chunks) == after:
                llm.abort("mine")
        return chunks

    chunks = asyncio.run(asyncio.wait_for(run(), timeout=60))
    assert [text_of(chunks, sample)[2] for sample in range(num_samples)] == ["cancelled"] * num_samples
    assert len(chunks) < 300
    llm.abort("nobody's")


def test_bad_requests_end_alone(llm: AsyncLLM) -> None:
    async def run() -> None:
        good = asyncio.create_task(collect(llm, PROMPTS[0], params(max_new_tokens=40)))
        await asyncio.sleep(0.02)
        for prompt, sampling, error in [
            ([5, 10**6], params(), ValueError),
            ("", params(), ValueError),
            ({"a": 1}, params(), TypeError),
            (PROMPTS[0], "hot", TypeError),
            (PROMPTS[0], params(max_new_tokens=10**6), ValueError),
            ([1, 2], params(logit_bias={5000: 1.0}), ValueError),
        ]:
            with pytest.raises(error):
                await collect(llm, prompt, sampling)
        assert text_of(await good)[2] == "length"

    asyncio.run(run())


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (lambda token_ids: None if len(token_ids) < 3 else 1 / 0, "mask: division by zero"),
        (lambda token_ids: torch.zeros(2048, dtype=torch.bool), "mask: it allows no token"),
        (lambda token_ids: torch.ones(7, dtype=torch.bool), "mask: expected a bool tensor of 2048 values"),
        (lambda token_ids: [True], "mask: expected a bool tensor of 2048 values"),
    ],
)
def test_a_failing_mask_ends_its_request_only(mask: Any, error: str, folder: Path) -> None:
    llm = LLM(folder, **SETTINGS)
    alone = llm.generate(PROMPTS[0], params(1, temperature=0.0))[0].token_ids
    outputs = llm.generate(PROMPTS[:2], [params(1, temperature=0.0), params(2, mask=mask)], use_tqdm=False)
    assert outputs[0].token_ids == alone
    assert outputs[1].finish_reason == "error" and (outputs[1].error or "").startswith(error)


def test_a_mask_is_obeyed(folder: Path) -> None:
    def odd_then_even(token_ids: Any) -> torch.Tensor:
        return torch.arange(2048) % 2 == (len(token_ids) + 1) % 2

    [output] = LLM(folder, **SETTINGS).generate(PROMPTS[0], params(1, mask=odd_then_even))
    assert [token_id % 2 for token_id in output.token_ids] == [1, 0] * 6


def test_samples_of_a_request(llm: AsyncLLM, folder: Path) -> None:
    sampling = params(3, n=3, logprobs=2)
    chunks = asyncio.run(collect(llm, PROMPTS[3], sampling))
    [output] = LLM(folder, **SETTINGS).generate(PROMPTS[3], sampling)
    assert len(output.outputs) == 3 and len({tuple(sample.token_ids) for sample in output.outputs}) > 1
    for number, sample in enumerate(output.outputs):
        assert text_of(chunks, number) == (sample.text, sample.token_ids, sample.finish_reason)
        found = [one for chunk in chunks if chunk.sample == number for one in chunk.logprobs or []]
        assert [one.token_id for one in found] == sample.token_ids == [one.token_id for one in sample.logprobs or []]
        for one, other in zip(found, sample.logprobs or [], strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4) and len(one.top) == 2


def test_an_output_comes_once_though_its_samples_end_in_one_step(folder: Path) -> None:
    llm = LLM(folder, **SETTINGS)
    requests = llm.requests(llm.encode([PROMPTS[0], PROMPTS[2]]), params(1, n=3))
    assert sorted(index for index, _ in llm.finished(requests)) == [0, 1]


def test_stop_strings_never_show(llm: AsyncLLM) -> None:
    whole, _, _ = text_of(asyncio.run(collect(llm, PROMPTS[1], params(1, max_new_tokens=60))))
    stop = whole[len(whole) // 2 : len(whole) // 2 + 4]
    chunks = asyncio.run(collect(llm, PROMPTS[1], params(1, max_new_tokens=60, stop=(stop,))))
    assert text_of(chunks)[::2] == (whole[: whole.find(stop)], "stop")


def test_closing_ends_streams(folder: Path) -> None:
    llm = AsyncLLM(folder, **SETTINGS)

    async def run() -> None:
        stream = llm.generate(PROMPTS[0], params(max_new_tokens=400))
        await anext(stream)
        await asyncio.to_thread(llm.close)
        with pytest.raises(RuntimeError, match="the engine has ended: it was closed"):
            async for _ in stream:
                pass
        with pytest.raises(RuntimeError, match="the engine has ended"):
            await anext(llm.generate(PROMPTS[0], params()))

    asyncio.run(run())
    llm.close()


def test_a_failing_step_ends_all_streams(folder: Path) -> None:
    llm = AsyncLLM(folder, **SETTINGS)

    def failing(*arguments: Any) -> None:
        raise MemoryError("no memory is left")

    async def run() -> None:
        stream = llm.generate(PROMPTS[0], params(max_new_tokens=400))
        await anext(stream)
        llm.llm.runner.run = failing  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="the engine has ended: no memory is left"):
            async for _ in stream:
                pass

    asyncio.run(run())
    llm.close()


def wait_until_idle(llm: AsyncLLM) -> None:
    deadline_s = time.monotonic() + 20
    while llm.llm.engine.has_work or not llm.inbox.empty():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def serve(folder: str, settings: dict[str, Any], samplings: list[SamplingParams]) -> tuple[list[Any], float]:
    """On rank 0 the texts of all prompts, started apart; on every rank its CPU time of a second without work."""
    torch.set_num_threads(1)
    llm = AsyncLLM(folder, **(SETTINGS | settings))
    texts: list[Any] = []
    if llm.is_serving:

        async def run() -> list[list[StreamChunk]]:
            tasks = [
                asyncio.create_task(collect(llm, prompt, sampling, 0.02 * number))
                for number, (prompt, sampling) in enumerate(zip(PROMPTS, samplings, strict=True))
            ]
            stream = llm.generate(PROMPTS[2], params(max_new_tokens=300))
            await anext(stream)
            await stream.aclose()
            return await asyncio.gather(*tasks)

        texts = [text_of(chunks) for chunks in asyncio.run(run())]
        wait_until_idle(llm)
    before = psutil.Process().cpu_times()
    time.sleep(1)
    after = psutil.Process().cpu_times()
    idle_s = after.user + after.system - before.user - before.system
    llm.close()
    assert sum(sum(scheduler.pool.references) for scheduler in llm.llm.engine.schedulers) == 0
    return texts, idle_s


@pytest.mark.parametrize("layout", [(2, 1, 1, 1), (1, 1, 1, 1)], ids=["tp", "dp"])
def test_rank_0_serves_and_the_others_follow(layout: tuple[int, int, int, int], folder: Path, tmp_path: Path) -> None:
    samplings = [params(number, max_new_tokens=12 + 5 * number) for number in range(len(PROMPTS))]
    samplings[1] = params(1, logit_bias={7: 5.0, 900: -100.0}, stop_token_ids=(3,), bad_words=("the",), min_tokens=2)
    ranks = run_ranks(2, serve, tmp_path, str(folder), settings_of(layout, 2), samplings)
    assert ranks[0][0] == expected(folder, samplings)
    assert ranks[0][1] < 0.5  # of the second in which nothing came


def test_only_rank_0_takes_requests(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm, "is_serving", False)
    with pytest.raises(RuntimeError, match="only rank 0"):
        asyncio.run(collect(llm, PROMPTS[0], params()))


@pytest.mark.parametrize("request_id", [7, None, b"x", ["a"]])
def test_ids_that_are_no_text_are_refused(request_id: Any, llm: AsyncLLM) -> None:
    with pytest.raises(TypeError, match="^request_id: expected a text, got a "):
        llm.abort(request_id)

    async def run() -> None:
        async for _ in llm.generate(PROMPTS[0], params(), request_id=request_id):
            break

    if request_id is not None:
        with pytest.raises(TypeError, match="^request_id: "):
            asyncio.run(run())
    assert text_of(asyncio.run(collect(llm, PROMPTS[0], params())))[2] == "length"


def test_an_id_can_be_used_again(llm: AsyncLLM) -> None:
    """Though the request that had it was aborted when it had finished."""

    async def run() -> None:
        for _ in range(10):
            chunks = [chunk async for chunk in llm.generate(PROMPTS[0], params(), request_id="again")]
            llm.abort("again")
            assert text_of(chunks)[2] == "length"

    asyncio.run(run())


def test_chunks_tell_errors_and_prompt_logprobs(llm: AsyncLLM) -> None:
    failing = params(mask=lambda ids: 1 / 0)
    assert asyncio.run(collect(llm, PROMPTS[0], failing))[-1].error == "mask: division by zero"
    chunks = asyncio.run(collect(llm, PROMPTS[1], params(prompt_logprobs=1, n=2)))
    first, *others = sorted(chunks, key=lambda chunk: chunk.sample)
    assert first.prompt_logprobs is not None and first.prompt_logprobs[0] is None
    assert len(first.prompt_logprobs) == len(llm.llm.tokenizer.encode(PROMPTS[1]))
    assert {(chunk.prompt_logprobs, chunk.error) for chunk in others} == {(None, None)}


def test_exit_without_close(folder: Path) -> None:
    """While the engine runs a step."""
    program = f"""
import asyncio
from executor import AsyncLLM, SamplingParams
async def main():
    llm = AsyncLLM({str(folder)!r}, **{SETTINGS!r})
    async for chunk in llm.generate("Once", SamplingParams(max_new_tokens=500, ignore_eos=True)):
        print("left")
        break
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")


def follow_a_failure(folder: str) -> tuple[str, int]:
    """On rank 1 a step fails, which its `close` reports."""
    llm = AsyncLLM(folder, world_size=2, attn_tp_size=2, moe_tp_size=2, **SETTINGS)
    index = llm.llm.parallel.world.index
    if index == 1:
        llm.llm.engine.step = lambda: (_ for _ in ()).throw(MemoryError("no memory left"))
        try:
            llm.close()
        except RuntimeError as error:
            return str(error), index
        return "nothing", index
    with contextlib.suppress(RuntimeError):
        asyncio.run(asyncio.wait_for(collect(llm, PROMPTS[0], params()), 60))
    return "", index


def test_a_failure_on_a_rank_that_does_not_serve(folder: Path, tmp_path: Path) -> None:
    (_, _), (error, index) = run_ranks(2, follow_a_failure, tmp_path, str(folder))
    assert index == 1 and error == "the engine has failed: no memory left"
