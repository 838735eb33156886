# SPDX-License-Identifier: Apache-2.0
"""Continuous batching on one rank: throughput of arriving requests, chunked prefill beside decode, prefix cache hits.

throughput: requests that arrive --interval-ms apart, against the same number all at once. pauses: inter-token latency
of decoding requests before and while a long prompt is prefilled. prefix: time to first token of a prompt and of a
second one with the same prefix; and how many tokens differ with and without cached prefixes, whose steps have other
shapes.
"""

import argparse
import time
import zlib
from dataclasses import replace
from typing import Any

import torch

from executor.bench.common import (
    build_llm,
    command_parser,
    describe_device,
    known,
    random_prompts,
    settings_of,
)
from executor.bench.report import Report
from executor.engine.request import Request
from executor.llm import LLM
from executor.sampling_params import SamplingParams
from executor.utils.arguments import positive
from executor.utils.report import percentiles, table

DECODING = 8  # requests that a long prompt joins
WARM_UP_TOKENS = 4
COMPARED_TOKENS = 16  # of outputs with and without a cached prefix


def run(command_line: list[str]) -> None:
    """Measures throughput, pauses and prefix, prints the table and writes the report."""
    arguments = parse(command_line)
    settings = settings_of(arguments)
    if settings.world_size > 1:
        raise ValueError("world_size: arrivals are measured on one rank")
    sizes = [(arguments.prompt_tokens, arguments.new_tokens)]
    with Report(arguments.output, 2 + len(arguments.requests), result_table) as report:
        llm = build_llm(settings, sizes, max(arguments.requests), arguments.allow_fallback, prefix_cache=True)
        for prompt_tokens in (arguments.long_prompt_tokens, arguments.prefix_tokens + arguments.tail_tokens):
            requests(llm, 1, prompt_tokens, COMPARED_TOKENS, "check")  # refuses too long ones before any measurement
        report.begin(**describe_device(llm))
        for count in arguments.requests:
            report.add([throughput(llm, count, arguments)])
        pauses(llm, arguments, "warm-up")
        report.add([pauses(llm, arguments, "measured")])
        report.add([prefix(llm, arguments)])


def parse(command_line: list[str]) -> argparse.Namespace:
    parser = command_parser("arrivals", __doc__)
    parser.add_argument("--requests", type=positive, nargs="+", default=[32, 64])
    parser.add_argument("--prompt-tokens", type=positive, default=512)
    parser.add_argument("--new-tokens", type=positive, default=128)
    parser.add_argument("--interval-ms", type=positive, default=5)
    parser.add_argument("--long-prompt-tokens", type=positive, default=32768)
    parser.add_argument("--prefix-tokens", type=positive, default=4080)
    parser.add_argument("--tail-tokens", type=positive, default=8, help="of a prompt after the common prefix")
    arguments = parser.parse_args(command_line)
    if arguments.new_tokens < 8:
        raise ValueError("--new-tokens: at least 8 are needed to measure pauses")
    return arguments


def throughput(llm: LLM, count: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of requests that arrive over time, and of as many all at once."""
    new_tokens, interval_s = arguments.new_tokens, arguments.interval_ms / 1e3
    found: dict[str, float] = {}
    for name, apart_s, tokens in (("warm-up", 0.0, WARM_UP_TOKENS), ("at once", 0.0, new_tokens)):
        found[name] = run_arrivals(llm, requests(llm, count, arguments.prompt_tokens, tokens, name), apart_s)
    found["over time"] = run_arrivals(
        llm, requests(llm, count, arguments.prompt_tokens, new_tokens, "over time"), interval_s
    )
    speeds = {name: count * new_tokens / found[name] for name in ("at once", "over time")}
    return {
        "measured": "throughput",
        "requests": count,
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": new_tokens,
        "interval_ms": arguments.interval_ms,
        "tok_per_s_at_once": round(speeds["at once"], 1),
        "tok_per_s_over_time": round(speeds["over time"], 1),
        "ratio": round(speeds["over time"] / speeds["at once"], 3),
    }


def pauses(llm: LLM, arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Inter-token latency of DECODING requests, alone and beside the prefill of a long prompt. name: seeds prompts."""
    quarter = max(2, arguments.new_tokens // 4)
    decoding = requests(llm, DECODING, arguments.prompt_tokens, arguments.new_tokens, f"decoding {name}")
    [late] = requests(llm, 1, arguments.long_prompt_tokens, 2, f"long {name}")
    add(llm, decoding)
    generated = decoding[0].samples[0].token_ids
    with torch.inference_mode():
        while len(generated) < quarter and llm.engine.has_work:
            llm.engine.step()
        came_s = time.perf_counter()
        add(llm, [late])
        while llm.engine.has_work:
            llm.engine.step()
    first_s = late.samples[0].token_times_s[0]
    alone, beside = [], []
    for request in decoding:
        times = request.samples[0].token_times_s
        for before, after in zip(times, times[1:], strict=False):
            if after < came_s:
                alone.append((after - before) * 1e3)
            elif before < first_s:
                beside.append((after - before) * 1e3)
    chunks = -(-arguments.long_prompt_tokens // llm.settings.engine_config.chunk_tokens)
    return {
        "measured": "pauses",
        "decoding": DECODING,
        "long_prompt_tokens": arguments.long_prompt_tokens,
        "chunk_tokens": llm.settings.engine_config.chunk_tokens,
        "interval_ms_alone": percentiles(alone),
        "interval_ms_beside": percentiles(beside) | {"max": round(max(beside), 3)},
        "tokens_of_each_while_it_was_computed": len(beside) // DECODING,
        "chunks": chunks,
        "long_ttft_ms": round((first_s - came_s) * 1e3, 2),
    }


def prefix(llm: LLM, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time to first token without and with a cached prefix, and the tokens that differ between the two."""
    common, *_ = random_prompts(llm, 3, arguments.prefix_tokens)
    tails = random_prompts(llm, 4, arguments.tail_tokens)
    sampling = SamplingParams(max_new_tokens=2, ignore_eos=True)
    warm_up = random_prompts(llm, 2, arguments.prefix_tokens + arguments.tail_tokens)
    for prompt in (*warm_up, warm_up[0][: arguments.prefix_tokens] + tails[3]):
        llm.generate([prompt], sampling)
    first, second = (llm.generate([common + tail], sampling)[0] for tail in tails[:2])
    first_ms, second_ms = known(first.ttft_ms), known(second.ttft_ms)
    prompts = [common + tail for tail in tails]
    longer = SamplingParams(max_new_tokens=COMPARED_TOKENS, ignore_eos=True)
    hits = llm.generate(prompts, longer, use_tqdm=False)
    fresh = llm.generate(prompts, replace(longer, prompt_logprobs=0), use_tqdm=False)  # takes nothing from the cache
    pairs = [
        pair for one, two in zip(hits, fresh, strict=True) for pair in zip(one.token_ids, two.token_ids, strict=True)
    ]
    return {
        "measured": "prefix",
        "prefix_tokens": arguments.prefix_tokens,
        "prompt_tokens": arguments.prefix_tokens + arguments.tail_tokens,
        "cached_tokens": second.num_cached_tokens,
        "first_ttft_ms": round(first_ms, 3),
        "second_ttft_ms": round(second_ms, 3),
        "ratio": round(second_ms / first_ms, 3),
        "compared_tokens": len(pairs),
        "differing_tokens": sum(one != two for one, two in pairs),
    }


def requests(llm: LLM, count: int, prompt_tokens: int, new_tokens: int, name: str) -> list[Request]:
    """Requests with random prompts, different for each name, so that none hits the prefix cache."""
    seed = zlib.crc32(f"{name} {count} {prompt_tokens} {new_tokens}".encode())
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(0, llm.config.vocab_size, (count, prompt_tokens), generator=generator).tolist()
    sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    return llm.requests([("", prompt) for prompt in prompts], sampling)


def add(llm: LLM, added: list[Request]) -> None:
    for request in added:
        llm.engine.add(request.samples)


@torch.inference_mode()
def run_arrivals(llm: LLM, waiting: list[Request], apart_s: float) -> float:
    """Seconds from the first request's arrival to the last token; requests arrive `apart_s` apart."""
    count, added, started_s = len(waiting), 0, time.perf_counter()
    while added < count or llm.engine.has_work:
        due = count if not apart_s else min(count, 1 + int((time.perf_counter() - started_s) / apart_s))
        add(llm, waiting[added:due])
        added = due
        llm.engine.step()
    return time.perf_counter() - started_s


def result_table(report: Report) -> str:
    """One line for each figure."""
    rows: list[list[Any]] = []
    for row in report.results:
        if row["measured"] == "throughput":
            name = f"{row['requests']} requests, {row['interval_ms']} ms apart"
            rows.append([name, "tokens/s at once", row["tok_per_s_at_once"]])
            rows.append([name, "tokens/s over time", row["tok_per_s_over_time"]])
            rows.append([name, "ratio", row["ratio"]])
        elif row["measured"] == "pauses":
            name = f"{row['decoding']} decoding, a prompt of {row['long_prompt_tokens']} joins"
            rows.append([name, "ms per token before, p50", row["interval_ms_alone"]["p50"]])
            rows.append([name, "ms per token beside it, p50", row["interval_ms_beside"]["p50"]])
            rows.append([name, "longest pause in ms", row["interval_ms_beside"]["max"]])
            rows.append([name, "its ttft in ms", row["long_ttft_ms"]])
        else:
            name = f"{row['prompt_tokens']} tokens, {row['cached_tokens']} cached"
            rows.append([name, "ttft ms of the first", row["first_ttft_ms"]])
            rows.append([name, "ttft ms of the second", row["second_ttft_ms"]])
            rows.append([name, "ratio", row["ratio"]])
            rows.append([name, f"of {row['compared_tokens']} tokens differ", row["differing_tokens"]])
    return table(["", "figure", "value"], rows)
