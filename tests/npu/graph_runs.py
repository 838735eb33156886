# SPDX-License-Identifier: Apache-2.0
"""Runs of the demo checkpoint in graph mode on emulated operations; each needs a process of its own."""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import torch

import executor.engine.graph_runner
import executor.loading.assembly
from executor import LLM, SamplingParams
from executor.engine.decode_inputs import DecodeInputs
from ops import load_ops
from tests.npu.emulated import DEMO, LONG_PROMPT, PROMPTS, CalledOperations, emulate_communicators
from tests.npu.emulator import install

NEW_TOKENS = 9  # the longest prompt gets into its third cache block
OTHER_NAMES = {"actual_seq_kvlen": "actual_seq_lengths_kv", "actual_seq_lengths_kv": "actual_seq_kvlen"}


def run_graphs(wheel: str, batch_sizes: dict[str, list[int]], with_broken: bool) -> dict[str, Any]:
    """Tokens of the reference, of graph mode by (attention variant, batch size), and of broken replays."""
    install(wheel)
    from ops.npu import ATTENTION, NpuOps

    found: dict[Any, Any] = {"reference": generate(load_ops("cpu"), dtype="float32")}
    for name, sizes in batch_sizes.items():
        for size in sizes:
            ops = NpuOps("cpu")
            ops.attend = ATTENTION[name]
            found[name, size] = generate(ops, exe_mode="graph", batch_size=size)
    if with_broken:
        found["broken"] = {name: outcome(NpuOps("cpu"), breaking) for name, breaking in faults().items()}
    return found


def run_layout(wheel: str, product: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One rank's tokens in eager and graph mode, and the call count of each vendor operation in the latter."""
    install(wheel, product)
    emulate_communicators()
    from ops.npu import NpuOps

    recorder = NpuOps("cpu").graph_recorder()
    eager = generate(NpuOps("cpu"), **settings)
    with CalledOperations() as called:
        graph = generate(NpuOps("cpu"), exe_mode="graph", **settings)
    return {"eager": eager, "graph": graph, "called": dict(called.counts), "max_graphs": recorder.max_graphs}


def generate(ops: Any, dtype: str = "float16", batch_size: int = 4, **settings: Any) -> list[list[int]]:
    """Tokens of three prompts, so that a batch of four has a padding row; on several ranks also of one alone, which
    leaves attention DP groups without a sequence."""
    with (
        patch.object(executor.loading.assembly, "load_ops", lambda device_type: ops),
        patch.object(executor.engine.graph_runner, "UNPADDED", 2),
    ):
        llm = LLM(DEMO, "cpu", dtype, batch_size=batch_size, cache_tokens=2048, input_max_len=512, **settings)
    if settings.get("exe_mode") == "graph":
        assert (3 in llm.runner.graphs) == (batch_size == 3)
    prompts = [llm.tokenizer.tokenizer.encode(LONG_PROMPT)[:250], *PROMPTS[:2]]
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    outputs = llm.generate(prompts, sampling)
    if settings.get("world_size", 1) > 1:
        outputs += llm.generate(prompts[-1:], sampling)
    return [output.token_ids for output in outputs]


def outcome(ops: Any, breaking: AbstractContextManager) -> list[list[int]] | str:
    with breaking:
        try:
            return generate(ops, exe_mode="graph")
        except (RuntimeError, ValueError) as error:
            return str(error)


def faults() -> dict[str, AbstractContextManager]:
    """Faults to inject; each but the first must change the tokens or raise."""
    graph = torch.npu.NPUGraph
    update, fill = graph.update, DecodeInputs.fill

    def by_another_name(self, cpu_update_input):
        update(self, [{OTHER_NAMES[name]: lens for name, lens in entry.items()} for entry in cpu_update_input])

    def with_lengths_of_padding(self, cpu_update_input):
        update(self, [{name: [1] * len(lens) for name, lens in entry.items()} for entry in cpu_update_input])

    def with_one_slot(self, batch, *arguments):
        inputs = fill(self, batch, *arguments)
        self.step.slot_mapping[len(batch) :] = 0
        return inputs

    return {
        "nothing": nullcontext(),
        "no update": patch.object(graph, "update", lambda self, cpu_update_input: None),
        "another name": patch.object(graph, "update", by_another_name),
        "lengths of padding": patch.object(graph, "update", with_lengths_of_padding),
        "no replay": patch.object(graph, "replay", lambda self: None),
        "task queue": patch.dict(os.environ, TASK_QUEUE_ENABLE="2"),
        "one slot for all padding": patch.object(DecodeInputs, "fill", with_one_slot),
    }
