# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a checkpoint on a text, in windows of --window tokens that start every --stride tokens.

The text is tokenised whole, without chat template. A token counts once, in the first window that holds it, predicted
from the tokens before it there. The first token of a text is not predicted, nor, with --stride equal to --window, the
first of any window; with a smaller stride, those after the first window are predicted from at least window - stride
tokens. The last window ends with the text and may be shorter.

nats/token is the mean negative log-likelihood of the predicted tokens, perplexity e to its power, and bits/byte the
same mean in bits, times the tokens of the text, over the bytes of the file. seconds is the time of scoring, without
loading. Of data_config only batch_size applies, the number of windows that run at a time.
Starts the ranks if world_size > 1; rank 0 reports.
"""

import argparse
import dataclasses
import hashlib
import math
import os
import shlex
import sys
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from executor.bench.common import describe_device
from executor.config import (
    CONFIG_FOLDER,
    DataSettings,
    Settings,
    apply_override,
    load_settings,
    resolve_path,
    settings_from_dict,
    shown,
)
from executor.launch.launcher import launch
from executor.launch.rank import PartialFailure
from executor.loading.before_loading import check_before_launch, folder_name
from executor.utils.arguments import ArgumentParser, positive
from executor.utils.files import check_output, files_in, replace
from executor.utils.reading import read_text, refusing
from executor.utils.report import commit, is_first_rank, table, text_of, versions

if TYPE_CHECKING:
    from executor.llm import LLM

DEFAULT_YAML = "demo"
DEFAULT_WINDOW = 2048  # tokens, or the model's length if that is less
ROUNDS = 16  # batches of windows that are queued at a time: their prompts are kept in memory
MAX_NATS = 700.0  # per token; e to the power of 710 is no finite float64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """Tokens `start` to `end` of a text, exclusive, of which those from `first` on are counted."""

    start: int
    end: int
    first: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """A text, its token ids, and how it is cut into windows."""

    file: Path
    content: str
    token_ids: list[int]
    window: int
    stride: int


def run(command_line: list[str]) -> None:
    """Scores the text, prints the table and writes the report. Raises PartialFailure if a score is not finite."""
    arguments = parse(command_line)
    settings, yaml_file = settings_of(arguments)
    with refusing("--text"):
        content = read_text(arguments.text)
    if not content:
        raise ValueError(f"--text: {arguments.text} is empty")
    if arguments.json and is_first_rank():
        inputs = [arguments.text, *yaml_file, *files_in(resolve_path(settings.model_path))]
        check_output("--json", arguments.json, inputs)
    if settings.world_size > 1 and "WORLD_SIZE" not in os.environ:
        launch(settings, ["executor.evaluate", *sys.argv[1:]])
    from executor.llm import LLM

    text = tokenise(settings, arguments, content)
    data = dataclasses.replace(settings.data_config, input_max_len=text.window - 1)  # its last token is only predicted
    llm = LLM.from_settings(dataclasses.replace(settings, data_config=data))
    report = evaluate(llm, text)
    if is_first_rank():
        print(result_table(report))
        if arguments.json:
            replace(arguments.json, text_of(report) + "\n")


def parse(command_line: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m executor.evaluate perplexity", description=__doc__)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--yaml", help=f"settings: a file, or a name in models/qwen3_moe/config/ (default: {DEFAULT_YAML})"
    )
    source.add_argument("--model_path", metavar="FOLDER", help="checkpoint, with the default of every setting")
    parser.add_argument(
        "--set", action="append", default=[], metavar="section.key=value", help="overrides one setting; repeatable"
    )
    parser.add_argument(
        "--window",
        type=positive,
        metavar="N",
        help=f"tokens of a window, at least 2 (default: {DEFAULT_WINDOW}, or the model's length if that is less)",
    )
    parser.add_argument("--stride", type=positive, metavar="N", help="tokens between windows (default: --window)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report there as JSON, at the end")
    return parser.parse_args(command_line)


def settings_of(arguments: argparse.Namespace) -> tuple[Settings, list[Path]]:
    """Settings of the command line, reduced to what scoring needs, and the YAML file, if there is one.

    Decode steps, their graphs, cached prefixes and the settings of prompts have no part in it.
    """
    yaml_file: list[Path] = []
    if arguments.model_path is not None:
        raw = {"model_name": folder_name(arguments.model_path), "model_path": arguments.model_path}
        overridden = {apply_override(raw, override): shown(override) for override in arguments.set}
        settings = settings_from_dict(raw, "--model_path", overridden)
    else:
        named = Path(DEFAULT_YAML if arguments.yaml is None else arguments.yaml)
        yaml_file = [named if named.is_file() else CONFIG_FOLDER / named.with_suffix(".yaml")]
        settings = load_settings(yaml_file[0], arguments.set)
    reduced = dataclasses.replace(
        settings,
        exe_mode="eager",
        data_config=DataSettings(batch_size=settings.data_config.batch_size, input_max_len=1, max_new_tokens=1),
        engine_config=dataclasses.replace(settings.engine_config, prefix_cache=False),
    )
    return reduced, yaml_file


def tokenise(settings: Settings, arguments: argparse.Namespace, content: str) -> Text:
    """Tokenises the text and chooses the windows, before the checkpoint is loaded; ValueError."""
    from executor.loading.assembly import tokenizer_path
    from executor.loading.tokenizer import Tokenizer
    from models.qwen3_moe.architecture import attention_limit, trained_len

    model_path, config = check_before_launch(settings)
    limit = attention_limit(config)
    longest = trained_len(config) if limit is None else min(trained_len(config), limit[0])
    window = min(longest, DEFAULT_WINDOW) if arguments.window is None else arguments.window
    stride = window if arguments.stride is None else arguments.stride
    if not 2 <= window <= longest:
        raise ValueError(f"--window: {window} is impossible, must be from 2 to the model's length of {longest} tokens")
    if stride > window:
        raise ValueError(f"--stride: {stride} is impossible, must be at most the window's {window} tokens")
    tokenizer = Tokenizer(tokenizer_path(settings, model_path), window, "cut", enable_thinking=False)
    name = f"--text: {arguments.text}"
    token_ids = tokenizer.encode_whole(content, name, config.vocab_size)
    if len(token_ids) < 2:
        raise ValueError(f"{name} is a single token, at least 2 are needed to predict one")
    return Text(file=arguments.text, content=content, token_ids=token_ids, window=window, stride=stride)


def windows(num_tokens: int, window: int, stride: int) -> list[Window]:
    """Windows in which a token is counted; no token is in two of them."""
    found: list[Window] = []
    counted = 0  # tokens before this one are counted or never will be
    for start in range(0, num_tokens, stride):
        end = min(start + window, num_tokens)
        first = max(counted, start + 1)
        if first < end:
            found.append(Window(start=start, end=end, first=first))
        counted = end
        if end == num_tokens:
            break
    return found


def evaluate(llm: "LLM", text: Text) -> dict[str, Any]:
    """Scores all windows; returns a JSON-serialisable report. Raises PartialFailure if a score is not finite."""
    check_same_on_all_ranks(llm, text)
    parts = windows(len(text.token_ids), text.window, text.stride)
    started_s = time.perf_counter()
    nats = score(llm, text.token_ids, parts)
    seconds = time.perf_counter() - started_s
    data, scored = text.content.encode(), sum(part.end - part.first for part in parts)
    per_token = nats / scored
    if not per_token <= MAX_NATS:
        raise PartialFailure(f"{per_token} nats per token: the perplexity is no finite number: {llm.cause}")
    return {
        "commit": commit(),
        "command": "python -m executor.evaluate " + shlex.join(sys.argv[1:]),
        "versions": versions(),
        **describe_device(llm),
        "model_path": llm.settings.model_path,
        "dtype": llm.settings.model_config.dtype,
        "rope_scaling": llm.settings.model_config.rope_scaling,
        "world_size": llm.settings.world_size,
        "batch_size": llm.settings.data_config.batch_size,
        "text": str(text.file),
        "text_sha256": hashlib.sha256(data).hexdigest(),
        "text_bytes": len(data),
        "text_tokens": len(text.token_ids),
        "window": text.window,
        "stride": text.stride,
        "windows": len(parts),
        "scored_tokens": scored,
        "nats_per_token": per_token,
        "perplexity": math.exp(per_token),
        "bits_per_byte": per_token / math.log(2) * len(text.token_ids) / len(data),
        "seconds": round(seconds, 3),
    }


def check_same_on_all_ranks(llm: "LLM", text: Text) -> None:
    """Raises ValueError if another node has another text or other windows: its ranks would run other steps."""
    import torch

    sums = [zlib.crc32(repr((text.window, text.stride)).encode()), zlib.crc32(repr(text.token_ids).encode())]
    found = llm.parallel.control.all_gather(torch.tensor([sums], device=llm.device)).tolist()
    if any(other != sums for other in found):
        raise ValueError("--text, --window, --stride: not the same on all nodes")


def score(llm: "LLM", token_ids: list[int], parts: list[Window]) -> float:
    """Negative log-likelihood of the counted tokens of all windows, in nats."""
    from tqdm import tqdm

    from executor.engine.request import not_finite
    from executor.sampling_params import SamplingParams

    sampling = SamplingParams(max_new_tokens=1, prompt_logprobs=0)
    queued = ROUNDS * llm.settings.data_config.batch_size
    nats = [0.0] * len(parts)
    with tqdm(total=len(parts), desc="windows", disable=len(parts) == 1 or not is_first_rank()) as progress:
        for begin in range(0, len(parts), queued):
            requests = [
                llm.request("", token_ids[part.start : part.end], sampling, index, "--window: a window")
                for index, part in enumerate(parts[begin : begin + queued], begin)
            ]
            for index, output in llm.finished(requests):
                part = parts[index]
                if output.prompt_logprobs is None:
                    raise PartialFailure(
                        f"tokens {part.start} to {part.end - 1} of the text: {not_finite('a position', llm.cause)}"
                    )
                counted = output.prompt_logprobs[part.first - part.start :]
                assert None not in counted, "only the first token of a text has no prediction"
                nats[index] = -math.fsum(token.logprob for token in counted if token is not None)
                progress.update()
    return math.fsum(nats)


def result_table(report: dict[str, Any]) -> str:
    keys = {
        "model_name": "model",
        "dtype": "dtype",
        "window": "window",
        "stride": "stride",
        "text_tokens": "tokens",
        "scored_tokens": "scored",
        "nats_per_token": "nats/token",
        "perplexity": "perplexity",
        "bits_per_byte": "bits/byte",
        "seconds": "seconds",
    }
    figures = ("nats_per_token", "perplexity", "bits_per_byte")
    row = [f"{report[key]:.4f}" if key in figures else report[key] for key in keys]
    return table(list(keys.values()), [row])
