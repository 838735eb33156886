# SPDX-License-Identifier: Apache-2.0
"""The demo checkpoint run by the NPU backend on emulated operations; for processes that may be taken over."""

from collections import Counter
from typing import Any

import torch

from executor import LLM, SamplingParams
from executor.config import REPOSITORY

DEMO = REPOSITORY / "models" / "qwen3_moe" / "demo"
PROMPTS = ["My lord, the queen would speak with you", "[Exeunt.]\n", "ROMEO.\nWhat light is this"]
LONG_PROMPT = "Enter the King, and all his train of lords. " * 16  # crosses a cache block while decoding
NEW_TOKENS = 24


def run_demo(**settings: Any) -> dict[str, Any]:
    """Greedy tokens of several prompts at once, how close the closest choice was, and logits of a long prompt."""
    llm = LLM(DEMO, device="cpu", batch_size=4, cache_tokens=2048, **settings)
    long_prompt = llm.tokenizer.tokenizer.encode(LONG_PROMPT)[:250]
    outputs = llm.generate([*PROMPTS, long_prompt], SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True))
    margins = []
    for output in outputs:
        logits = llm.logits(output.prompt_token_ids + output.token_ids)[len(output.prompt_token_ids) - 1 : -1]
        best = logits.topk(2).values
        margins.append(float((best[:, 0] - best[:, 1]).min()))
    tokens = [output.token_ids for output in outputs]
    return {"tokens": tokens, "margin": min(margins), "logits": llm.logits(long_prompt)}


def run_demo_emulated(wheel: str, settings: dict[str, Any]) -> dict[str, Any]:
    """`run_demo` through `NpuOps`, with the bindings it chose and how often each vendor operation was called."""
    from tests.npu.emulator import install

    install(wheel)
    import executor.llm
    from ops.npu import NpuOps

    bound = []
    executor.llm.load_ops = lambda device_type: bound.append(NpuOps("cpu")) or bound[-1]
    with CalledOperations() as called:
        results = run_demo(**settings)
    return results | {"bindings": dict(bound[0].bindings), "called": dict(called.counts)}


class CalledOperations(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts calls of the vendor's operations."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = function.name().partition("::")
        if namespace == "npu":
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))
