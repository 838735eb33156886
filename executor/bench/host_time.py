# SPDX-License-Identifier: Apache-2.0
"""Host overhead of an eager decode step on an NPU, relative to the same vendor calls in a bare loop.

Eager decode is host-bound if preparing and launching the calls takes longer than the device's work. Its lower bound is
the time of the calls alone. So one step is recorded: every call that launches device work, copies and casts included,
with its arguments; views and allocations are left out. The bare loop replays exactly these calls from a list. Steps
(from scheduling to the sampled token) and bare loops alternate; both include the copy of the token to the host, which
is a host sync.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from executor.bench.common import (
    build_llm,
    command_parser,
    describe_device,
    known,
    random_prompts,
    settings_of,
)
from executor.bench.report import Report
from executor.llm import LLM
from executor.sampling_params import SamplingParams
from executor.utils.arguments import positive
from executor.utils.report import percentiles, table

WARMUP_ROUNDS = 5
FASTEST_FORM = {torch.ops.aten.mm.default: torch.mm, torch.ops.aten.linear.default: F.linear}


def run(command_line: list[str]) -> None:
    """Measures, prints the results and writes the report."""
    arguments = parse(command_line)
    settings = settings_of(arguments, "exe_mode=eager")
    if settings.world_size > 1:
        raise ValueError("world_size: host time is measured on one rank")
    new_tokens = arguments.repeats + WARMUP_ROUNDS + 3  # the prefill's token, a step to warm up, and the recorded one
    with Report(arguments.output, 1, result_table) as report:
        sizes = [(arguments.prompt_tokens, new_tokens)]
        llm = build_llm(settings, sizes, arguments.batch_size, arguments.allow_fallback)
        if llm.device.type != "npu":
            raise ValueError(f"device: host-time measures vendor calls of an NPU, {llm.device.type} has none")
        report.begin(**describe_device(llm))
        report.add([measure(llm, arguments.batch_size, arguments.prompt_tokens, arguments.repeats)])


def parse(command_line: list[str]) -> argparse.Namespace:
    parser = command_parser("host-time", __doc__)
    parser.add_argument("--prompt-tokens", type=positive, default=32)
    parser.add_argument("--batch-size", type=positive, default=1)
    parser.add_argument("--repeats", type=positive, default=50)
    return parser.parse_args(command_line)


@torch.inference_mode()
def measure(llm: LLM, batch_size: int, prompt_tokens: int, repeats: int) -> dict[str, Any]:
    sampling = SamplingParams(max_new_tokens=llm.settings.data_config.max_new_tokens, ignore_eos=True)
    prompts = random_prompts(llm, batch_size, prompt_tokens)
    requests = llm.requests([("", prompt) for prompt in prompts], sampling)
    for request in requests:
        llm.engine.add(request.samples)

    def step() -> None:
        generated = requests[0].samples[0].token_ids
        known = len(generated)
        while len(generated) == known:
            llm.engine.step()

    step()  # the prefill
    step()
    with LaunchRecorder(llm.device.type) as recorder:
        step()

    def bare() -> None:
        for operation, args, kwargs in recorder.launches:
            operation(*args, **kwargs)

    times_ms: tuple[list[float], list[float]] = ([], [])
    for _ in range(WARMUP_ROUNDS + repeats):
        for work, measured in zip((step, bare), times_ms, strict=True):
            start_s = time.perf_counter()
            work()
            measured.append((time.perf_counter() - start_s) * 1e3)
    step_ms, bare_ms = (percentiles(measured[WARMUP_ROUNDS:]) for measured in times_ms)
    return {
        "layers": llm.config.num_hidden_layers,
        "dtype": llm.settings.model_config.dtype,
        "batch_size": batch_size,
        "prompt_tokens": prompt_tokens,
        "repeats": repeats,
        "TASK_QUEUE_ENABLE": os.environ.get("TASK_QUEUE_ENABLE", "unset"),
        "launches": len(recorder.launches),
        "read_backs": recorder.read_backs,
        "step_ms": step_ms,
        "bare_ms": bare_ms,
        "step_over_bare": round(known(step_ms["p50"]) / known(bare_ms["p50"]), 3),
    }


def result_table(report: Report) -> str:
    keys = ("layers", "batch_size", "launches", "read_backs", "TASK_QUEUE_ENABLE", "step_over_bare")
    [result] = report.results
    row = [result["step_ms"]["p50"], result["bare_ms"]["p50"], *(result[key] for key in keys)]
    return table(["step ms", "bare ms", *keys], [row])


class LaunchRecorder(TorchDispatchMode):
    """Records the calls that launch device work, with their arguments, in the form with the least host overhead.

    read_backs: number of host syncs, calls that copy a tensor or a number to the host.
    """

    def __init__(self, device_type: str):
        super().__init__()
        self.device_type = device_type
        self.launches: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []
        self.read_backs = 0

    def __torch_dispatch__(
        self,
        operation: torch._ops.OpOverload,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        given, got = list(tensors([*args, *kwargs.values()])), list(tensors([result]))
        if any(tensor.device.type == self.device_type for tensor in given + got):
            to_host = result is not None and all(tensor.device.type == "cpu" for tensor in got)
            if to_host or computes(operation, given, got):
                self.launches.append((FASTEST_FORM.get(operation, operation), args, kwargs))
                self.read_backs += to_host
        return result


def computes(operation: torch._ops.OpOverload, given: list[torch.Tensor], got: list[torch.Tensor]) -> bool:
    """Returns whether a call writes memory, unlike a view or an allocation."""
    if operation.namespace == "npu" or operation._schema.is_mutable:  # the vendor's schemas may omit the mutation
        return True
    memory = {tensor.untyped_storage().data_ptr() for tensor in given}
    return "empty" not in operation.name() and any(tensor.untyped_storage().data_ptr() not in memory for tensor in got)


def tensors(values: Any) -> Iterator[torch.Tensor]:
    """Yields all tensors in nested lists and tuples."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors(value)
