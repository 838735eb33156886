# SPDX-License-Identifier: Apache-2.0
"""Profiling (`model_config.enable_profiler`): Chrome trace of a prefill and a few decode steps, kernel time table."""

from pathlib import Path

from executor.llm import LLM
from executor.sampling_params import SamplingParams
from executor.utils.report import table

DECODE_STEPS = 4
SHOWN_KERNELS = 10
NAME_WIDTH = 64


def profile(llm: LLM, prompts: list[list[int]], file: Path) -> str:
    """Profiles the first tokens of `prompts`: writes a trace to `file`, returns a table of the slowest kernels.

    A warm-up run comes first, so that the trace has no kernel compilation or other one-time work. The prefix cache is
    off meanwhile, so that the trace has the whole prefill.
    """
    new_tokens = min(1 + DECODE_STEPS, llm.settings.data_config.max_new_tokens)
    sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    schedulers = llm.engine.schedulers
    prefix_cache = schedulers[0].prefix_cache
    for scheduler in schedulers:
        scheduler.prefix_cache = False
    llm.generate(prompts, sampling, use_tqdm=False)
    kernels = llm.ops.profiler().trace(lambda: llm.generate(prompts, sampling, use_tqdm=False), file, llm.device)
    for scheduler in schedulers:
        scheduler.prefix_cache = prefix_cache
    total_ms = sum(kernel.total_ms for kernel in kernels)
    rows = [
        [kernel.name[:NAME_WIDTH], kernel.calls, kernel.total_ms, f"{kernel.total_ms / total_ms:.1%}"]
        for kernel in kernels[:SHOWN_KERNELS]
    ]
    return table(["kernel", "calls", "total ms", "share"], rows)
