# SPDX-License-Identifier: Apache-2.0
"""Non-finite logits end their request with an error; concurrent and later requests are unaffected.

One token has a non-finite embedding, so that only sequences that contain it fail.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from executor import LLM, RequestOutput, SamplingParams
from executor.bench import measure, throughput
from executor.bench.report import Report
from executor.engine.graph_runner import GraphRunner
from ops.reference import ReferenceOps
from ops.step import BLOCK_SIZE
from tests.checkpoints import TINY, make_model
from tests.engine.engines import SMALL, reset
from tests.parallel.ranks import run_ranks, settings_of

DAMAGED = 7
VALUES = [float("nan"), float("inf"), -float("inf")]
SAMPLINGS = {  # draws of this seed are never the token DAMAGED, which is among the first of the vocabulary
    "greedy": {},
    "all logits": {"temperature": 1.5, "seed": 45},
    "top_k": {"temperature": 1.5, "seed": 45, "top_k": 20, "top_p": 0.9},
    "penalty": {"repetition_penalty": 1.3},
}
DAMAGE = "the checkpoint's weights are probably damaged or do not fit its config.json"


def sound_prompt(num_tokens: int, damaged: int = DAMAGED) -> list[int]:
    return random.choices([i for i in range(TINY["vocab_size"]) if i != damaged], k=num_tokens)


def damaged_prompt(num_tokens: int) -> list[int]:
    prompt = sound_prompt(num_tokens)
    prompt[random.randrange(num_tokens)] = DAMAGED
    return prompt


def save(folder: Path, change: Callable[[Any], Any] | None = None, **config: Any) -> Path:
    """Saves a model modified by `change`; token DAMAGED is never generated while all logits are finite."""
    model = make_model(**{**SMALL, **config})
    with torch.no_grad():
        model.lm_head.weight[DAMAGED] = 0
        for layer in model.model.layers:  # peaked attention: every cached token matters
            layer.self_attn.q_norm.weight *= 4
        if change is not None:
            change(model)
    model.save_pretrained(folder)
    return folder


def embed(token_id: int, value: float) -> Callable[[Any], Any]:
    """Returns a `change` that sets a token's embedding."""
    return lambda model: model.model.embed_tokens.weight[token_id].fill_(value)


@pytest.fixture(scope="module", params=VALUES, ids=str)
def damaged(request, tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("damaged"), embed(DAMAGED, request.param))


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("sound"))


def build(folder: Path, runs_ahead: bool = False, **settings: Any) -> LLM:
    llm = LLM(folder, device="cpu", **{"dtype": "float32", **settings})
    llm.engine.runs_ahead = runs_ahead
    return llm


def ends(outputs: list[RequestOutput]) -> list[tuple[list[int], str]]:
    return [(output.token_ids, output.finish_reason) for output in outputs]


def assert_failed(output: RequestOutput, num_tokens: int, cause: str = DAMAGE) -> None:
    assert output.finish_reason == "error" and len(output.token_ids) == num_tokens
    assert output.error == f"the logits of new token {num_tokens + 1} are not finite (NaN or infinity): {cause}"
    assert (output.ttft_ms is None) == (num_tokens == 0) and (output.tpot_ms is None) == (num_tokens < 2)


def assert_sound_cache(llm: LLM) -> None:
    """Asserts that the cache has no non-finite values left, and that nothing uses it."""
    llm.generate([[1, 2]], SamplingParams(max_new_tokens=2))
    assert all(cache.isfinite().all() for caches in llm.kv_caches for cache in caches)
    assert not any(any(scheduler.pool.references) for scheduler in llm.engine.schedulers)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_others_get_the_tokens_they_get_alone(sampling, damaged):
    """In the same prefill, and waiting for the failed sequence's slot and blocks."""
    params = SamplingParams(max_new_tokens=6, ignore_eos=True, **SAMPLINGS[sampling])
    prompts = [sound_prompt(length) for length in (130, 5, 126, 3)]
    llm = build(damaged, batch_size=3, cache_tokens=6 * BLOCK_SIZE)
    alone = [llm.generate([prompt], params)[0] for prompt in prompts]
    assert all(output.error is None and output.finish_reason == "length" for output in alone)
    place = random.randrange(3)
    prompts.insert(place, damaged_prompt(random.choice((1, 20, 128, 200))))
    prompts.insert(4, damaged_prompt(9))
    for runs_ahead in (False, True):
        llm.engine.runs_ahead = runs_ahead
        outputs = llm.generate(prompts, params)
        for index in (4, place):
            assert_failed(outputs.pop(index), 0)
        assert ends(outputs) == ends(alone)
    assert_sound_cache(llm)


def test_all_prompts_fail(damaged):
    llm = build(damaged, runs_ahead=True, batch_size=2)
    for output in llm.generate([damaged_prompt(n) for n in (1, 5, 130, 7, 2)], SamplingParams(max_new_tokens=3)):
        assert_failed(output, 0)
    assert_sound_cache(llm)


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_failed_prompt_shares_nothing(runs_ahead, damaged):
    """Not even the sound prefix that it has found; others that share it, in chunks beside it, are not affected."""
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    llm = build(damaged, batch_size=4, cache_tokens=16 * BLOCK_SIZE)
    prefix = sound_prompt(300)
    failing, others = [*prefix, DAMAGED], [[*prefix, 1], [*prefix, 2], sound_prompt(150)]
    alone = [output for other in others for output in reset(llm, prefix_cache=False).generate([other], params)]
    for settings in ({}, {"max_step_tokens": 90, "chunk_tokens": 40}):
        reset(llm, runs_ahead=runs_ahead, **settings)
        assert_failed(llm.generate([failing], params)[0], 0)
        [first] = llm.generate([prefix], params)
        assert first.error is None and first.num_cached_tokens == 0
        outputs = llm.generate([others[0], failing, *others[1:]], params)
        assert [output.num_cached_tokens for output in outputs] == [300, 300, 300, 0]
        assert_failed(outputs.pop(1), 0)
        assert ends(outputs) == ends(alone)
        again = llm.generate(others, params)
        assert again[0].num_cached_tokens == 0 and ends(again) == ends(alone)
        assert_sound_cache(llm)


@pytest.fixture(scope="module")
def text(sound) -> tuple[list[int], list[int], int]:
    """A prompt, its generated tokens, and the index of one that occurs there for the first time."""
    llm = build(sound)
    for _ in range(50):
        prompt = sound_prompt(126)
        [output] = llm.generate([prompt], SamplingParams(max_new_tokens=9, ignore_eos=True))
        place = next((i for i in (3, 4, 5) if output.token_ids[i] not in [1, 2, *prompt, *output.token_ids[:i]]), None)
        if place is not None:
            return prompt, output.token_ids, place
    raise AssertionError("no prompt is followed by a new token")


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_tokens_before_the_failure_are_kept(runs_ahead, text, tmp_path):
    """A generated token is the damaged one: the length limit is before, at, or after the failure."""
    prompt, token_ids, place = text
    llm = build(save(tmp_path, embed(token_ids[place], float("nan"))), runs_ahead, batch_size=2)
    company = sound_prompt(40, token_ids[place])
    for later in range(4):
        params = SamplingParams(max_new_tokens=place + 1 + later, ignore_eos=True)
        [alone] = llm.generate([company], params)
        first, second = llm.generate([prompt, company], params)
        assert first.token_ids == token_ids[: place + 1]
        if later:
            assert_failed(first, place + 1)
        else:
            assert first.finish_reason == "length" and first.error is None
        assert ends([second]) == ends([alone])
    assert_sound_cache(llm)


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_step_after_eos_leaves_a_finite_cache(runs_ahead, text, tmp_path):
    """The EOS token is damaged: only a step launched before it was read computes with it."""
    prompt, token_ids, place = text
    eos = token_ids[place]
    llm = build(save(tmp_path, embed(eos, float("nan"))), runs_ahead, cache_tokens=2 * BLOCK_SIZE)
    llm.tokenizer.eos_token_ids = {eos}
    other = sound_prompt(127, eos)  # uses the same second block, but gets to the damaged place last
    params = SamplingParams(max_new_tokens=9)
    [before] = llm.generate([other], params)
    for prompts in ([prompt, other], [prompt], [other]):  # in the same run, and in the next
        for asked, output in zip(prompts, llm.generate(prompts, params), strict=True):
            assert output.error is None
            assert output.token_ids == (token_ids[: place + 1] if asked is prompt else before.token_ids)
    assert_sound_cache(llm)


def interrupt(*arguments: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_an_abandoned_run_poisons_nothing(runs_ahead, text, tmp_path, monkeypatch):
    prompt, token_ids, place = text
    llm = build(save(tmp_path, embed(token_ids[place], float("nan"))), runs_ahead, batch_size=2)
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (place + 1, 9)]
    stream = llm.stream([prompt, prompt], params)
    while next(stream).finish_reason is None:
        pass
    if not runs_ahead:  # else the step is in flight that the other one fails in
        assert next(stream).token_ids == [token_ids[place]]
        monkeypatch.setattr(llm.engine.sampler, "sample", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        monkeypatch.undo()
    assert runs_ahead == bool(llm.engine.in_flight)
    assert not llm.kv_caches[0][0].isfinite().all()  # which nobody has read
    stream.close()
    assert_sound_cache(llm)
    assert ends(llm.generate([prompt], params[0])) == [(token_ids[: place + 1], "length")]


# Logits


def test_one_non_finite_logit_is_enough(tmp_path):
    llm = build(save(tmp_path, lambda model: model.lm_head.weight[DAMAGED].fill_(float("nan"))), batch_size=2)
    for sampling in SAMPLINGS.values():
        for output in llm.generate([[1, 2], [3]], SamplingParams(max_new_tokens=3, **sampling)):
            assert_failed(output, 0)


@pytest.mark.parametrize("length", [1, 300])
def test_logits_name_the_first_position(length, damaged):
    llm = build(damaged)
    prompt = sound_prompt(length)
    expected = llm.logits(prompt)
    for place in {0, random.randrange(length), length - 1}:
        changed = [*prompt[:place], DAMAGED, *prompt[place + 1 :]]
        with pytest.raises(ValueError, match=rf"^the logits of position {place} are not finite .*damaged"):
            llm.logits(changed)
    assert torch.equal(llm.logits(prompt), expected)
    assert_sound_cache(llm)


def test_overflow_in_float16(tmp_path):
    """The same weights work in bfloat16 and float32."""
    save(tmp_path, lambda model: model.model.layers[1].self_attn.v_proj.weight.mul_(1e5))
    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    for dtype in ("float32", "bfloat16"):
        [output] = build(tmp_path, dtype=dtype).generate([[1, 2]], params)
        assert output.error is None and len(output.token_ids) == 3
    llm = build(tmp_path, dtype="float16")
    [output] = llm.generate([[1, 2]], params)
    cause = "a number was probably too large for dtype float16; try bfloat16, which has the range of float32"
    assert_failed(output, 0, cause)
    with pytest.raises(ValueError, match="^the logits of position 0 .*float16; try bfloat16"):
        llm.logits([1, 2])


def test_intermediate_infinity_is_no_error(tmp_path):
    """The square of a large number is infinite, RMSNorm divides by it."""
    llm = build(save(tmp_path, embed(DAMAGED, 1e25)))
    [output] = llm.generate([[1, DAMAGED]], SamplingParams(max_new_tokens=3, ignore_eos=True))
    assert output.error is None and len(output.token_ids) == 3


@pytest.mark.parametrize(
    "run",
    [
        lambda llm: measure.generate(llm, [[1, 2], [3]], 2),
        lambda llm: throughput.measure(llm, 2, 2, 3, 2),
    ],
    ids=["latency", "throughput"],
)
def test_a_failed_prompt_is_not_measured(run, tmp_path):
    llm = build(save(tmp_path, lambda model: model.model.norm.weight.fill_(float("nan"))), batch_size=2)
    with pytest.raises(RuntimeError, match="^2 of 2 measured prompts failed: the logits of new token 1 are not finite"):
        run(llm)


@pytest.mark.parametrize("value", VALUES)
def test_report_rejects_non_finite_numbers(value, tmp_path):
    with Report(tmp_path / "report.json", 1, lambda report: "table") as report:
        report.begin()
        with pytest.raises(RuntimeError, match="not a finite number"):
            report.add([{"tpot_ms": value}])
    assert not (tmp_path / "report.json").exists()


# Other runners and layouts


class Rerun:
    """Substitute for a graph recorder on the CPU: a replay reruns the step into the same tensor."""

    def warm_up(self, work: Callable[[], Any]) -> None:
        work()

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[list[int]], Any]]:
        logits = work()
        return logits, lambda seq_lens: logits.local.copy_(work().local)


def test_padding_rows_do_not_corrupt_the_cache(text, tmp_path, monkeypatch):
    """They repeat the first sequence, which fails, and write to the reserved padding block."""
    prompt, token_ids, place = text
    ops = ReferenceOps(grouped_mm=True)
    ops.graph_recorder = Rerun
    monkeypatch.setattr("executor.loading.assembly.load_ops", lambda device_type: ops)
    monkeypatch.setattr("executor.engine.graph_runner.UNPADDED", 0)
    settings = {"exe_mode": "graph", "batch_size": 4, "input_max_len": 300, "max_new_tokens": 20}
    llm = build(save(tmp_path, embed(token_ids[place], float("nan"))), runs_ahead=True, **settings)
    assert isinstance(llm.runner, GraphRunner) and set(llm.runner.graphs) == {1, 2, 4}
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    others = [sound_prompt(length, token_ids[place]) for length in (5, 200)]
    alone = [llm.generate([other], params)[0] for other in others]
    first, *rest = llm.generate([prompt, *others], params)
    assert_failed(first, place + 1)
    assert ends(rest) == ends(alone)
    assert_sound_cache(llm)


LAYOUTS = [(2, 2, 2, 2), (1, 1, 2, 2), (2, 1, 1, 2), (1, 1, 1, 1)]  # attn_tp, moe_tp, embed_tp, lmhead_tp
SPLIT = {"vocab_size": 208, "num_attention_heads": 4}


def results_of(folders: list[str], prompts: list[list[int]], all_settings: list[dict[str, Any]]) -> list[Any]:
    """Outputs for each layout, of both models; all prompts fail with the second."""
    results = []
    for settings in all_settings:
        llm, no_logits = (build(folder, True, batch_size=3, cache_tokens=2048, **settings) for folder in folders)
        found = []
        for sampling in ("greedy", "top_k", "all logits"):
            params = SamplingParams(max_new_tokens=5, ignore_eos=True, **SAMPLINGS[sampling])
            for one in (llm, llm, no_logits):
                found += [(output.token_ids, output.error) for output in one.generate(prompts, params)]
        with pytest.raises(ValueError, match="position 1 .*damaged"):
            llm.logits([1, DAMAGED, 2])
        results.append(found)
    return results


def test_two_ranks(tmp_path):
    """The verdict is the same on all ranks, whichever of them the damaged weights are on."""
    folders = [str(tmp_path / name) for name in ("embedding", "logit")]
    save(folders[0], embed(DAMAGED, float("inf")), **SPLIT)
    save(folders[1], lambda model: model.lm_head.weight[200].fill_(float("nan")), **SPLIT)
    prompts = [[token_id % 208 for token_id in sound_prompt(n)] for n in (5, 130, 3, 17)]
    prompts = [prompts[0], [1, DAMAGED, 2], *prompts[1:], [DAMAGED]]
    [expected] = results_of(folders, prompts, [{}])
    for part, failed in ((expected[:6], {1, 5}), (expected[12:18], set(range(6)))):
        assert {index for index, (_, error) in enumerate(part) if error} == failed
    all_settings = [settings_of(layout, world_size=2) for layout in LAYOUTS]
    for rank in run_ranks(2, results_of, tmp_path, folders, prompts, all_settings):
        for layout, found in zip(LAYOUTS, rank, strict=True):
            assert found == expected, layout
