# SPDX-License-Identifier: Apache-2.0
"""Inference on one rank: `python -m executor.infer --yaml_file_path X [--set section.key=value] [--output FILE]`."""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

from executor.config import Settings, load_settings, resolve_path
from executor.launch.command import run_command
from executor.launch.interrupts import interrupts_deferred
from executor.launch.rank import PartialFailure, fail, set_up_rank
from executor.launch.results import Results, create_run_folder, run_name
from executor.utils.arguments import ArgumentParser
from executor.utils.data_utils import load_prompts, source_files
from executor.utils.files import check_output, files_in
from executor.utils.logging_utils import adopt_transformers_logging, setup_logging
from executor.utils.text import printable


def main() -> int:
    return run_command(lambda: run_rank(parse_arguments()))


def run_rank(arguments: argparse.Namespace) -> int:
    rank = set_up_rank()
    yaml_file = Path(arguments.yaml_file_path)
    settings = load_settings(yaml_file, arguments.set)
    prompts = load_prompts(settings.data_config)
    output = None if arguments.output is None else Path(arguments.output)
    if output and rank == 0:
        check_output("--output", output, input_files(settings, yaml_file))
    folder = create_run_folder(settings, yaml_file, run_name())
    try:
        setup_logging(settings.log_level, rank, folder.path / f"log_{rank}.log")
        from executor.llm import LLM  # torch and transformers take seconds to import: only after the input checks

        adopt_transformers_logging()
        llm = LLM.from_settings(settings, prompts)
        requests = llm.requests(llm.known_prompts)
    except ValueError:
        folder.discard()
        raise
    try:
        if settings.model_config.enable_profiler:
            profile_first(llm, requests, folder.path / f"trace_{rank}.json")
        if rank == 0:
            folder.link_latest()
            run(llm, requests, Results([folder.path / "result.jsonl", *([output] if output else [])]))
        else:
            for _ in llm.finished(requests):
                pass
    except ValueError as error:
        return fail(1, error)  # the input is valid at this point
    return 0


def input_files(settings: Settings, yaml_file: Path) -> list[Path]:
    """Input files of a run, which must not be its output."""
    return [yaml_file, *source_files(settings.data_config), *files_in(resolve_path(settings.model_path))]


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m executor.infer", description=__doc__)
    parser.add_argument("--yaml_file_path", required=True, help="settings; docs/configuration.md lists the keys")
    parser.add_argument(
        "--set", action="append", default=[], metavar="section.key=value", help="overrides one setting; repeatable"
    )
    parser.add_argument("--output", metavar="FILE", help="also write the results there")
    return parser.parse_args()


def profile_first(llm: Any, requests: list[Any], file: Path) -> None:
    """Profiles the first batch; rank 0 prints the kernel times."""
    from executor.bench.profiling import profile

    first = requests[: llm.settings.data_config.batch_size]
    kernels = profile(llm, [request.prompt_token_ids for request in first], file)
    if llm.parallel.world.index == 0:
        print(f"{kernels}\n\ntrace: {file}")


def run(llm: Any, requests: list[Any], results: Results) -> None:
    """Generates all completions; writes and prints each when it finishes, then the summary.

    Raises PartialFailure if a prompt failed or a result file could not be written completely.
    """
    from tqdm import tqdm

    unwritten = {request.index: request for request in requests}
    outputs: list[Any] = []
    count, start_s = len(requests), time.perf_counter()

    def keep(index: int, output: Any) -> None:
        with interrupts_deferred():  # so that either all files get the line or none
            results.write(line_of(index, output))
            del unwritten[index]

    try:
        with tqdm(total=count, desc="prompts", disable=count == 1) as progress:
            for index, output in llm.finished(requests):
                keep(index, output)
                outputs.append(output)
                progress.update()
                tqdm.write(f"\n--- prompt {index + 1} of {count}\n{printable(shortened(output.prompt))}")
                tqdm.write(f"--- text ({output.finish_reason})\n{printable(output.error or output.text)}")
        summary = summarize(llm, outputs, time.perf_counter() - start_s)
        results.write({"summary": summary})
    finally:
        for request in [request for request in unwritten.values() if request.is_complete and results.files]:
            keep(request.index, llm.output(request))  # finished in the step that was interrupted
        written = count - len(unwritten)
        paths = ", ".join(map(str, results.close()))
        if written < count:
            print(f"\n{written} of {count} results: {paths if written else 'none'}", file=sys.stderr)
    print(f"\n{latency_table(summary)}\n\nresults: {paths}")
    if results.failures:
        raise PartialFailure("; ".join(results.failures))
    if summary["failed"]:
        raise PartialFailure(f'{summary["failed"]} of {count} prompts failed: their lines have an "error"')


def line_of(index: int, output: Any) -> dict[str, Any]:
    """JSON object of a finished prompt; it has `error` only if it failed, `outputs` only for several samples."""
    keys = ("prompt", "text", "prompt_token_ids", "token_ids", "finish_reason", "ttft_ms", "tpot_ms")
    line = {"index": index} | {key: getattr(output, key) for key in keys}
    line |= {"error": output.error} if output.error else {}
    return line | ({"outputs": list(map(dataclasses.asdict, output.outputs))} if len(output.outputs) > 1 else {})


def shortened(text: str, limit: int = 600) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]}\n[...]\n{text[-limit // 2 :]}"


def summarize(llm: Any, outputs: list[Any], wall_s: float) -> dict[str, Any]:
    """Latency percentiles over all prompts, throughput, and the settings in force."""
    from executor.loading.device import device_name
    from executor.utils.report import commit, percentiles, versions

    new_tokens = sum(len(output.token_ids) for output in outputs)
    return {
        "prompts": len(outputs),
        "failed": sum(output.error is not None for output in outputs),
        "prompt_tokens": sum(len(output.prompt_token_ids) for output in outputs),
        "cached_prompt_tokens": sum(output.num_cached_tokens for output in outputs),
        "new_tokens": new_tokens,
        "ttft_ms": percentiles([output.ttft_ms for output in outputs if output.ttft_ms is not None]),
        "tpot_ms": percentiles([interval for output in outputs for interval in output.token_intervals_ms]),
        "tok_per_s": round(new_tokens / wall_s, 2),
        "device": device_name(llm.device),
        "formats": llm.parameters.formats(),
        "commit": commit(),
        "versions": versions(),
        "settings": dataclasses.asdict(llm.settings),
    }


def latency_table(summary: dict[str, Any]) -> str:
    from executor.utils.report import table

    ttft, tpot = summary["ttft_ms"], summary["tpot_ms"]
    columns = {
        "prompts": summary["prompts"],
        **({"failed": summary["failed"]} if summary["failed"] else {}),
        "prompt tokens": summary["prompt_tokens"],
        "new tokens": summary["new_tokens"],
        "ttft ms": ttft["p50"],
        "tpot p50 ms": tpot["p50"],
        "tpot p99 ms": tpot["p99"],
        "tokens/s": summary["tok_per_s"],
    }
    return table(list(columns), [list(columns.values())])


if __name__ == "__main__":
    sys.exit(main())
