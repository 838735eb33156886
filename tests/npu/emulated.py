# SPDX-License-Identifier: Apache-2.0
"""Runs of the NPU backend on emulated operations; each needs a process of its own."""

import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from executor import LLM, SamplingParams
from executor.config import REPOSITORY
from ops.comm import GROUP_NAMES, ParallelContext
from tests.npu.emulator import comm_name, install

DEMO = REPOSITORY / "models" / "qwen3_moe" / "demo"
PROMPTS = ["My lord, the queen would speak with you", "[Exeunt.]\n", "ROMEO.\nWhat light is this"]
LONG_PROMPT = "Enter the King, and all his train of lords. " * 16  # crosses a cache block while decoding
NEW_TOKENS = 24
DECIDED = 0.01  # gap between the K-th and the next router logit, far above float16 rounding
FREE = -1.0  # cost in bytes that forces the choice of an exchange


def run_model(path: Path = DEMO, prompts: list[list[int]] | None = None, **settings: Any) -> dict[str, Any]:
    """Greedy tokens of a batch and of its last prompt alone, the smallest top-2 logit margin, logits, exchanges.

    In float32 also `decided`: the tokens of the last prompt whose top-k experts are no near-tie.
    """
    llm = LLM(path, device="cpu", batch_size=4, cache_tokens=2048, **settings)
    if prompts is None:
        encode = llm.tokenizer.tokenizer.encode
        prompts = [*map(encode, PROMPTS), encode(LONG_PROMPT)[:250]]
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    tokens = [output.token_ids for output in llm.generate(prompts, sampling)]
    alone = [output.token_ids for output in llm.generate(prompts[-1:], sampling)]  # leaves one data-parallel group idle
    margins = []
    for prompt, new in zip(prompts, tokens, strict=True):
        best = llm.logits(prompt + new)[len(prompt) - 1 : -1].topk(2).values
        margins.append(float((best[:, 0] - best[:, 1]).min()))
    return {
        "tokens": tokens,
        "alone": alone,
        "margin": min(margins),
        "logits": llm.logits(prompts[-1]),
        "decided": decided_tokens(llm, prompts[-1]) if llm.dtype is torch.float32 else None,
        "exchanges": [type(llm.exchange(is_prefill)).__name__ for is_prefill in (True, False)],
        "dispatch_shares_with": groups_sharing_dispatch(llm.parallel),
    }


def decided_tokens(llm: LLM, token_ids: list[int]) -> torch.Tensor:
    """[T] bool: tokens at which no layer's top-k experts are a near-tie, which rounding may flip."""
    gaps = []
    route = llm.ops.route

    def watched_route(hidden_states, residual, norm_weight, eps, router_weight, top_k, renormalize):
        results = route(hidden_states, residual, norm_weight, eps, router_weight, top_k, renormalize)
        best = (results[0] @ router_weight.T).topk(top_k + 1).values
        gaps.append(best[:, -2] - best[:, -1])
        return results

    llm.ops.route = watched_route
    try:
        llm.logits(token_ids)
    finally:
        del llm.ops.route
    return torch.stack(gaps).amin(0) > DECIDED


def groups_sharing_dispatch(parallel: ParallelContext) -> list[str]:
    """Names of groups that share the communicator of dispatch and combine, which must be exclusive."""
    own = parallel.dispatch.process_group if parallel.dispatch else None
    groups = [getattr(parallel, name) for name in GROUP_NAMES]
    return [group.name for group in groups if own is not None and group.process_group is own]


def run_emulated(
    wheel: str, product: str, settings: dict[str, Any], all_to_all: bool = False, *model: Any
) -> dict[str, Any]:
    """`run_model` on `NpuOps`, with its selected variants and the call count of each vendor operation.

    all_to_all: forces that exchange in prefill.
    """
    install(wheel, product)
    emulate_communicators()
    import executor.loading.assembly
    import executor.loading.exchanges
    from ops.npu import NpuOps

    bound = []
    executor.loading.assembly.load_ops = lambda device_type: bound.append(NpuOps("cpu")) or bound[-1]
    if all_to_all:
        cost = executor.loading.exchanges.sent_bytes_per_token
        executor.loading.exchanges.sent_bytes_per_token = lambda *arguments: cost(*arguments) | {"all_to_all": FREE}
    with CalledOperations() as called:
        results = run_model(*(model or (DEMO,)), **settings)
    buffer = os.environ.get("HCCL_BUFFSIZE")
    return results | {"bindings": dict(bound[0].bindings), "called": dict(called.counts), "buffer": buffer}


def exchange_where_one_rank_fails(wheel: str) -> str:
    """Name of the decode exchange that two ranks select where combine raises on rank 1."""
    install(wheel, "A2")
    emulate_communicators()
    import executor.loading.assembly
    from ops.npu import NpuOps
    from ops.npu.exchange import DispatchCombine

    combine = DispatchCombine.combine

    def fails_on_one(self: DispatchCombine, *arguments: Any) -> torch.Tensor:
        result = combine(self, *arguments)
        if self.rank == 1:
            raise RuntimeError("not supported here")
        return result

    DispatchCombine.combine = fails_on_one
    executor.loading.assembly.load_ops = lambda device_type: NpuOps("cpu")
    return type(LLM(DEMO, device="cpu", dtype="float16", world_size=2).exchange(is_prefill=False)).__name__


def emulate_communicators() -> None:
    """Makes CPU process groups return HCCL communicator names, as torch_npu's do."""
    torch.utils.rename_privateuse1_backend("npu")
    real = dist.ProcessGroup._get_backend

    def get_backend(group: dist.ProcessGroup, device: torch.device) -> Any:
        if device.type == "npu":
            return SimpleNamespace(get_hccl_comm_name=lambda rank: comm_name(group, rank))
        return real(group, device)

    dist.ProcessGroup._get_backend = get_backend


class CalledOperations(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts calls of vendor operations."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = function.name().partition("::")
        if namespace == "npu":
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))
