# SPDX-License-Identifier: Apache-2.0
"""Offline throughput: output tokens per second at each batch size, for short and long prompts.

A scenario IN:OUT is the number of prompt tokens and new tokens. The batch size is the number of concurrent sequences;
when one finishes, the next one starts. seconds is the wall time of the whole run, prefills included. In graph mode a
batch size above 8 without its own graph is padded to the next. Starts the ranks if world_size > 1; rank 0 reports.
"""

import argparse
import re
import time
from typing import TYPE_CHECKING, Any

from executor.bench.common import (
    build_llm,
    check_finished,
    command_parser,
    describe_device,
    known,
    random_prompts,
    settings_of,
    start_ranks,
)
from executor.bench.report import Report
from executor.sampling_params import SamplingParams
from executor.utils.arguments import positive
from executor.utils.report import table

if TYPE_CHECKING:
    from executor.config import Settings
    from executor.llm import LLM

WARM_UP_TOKENS = 4


def run(command_line: list[str]) -> None:
    """Measures every scenario at every batch size, prints the table and writes the report."""
    arguments = parse(command_line)
    settings = settings_of(arguments)
    check_rounds(settings, arguments)
    start_ranks(settings)
    measurements = len(arguments.scenario) * len(arguments.batch_size)
    with Report(arguments.output, measurements, result_table) as report:
        llm = build_llm(settings, arguments.scenario, max(arguments.batch_size), arguments.allow_fallback)
        report.begin(**describe_device(llm))
        for sizes in arguments.scenario:
            for batch_size in arguments.batch_size:
                report.add([measure(llm, batch_size, arguments.rounds * batch_size, *sizes)])


def parse(command_line: list[str]) -> argparse.Namespace:
    parser = command_parser("throughput", __doc__)
    parser.add_argument("--scenario", type=scenario, nargs="+", default=[(1, 1024), (3500, 1500)], metavar="IN:OUT")
    parser.add_argument("--batch-size", type=positive, nargs="+", default=[1, 2, 4, 6, 8, 16])
    parser.add_argument("--rounds", type=positive, default=1, help="prompts per sequence of the batch")
    return parser.parse_args(command_line)


def scenario(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or int(match[1]) < 1 or int(match[2]) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not IN:OUT, at least 1:2, such as 1:1024")
    return int(match[1]), int(match[2])


def check_rounds(settings: "Settings", arguments: argparse.Namespace) -> None:
    """Raises ValueError for several rounds of a batch that cannot be split evenly over the attention DP groups."""
    groups = max(1, settings.world_size // settings.parallel_config.attn_tp_size)
    uneven = [size for size in arguments.batch_size if size % groups]
    if uneven and arguments.rounds > 1:
        raise ValueError(
            f"--batch-size: {uneven[0]} is not a multiple of the {groups} groups of attention ranks, as required with "
            "--rounds above 1"
        )


def measure(llm: "LLM", batch_size: int, num_prompts: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """Measures one scenario at one batch size, after a warm-up of a few tokens; returns a result row."""
    limit_batch(llm, batch_size)
    prompts = random_prompts(llm, num_prompts, prompt_tokens)
    warm_up = SamplingParams(max_new_tokens=min(WARM_UP_TOKENS, new_tokens), ignore_eos=True)
    llm.generate(prompts[:batch_size], warm_up, use_tqdm=False)
    start_s = time.perf_counter()
    outputs = llm.generate(prompts, SamplingParams(max_new_tokens=new_tokens, ignore_eos=True), use_tqdm=False)
    seconds = time.perf_counter() - start_s
    check_finished(outputs)
    tok_per_s = num_prompts * new_tokens / seconds
    return {
        "exe_mode": llm.settings.exe_mode,
        "dtype": llm.settings.model_config.dtype,
        "world_size": llm.settings.world_size,
        "batch_size": batch_size,
        "prompts": num_prompts,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "seconds": round(seconds, 4),
        "tok_per_s": round(tok_per_s, 2),
        "tok_per_s_per_sequence": round(tok_per_s / batch_size, 2),
        "ttft_ms": {"mean": round(sum(known(output.ttft_ms) for output in outputs) / num_prompts, 3)},
        "tpot_ms": {"mean": round(sum(known(output.tpot_ms) for output in outputs) / num_prompts, 4)},
    }


def limit_batch(llm: "LLM", batch_size: int) -> None:
    """Sets the batch size of the loaded model, split over the attention DP groups."""
    schedulers = llm.engine.schedulers
    for scheduler in schedulers:
        scheduler.max_sequences = -(-batch_size // len(schedulers))


def result_table(report: Report) -> str:
    header = ["batch", "prompts", "in", "out", "seconds", "tokens/s", "tokens/s/seq", "ttft ms", "tpot ms"]
    keys = ("batch_size", "prompts", "prompt_tokens", "new_tokens", "seconds", "tok_per_s", "tok_per_s_per_sequence")
    rows = [[*(row[key] for key in keys), row["ttft_ms"]["mean"], row["tpot_ms"]["mean"]] for row in report.results]
    return table(header, rows)
