# SPDX-License-Identifier: Apache-2.0
"""Quantises a float checkpoint to a new one in compressed-tensors' layout, which vLLM and transformers read too.

w8a8: int8 weights with a scale per output channel; activations are quantised per token when the model runs. w4a16:
4-bit weights with a scale per group of columns. Routers, embedding, lm_head, norms and biases stay float.

--calibration scales channels by their activations on a text (AWQ, Lin et al. 2023) before w4a16 is rounded, and folds
the scales into norms, routers and biases. The text should be like what the model will see; its first 65,536 tokens are
used. llmcompressor has more methods (GPTQ, which corrects later columns for the error of earlier ones; SmoothQuant);
what it writes is read too.

An interrupted run is continued by the same command, from what is finished in OUTPUT.partial; OUTPUT appears when it
is whole. Memory: a few matrices; with --calibration a layer in float32 and the activations of the text.
"""

import argparse
import hashlib
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from executor.launch.command import run_command
from executor.launch.interrupts import interrupts_deferred
from executor.launch.rank import forget_rank
from executor.utils.arguments import ArgumentParser, positive
from executor.utils.files import check_output, files_in, replace
from executor.utils.reading import read_text, refusing
from executor.utils.report import commit, text_of, versions
from executor.utils.text import one_line

if TYPE_CHECKING:
    import torch

    from executor.quantize.calibration import Calibration
    from executor.quantize.plan import Plan

SCHEMES = ("w8a8", "w4a16")
DEFAULT_GROUP_SIZE = 128
SHARD_MB = 4000  # published checkpoints have files of 4 GB
MIN_TOKENS = 512  # of a calibration text


def main() -> int:
    """Runs the command line; returns the exit code."""
    forget_rank()

    def body() -> int:
        run(parse(sys.argv[1:]))
        return 0

    return run_command(body)


def parse(command_line: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m executor.quantize", description=__doc__)
    parser.add_argument("--model_path", type=Path, required=True, metavar="FOLDER", help="float checkpoint")
    parser.add_argument("--scheme", choices=SCHEMES, required=True)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="new checkpoint; must not exist")
    parser.add_argument(
        "--group-size", type=positive, metavar="N", help=f"columns of a group of w4a16 (default: {DEFAULT_GROUP_SIZE})"
    )
    parser.add_argument(
        "--asymmetric", action="store_true", help="zero points for w4a16; vLLM does not read them in experts"
    )
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="UTF-8 text, for w4a16")
    parser.add_argument(
        "--device", default="auto", choices=("auto", "npu", "cuda", "cpu"), help="that computes (default: auto)"
    )
    parser.add_argument(
        "--shard-size", type=positive, default=SHARD_MB, metavar="MB", help=f"of a weight file (default: {SHARD_MB})"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write a report there as JSON, at the end")
    arguments = parser.parse_args(command_line)
    if arguments.scheme == "w8a8":
        for option in ("group_size", "asymmetric", "calibration"):
            if getattr(arguments, option) not in (None, False):
                parser.error(f"argument --{option.replace('_', '-')}: w8a8 has none, only w4a16 has")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    """Quantises; ValueError for wrong input, PartialFailure if the disk is full."""
    from executor.loading.device import select_device
    from executor.quantize.calibration import calibrate
    from executor.quantize.plan import make_plan
    from executor.quantize.recipe import Recipe
    from executor.quantize.work import Work, locked, refuse_existing, resumable
    from executor.quantize.write import write_checkpoint

    started_s = time.perf_counter()
    recipe = Recipe(
        scheme=arguments.scheme,
        group_size=arguments.group_size or DEFAULT_GROUP_SIZE,
        symmetric=not arguments.asymmetric,
    )
    refuse_existing(arguments.output)
    if arguments.output.resolve().is_relative_to(arguments.model_path.resolve()):
        raise ValueError(one_line(f"--output: {arguments.output} is within --model_path: choose another folder"))
    plan = make_plan(arguments.model_path, recipe, arguments.shard_size * 1_000_000)
    device = select_device(arguments.device)
    calibration = read_calibration(arguments, plan, device)
    if arguments.json:
        inputs = [arguments.calibration] if arguments.calibration else []
        check_output("--json", arguments.json, [*inputs, *files_in(plan.model_path)])
    work = Work(Path(os.path.abspath(arguments.output)))
    with locked(work), resumable(work):
        work.begin(settings_of(arguments, plan, calibration, device))
        if calibration is not None:
            calibrate(plan, calibration, work.calibration)
        write_checkpoint(plan, work.checkpoint, device, None if calibration is None else work.calibration)
        report = describe(arguments, plan, calibration, work.calibration)
        with interrupts_deferred():
            work.finish()
    report["seconds"] = round(time.perf_counter() - started_s, 1)
    print(summary(report))
    if arguments.json:
        replace(arguments.json, text_of(report) + "\n")


def read_calibration(arguments: argparse.Namespace, plan: "Plan", device: "torch.device") -> "Calibration | None":
    """Tokenises the calibration text; ValueError."""
    if arguments.calibration is None:
        return None
    from executor.loading.tokenizer import Tokenizer
    from executor.quantize.calibration import MAX_TOKENS, Calibration

    name = f"--calibration: {arguments.calibration}"
    with refusing("--calibration"):
        content = read_text(arguments.calibration)
    tokenizer = Tokenizer(plan.model_path, MAX_TOKENS, "cut", enable_thinking=False)
    token_ids = tokenizer.encode_whole(content, name, plan.config.vocab_size)[:MAX_TOKENS]
    if len(token_ids) < MIN_TOKENS:
        raise ValueError(f"{name} has {len(token_ids)} tokens, at least {MIN_TOKENS} are needed")
    return Calibration(token_ids, device)


def settings_of(
    arguments: argparse.Namespace, plan: "Plan", calibration: "Calibration | None", device: "torch.device"
) -> dict[str, Any]:
    """What a run must share with an interrupted one to continue it."""
    files = sorted({job.stored.file for job in plan.jobs})
    config = (plan.model_path / "config.json").read_bytes()
    tokens = None if calibration is None else ",".join(map(str, calibration.token_ids)).encode()
    return {
        "scheme": plan.recipe.scheme,
        "group_size": plan.recipe.group_size,
        "symmetric": plan.recipe.symmetric,
        "shard_size": arguments.shard_size,
        "calibration": None if tokens is None else hashlib.sha256(tokens).hexdigest(),
        "config.json": hashlib.sha256(config).hexdigest(),
        "source": {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files},
        "device": device.type,
        "version": versions()["recipe"],
    }


def describe(
    arguments: argparse.Namespace, plan: "Plan", calibration: "Calibration | None", scales_folder: Path
) -> dict[str, Any]:
    """JSON-serialisable report."""
    from executor.quantize.calibration import read_scales

    report: dict[str, Any] = {
        "commit": commit(),
        "command": "python -m executor.quantize " + shlex.join(sys.argv[1:]),
        "versions": versions(),
        "model_path": str(arguments.model_path),
        "output": str(arguments.output),
        "scheme": plan.recipe.scheme,
        "group_size": plan.recipe.group_size if plan.recipe.scheme == "w4a16" else None,
        "symmetric": plan.recipe.symmetric,
        "files": len(plan.shards),
        "stored_bytes": sum(job.stored_bytes for job in plan.jobs),
        "written_bytes": sum(job.nbytes for job in plan.jobs),
        "calibration": None,
    }
    if calibration is not None:
        errors = [read_scales(scales_folder, layer).errors.tolist() for layer in range(plan.config.num_hidden_layers)]
        groups = ("attention", "output", "feed_forward", "down")
        report["calibration"] = {
            "text": str(arguments.calibration),
            "tokens": len(calibration.token_ids),
            "device": str(calibration.device),
            "relative_squared_errors": [  # of each layer and group of matrices
                {group: {"without_scales": plain, "with_scales": scaled} for group, (plain, scaled) in layer}
                for layer in (zip(groups, rows, strict=True) for rows in errors)
            ],
        }
    return report


def summary(report: dict[str, Any]) -> str:
    size = "" if report["group_size"] is None else f", groups of {report['group_size']}"
    return (
        f"{report['output']}: {report['scheme']}{size}, {report['stored_bytes'] / 1e6:.1f} MB -> "
        f"{report['written_bytes'] / 1e6:.1f} MB in {report['files']} file{'s' * (report['files'] > 1)}, "
        f"{report['seconds']} s"
    )


if __name__ == "__main__":
    sys.exit(main())
