# SPDX-License-Identifier: Apache-2.0
"""Time of each operation alone, at the model's shapes, against its roofline floor.

The floor is the larger of bytes moved / read bandwidth and FLOPs / matmul rate, both rates measured in the same run.
Calls rotate over weights that together exceed the last-level cache; on CUDA, those of a decode step are replayed from a
graph. Weights are random, in the number formats that config.json declares; no checkpoint is loaded. An operation whose
calls together fit the cache has no fraction: the floor assumes reads from memory. Of steps with new tokens on cached
context only attention is measured, as the other operations depend on the number of tokens only.
"""

import argparse
import gc
import re
from typing import TYPE_CHECKING, Any

from executor.bench.common import command_parser, refuse_fallbacks, settings_of
from executor.bench.report import Report
from executor.utils.arguments import positive
from executor.utils.report import table

if TYPE_CHECKING:
    import torch

    from executor.bench.op_cases import OpCase
    from ops import Ops


def run(command_line: list[str]) -> None:
    """Measures every operation at every size, prints the table and writes the report."""
    arguments = parse(command_line)
    if not arguments.batch_size and not arguments.prompt_tokens and not arguments.extend:
        raise ValueError("--batch-size, --prompt-tokens and --extend: none has a size to measure")
    settings = settings_of(arguments)
    import torch

    from executor.bench.op_cases import OpCases
    from executor.bench.timing import matmul_ceiling, read_ceiling
    from executor.loading.before_loading import check_before_launch, load_scheme
    from executor.loading.checkpoint import read_unique_object
    from executor.loading.device import device_name, select_device
    from models.quantization.rounding import random_method
    from ops import load_ops

    device, dtype = select_device(settings.device), getattr(torch, settings.model_config.dtype)
    if not arguments.allow_fallback:
        refuse_fallbacks(settings)
    model_path, config = check_before_launch(settings)
    scheme = load_scheme(model_path, read_unique_object(model_path / "config.json"))
    before = arguments.cached_tokens - 1  # a sequence's length includes its new token
    sizes = [("decode", sequences, 1, before) for sequences in arguments.batch_size]
    sizes += [("prefill", 1, tokens, 0) for tokens in arguments.prompt_tokens]
    sizes += [("extend", *extend) for extend in arguments.extend]
    with Report(arguments.output, len(sizes), result_table) as report, torch.inference_mode():
        ceilings = {"read_ceiling": read_ceiling(device), "matmul_ceiling": matmul_ceiling(device, dtype)}
        model = {"model_name": settings.model_name, "dtype": settings.model_config.dtype}
        report.begin(**model, quantization=random_method(scheme), device=device_name(device), **ceilings)
        for phase, sequences, new_tokens, cached_tokens in sizes:
            ops = load_ops(device.type)  # a new instance, which frees the weights of the previous size
            ops.check_model(dtype, config.head_dim)
            shape = (sequences, new_tokens, cached_tokens)
            cases = OpCases(ops, config, settings.parallel_config, dtype, device, *shape, scheme)
            rows: list[dict[str, Any]] = []
            note = f" ({sequences} x {new_tokens} on {cached_tokens} cached)" if phase == "extend" else ""
            for case in [cases.attention()] if phase == "extend" else cases.all():
                us = time_us(case, ops, device, captured=phase != "prefill")
                rows.append({"phase": phase, "tokens": cases.tokens} | row(case, us, ceilings, device.type))
                rows[-1]["operation"] += note
            report.add(rows)
            del cases, case, ops
            gc.collect()


def parse(command_line: list[str]) -> argparse.Namespace:
    parser = command_parser("kernels", __doc__)
    parser.add_argument(
        "--batch-size", type=positive, nargs="*", default=[1, 2, 4, 8], help="sequences of decode steps"
    )
    parser.add_argument("--cached-tokens", type=positive, default=1024, help="length of each sequence in decode steps")
    parser.add_argument("--prompt-tokens", type=positive, nargs="*", default=[4080], help="lengths of prefills")
    parser.add_argument(
        "--extend",
        type=extend_shape,
        nargs="*",
        default=[],
        metavar="SEQUENCESxNEW@CACHED",
        help="steps of sequences with new tokens on cached ones: attention only",
    )
    return parser.parse_args(command_line)


def extend_shape(text: str) -> tuple[int, int, int]:
    """Parses `8x4@4096`: sequences, new tokens and cached tokens of each."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*@[1-9]\d*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not SEQUENCESxNEW@CACHED, such as 8x4@4096")
    sequences, new_tokens, cached_tokens = map(int, re.split("[x@]", text))
    return sequences, new_tokens, cached_tokens


def time_us(case: "OpCase", ops: "Ops", device: "torch.device", captured: bool) -> float:
    """Time of one call in us; without launch overhead where it can be replayed from a graph."""
    from executor.bench.timing import time_ms

    def run_all() -> None:
        for call in case.calls:
            call()

    if captured and device.type == "cuda":
        recorder = ops.graph_recorder()
        recorder.warm_up(run_all)
        _, replay = recorder.record(run_all)
        return time_ms(lambda: replay([]), device) / len(case.calls) * 1e3
    return time_ms(run_all, device) / len(case.calls) * 1e3


def row(case: "OpCase", us: float, ceilings: dict[str, Any], device_type: str) -> dict[str, Any]:
    """Builds a result row. A memory-bound operation has a fraction of its floor only if its reads miss the cache."""
    floors_us = {
        "bytes": case.moved_bytes / ceilings["read_ceiling"]["gb_per_s"] / 1e3,
        "flops": case.flops / ceilings["matmul_ceiling"]["tflop_per_s"] / 1e6,
    }
    bound_by = max(floors_us, key=lambda name: floors_us[name])
    cached = bound_by == "bytes" and not case.is_cold(device_type)
    return {
        "operation": case.name,
        "us": round(us, 3),
        "floor_us": round(floors_us[bound_by], 3),
        "fraction": None if cached else round(floors_us[bound_by] / us, 4),
        "bound_by": bound_by,
        "cached": cached,
        "moved_bytes": case.moved_bytes,
        "flops": case.flops,
    }


def result_table(report: Report) -> str:
    keys = ("phase", "tokens", "operation", "us", "floor_us", "fraction", "bound_by")
    return table(
        ["phase", "tokens", "operation", "us", "floor us", "fraction", "bound by"],
        [[result[key] for key in keys] for result in report.results],
    )
