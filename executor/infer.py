# SPDX-License-Identifier: Apache-2.0
"""One rank of a run: `python -m executor.infer --yaml_file_path X [--set section.key=value] [--output FILE]`."""

import argparse
import dataclasses
import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

from executor.config import REPOSITORY, Settings, load_settings
from executor.rank import fail, join
from executor.utils.data_utils import load_prompts
from executor.utils.files import check_output
from executor.utils.logging_utils import adopt_transformers_logging, setup_logging


def main() -> int:
    arguments = parse_arguments()
    try:
        rank = join()
        settings = load_settings(arguments.yaml_file_path, arguments.set)
        folder = result_folder(settings, Path(arguments.yaml_file_path))
        setup_logging(settings.log_level, rank, folder / f"log_{rank}.log")
        prompts = load_prompts(settings.data_config)
        results = [folder / "result.jsonl", *([Path(arguments.output)] if arguments.output else [])]
        for file in results if rank == 0 else []:
            check_output("--output", file)
        from executor.llm import LLM  # torch and transformers take seconds: only after the input is known to be good

        adopt_transformers_logging()
        llm = LLM.from_settings(settings)
        sequences = llm.requests([(prompt, encode(llm, prompt)) for prompt in prompts])
    except ValueError as error:
        return fail(2, error)
    except Exception as error:
        return fail(1, error)
    try:
        if settings.model_config.enable_profiler:
            profile_first(llm, sequences, folder / f"trace_{rank}.json")
        if rank == 0:
            run(llm, sequences, results)
        else:
            for _ in llm.stream(sequences):
                pass
    except Exception as error:
        return fail(1, error)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m executor.infer", description=__doc__)
    parser.add_argument("--yaml_file_path", required=True, help="settings; docs/configuration.md lists the keys")
    parser.add_argument(
        "--set", action="append", default=[], metavar="section.key=value", help="overrides one setting; repeatable"
    )
    parser.add_argument("--output", metavar="FILE", help="also write the results there")
    return parser.parse_args()


def result_folder(settings: Settings, yaml_file: Path) -> Path:
    """res/<yyyymmdd>/<model_name>_<yaml stem>/ in the repository."""
    return REPOSITORY / "res" / f"{datetime.date.today():%Y%m%d}" / f"{settings.model_name}_{yaml_file.stem}"


def encode(llm: Any, prompt: str) -> list[int]:
    """Tokens of a prompt, as a conversation if the settings say so."""
    if llm.settings.data_config.chat_template:
        return llm.tokenizer.encode_chat([{"role": "user", "content": prompt}])
    return llm.tokenizer.encode(prompt)


def profile_first(llm: Any, sequences: list[Any], file: Path) -> None:
    """Traces the first batch; rank 0 says where the time goes."""
    from executor.profiling import profile

    first = sequences[: llm.settings.data_config.batch_size]
    kernels = profile(llm, [sequence.prompt_token_ids for sequence in first], file)
    if llm.parallel.world.index == 0:
        print(f"{kernels}\n\ntrace: {file}")


def run(llm: Any, sequences: list[Any], results: list[Path]) -> None:
    """Generates all texts; prints and writes each as soon as those before it are finished, then the summary."""
    from tqdm import tqdm

    files = [file.open("w", encoding="utf-8") for file in results]
    outputs: dict[int, Any] = {}
    written, count = 0, len(sequences)
    start_s = time.perf_counter()
    try:
        for index, output in tqdm(llm.stream(sequences), total=count, desc="prompts", disable=count == 1):
            outputs[index] = output
            while written in outputs:
                write_line(files, line_of(outputs[written]))
                tqdm.write(f"\n--- prompt {written + 1} of {count}\n{shortened(outputs[written].prompt)}")
                tqdm.write(f"--- text ({outputs[written].finish_reason})\n{outputs[written].text}")
                written += 1
        summary = summarize(llm, list(outputs.values()), time.perf_counter() - start_s)
        write_line(files, {"summary": summary})
    finally:
        for file in files:
            file.close()
    print(f"\n{latency_table(summary)}\n\nresults: {', '.join(map(str, results))}")


def write_line(files: list[Any], record: dict[str, Any]) -> None:
    for file in files:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()


def line_of(output: Any) -> dict[str, Any]:
    keys = ("prompt", "text", "prompt_token_ids", "token_ids", "finish_reason", "ttft_ms", "tpot_ms")
    return {key: getattr(output, key) for key in keys}


def shortened(text: str, limit: int = 600) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]}\n[...]\n{text[-limit // 2 :]}"


def summarize(llm: Any, outputs: list[Any], wall_s: float) -> dict[str, Any]:
    """Latency percentiles over all prompts, throughput, and the settings in force."""
    from executor.device import device_name
    from executor.utils.report import commit, percentiles, versions

    new_tokens = sum(len(output.token_ids) for output in outputs)
    return {
        "prompts": len(outputs),
        "prompt_tokens": sum(len(output.prompt_token_ids) for output in outputs),
        "new_tokens": new_tokens,
        "ttft_ms": percentiles([output.ttft_ms for output in outputs]),
        "tpot_ms": percentiles([interval for output in outputs for interval in output.token_intervals_ms]),
        "tok_per_s": round(new_tokens / wall_s, 2),
        "device": device_name(llm.device),
        "commit": commit(),
        "versions": versions(),
        "settings": dataclasses.asdict(llm.settings),
    }


def latency_table(summary: dict[str, Any]) -> str:
    from executor.utils.report import table

    header = ["prompts", "prompt tokens", "new tokens", "ttft ms", "tpot p50 ms", "tpot p99 ms", "tokens/s"]
    ttft, tpot = summary["ttft_ms"], summary["tpot_ms"]
    counts = [summary["prompts"], summary["prompt_tokens"], summary["new_tokens"]]
    return table(header, [[*counts, ttft["p50"], tpot["p50"], tpot["p99"], summary["tok_per_s"]]])


if __name__ == "__main__":
    sys.exit(main())
