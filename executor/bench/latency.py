# SPDX-License-Identifier: Apache-2.0
"""Time to first token (ttft) and time per output token (tpot), with the floor set by memory bandwidth.

Starts the ranks if world_size > 1; rank 0 reports. Values are medians over repeats that alternate with the peer's, so
that a varying clock rate affects both. Times are in ms and meaningful only on an idle machine.
"""

import argparse
import gc
from typing import TYPE_CHECKING, Any

from executor.bench.common import (
    build_llm,
    command_parser,
    describe_device,
    random_prompts,
    settings_of,
    start_ranks,
)
from executor.bench.plot import check_matplotlib, draw, picture, rows_of
from executor.bench.report import Report
from executor.utils.arguments import positive
from executor.utils.files import check_output
from executor.utils.report import is_first_rank, table

if TYPE_CHECKING:
    from executor.llm import LLM


def run(command_line: list[str]) -> None:
    """Measures every combination, prints the tables and writes the report."""
    arguments = parse(command_line)
    if arguments.new_tokens < 2:
        raise ValueError("--new-tokens: at least 2 are needed for tpot")
    if arguments.plot:
        check_matplotlib()
    if arguments.plot and arguments.output and arguments.plot.resolve() == arguments.output.resolve():
        raise ValueError(f"--plot and --output: both are {arguments.plot}")
    modes = [f"exe_mode={mode}" for mode in arguments.exe_mode]
    settings = [settings_of(arguments, mode) for mode in modes] or [settings_of(arguments)]
    if arguments.peer and settings[0].world_size > 1:
        raise ValueError(f"--peer: {arguments.peer} runs on one rank, world_size is {settings[0].world_size}")
    start_ranks(settings[0])
    from executor.bench.measure import measure
    from executor.bench.timing import read_ceiling

    sizes = [(prompt_tokens, arguments.new_tokens) for prompt_tokens in arguments.prompt_tokens]
    measurements = len(settings) * len(arguments.batch_size) * len(arguments.prompt_tokens)
    if arguments.plot and is_first_rank():
        check_output("--plot", arguments.plot)
    with Report(arguments.output, measurements, tables) as report:
        for one_mode in settings:
            llm = build_llm(one_mode, sizes, max(arguments.batch_size), arguments.allow_fallback)
            if not report.content:
                start_s = start_to_first_token_s(llm, arguments)
                ceiling = read_ceiling(llm.device)
                report.begin(**describe_device(llm), start_to_first_token_s=start_s, read_ceiling=ceiling)
            peer = build_peer(llm, arguments.peer)
            for batch_size in arguments.batch_size:
                for prompt_tokens in arguments.prompt_tokens:
                    prompts = random_prompts(llm, batch_size, prompt_tokens)
                    report.add(measure(llm, peer, prompts, arguments, ceiling["gb_per_s"]))
            del llm, peer
            gc.collect()  # frees the memory for the next mode
    if arguments.plot and is_first_rank():
        draw(rows_of(report.content), arguments.plot, [report.content["model_name"], report.content["device"]])


def parse(command_line: list[str]) -> argparse.Namespace:
    parser = command_parser("latency", __doc__)
    parser.add_argument(
        "--exe-mode", nargs="+", default=[], choices=("eager", "graph"), help="one or both; default: the YAML's"
    )
    parser.add_argument("--prompt-tokens", type=positive, nargs="+", default=[512])
    parser.add_argument("--new-tokens", type=positive, default=64)
    parser.add_argument("--batch-size", type=positive, nargs="+", default=[1], help="prompts of distinct random tokens")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--peer", choices=["transformers"], help="also measure this system, on the same weights")
    parser.add_argument(
        "--plot", type=picture, metavar="FILE", help="draw tpot and floor there as PNG; needs matplotlib"
    )
    return parser.parse_args(command_line)


def start_to_first_token_s(llm: "LLM", arguments: argparse.Namespace) -> float:
    """Seconds from the start of this process to the first token of its first prompt."""
    from executor.bench.measure import generate
    from executor.bench.timing import process_age_s

    age_s = process_age_s()
    _, ttft_ms, _ = generate(llm, random_prompts(llm, 1, arguments.prompt_tokens[0]), 1)
    return round(age_s + ttft_ms / 1e3, 2)


def build_peer(llm: "LLM", name: str | None) -> Any:
    if name is None:
        return None
    from executor.bench.peers import TransformersPeer

    return TransformersPeer(llm)


def tables(report: Report) -> str:
    """Formats the tables of results, floors and, with several ranks, traffic."""
    results, ceiling = report.results, report.content["read_ceiling"]
    peak_gb = max(result.get("peak_memory_bytes", 0) for result in results) / 1e9
    parts = [result_table(results), floor_table(results)]
    if results[0]["world_size"] > 1:
        parts.append(traffic_table(results))
    parts.append(
        f"read ceiling {ceiling['gb_per_s']} GB/s ({ceiling['measured_by']}), process start to first token "
        f"{report.content['start_to_first_token_s']} s, peak memory {peak_gb:.2f} GB"
    )
    return "\n\n".join(parts)


def result_table(results: list[dict[str, Any]]) -> str:
    header = ["system", "mode", "dtype", "batch", "prompt", "new", "ttft ms", "tpot p50", "p90", "p99", "tokens/s"]
    header += ["ours/this ttft", "tpot"]
    rows = []
    for result in results:
        ratio = result.get("ours_over_this", {})
        keys = ("system", "exe_mode", "dtype", "batch_size", "prompt_tokens", "new_tokens")
        tpot = result["tpot_ms"]
        rows.append(
            [*(result[key] for key in keys), result["ttft_ms"]["p50"], tpot["p50"], tpot["p90"], tpot["p99"]]
            + [result["tok_per_s"], ratio.get("ttft"), ratio.get("tpot")]
        )
    return table(header, rows)


def floor_table(results: list[dict[str, Any]]) -> str:
    """Table of the bytes read by a decode step of rank 0, its floor, and the achieved bandwidth."""
    header = ["mode", "batch", "prompt", "experts/layer", "MB/step", "floor ms", "tpot p50", "GB/s", "of ceiling"]
    before = ("exe_mode", "batch_size", "prompt_tokens", "distinct_experts_per_layer")
    rows = []
    for result in results:
        if result["system"] == "ours":
            megabytes, tpot_ms = sum(result["read_bytes_per_step"].values()) / 1e6, result["tpot_ms"]["p50"]
            achieved = (result["achieved_gb_per_s"], result["fraction_of_ceiling"])
            rows.append([*(result[key] for key in before), megabytes, result["floor_ms"], tpot_ms, *achieved])
    return table(header, rows)


def traffic_table(results: list[dict[str, Any]]) -> str:
    keys = ("tokens_of_job", "tokens_of_rank", "sent_bytes_per_token", "formula_bytes_per_token")
    header = ["mode", "batch", "prefill exchange", "decode exchange", "tokens", "of rank 0", "sent B/token", "formula"]
    rows = [
        [result["exe_mode"], result["batch_size"], *result["exchanges"].values(), *(result[key] for key in keys)]
        for result in results
        if "exchanges" in result
    ]
    return table(header, rows)
