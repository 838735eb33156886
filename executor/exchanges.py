# SPDX-License-Identifier: Apache-2.0
"""Which exchanges bring tokens to their experts, decided once, at start."""

import logging
from typing import Any

import torch
from transformers import Qwen3MoeConfig

from executor.config import Settings
from models.layers.expert_exchange import (
    AllToAllExchange,
    ExpertExchange,
    FusedExchange,
    GatherExchange,
    sent_bytes_per_token,
)
from models.layers.padding import share_of
from ops import Ops
from ops.ascend import ExchangeSizes
from ops.comm import ParallelContext

logger = logging.getLogger(__name__)


def dispatch_sizes(settings: Settings, config: Qwen3MoeConfig) -> ExchangeSizes | None:
    """What a fused dispatch would have to carry; None where there is none to make.

    Ranks that all hold the same tokens have nothing to send, and columns of an expert would need every row twice.
    """
    parallel = settings.parallel_config
    attn_dp = settings.world_size // parallel.attn_tp_size
    if attn_dp == 1 or parallel.moe_tp_size > 1:
        return None
    return ExchangeSizes(
        ranks=settings.world_size,
        tokens=share_of(share_of(settings.data_config.batch_size, attn_dp), parallel.attn_tp_size),
        experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        hidden_size=config.hidden_size,
    )


def plan_dispatch(settings: Settings, config: Qwen3MoeConfig, ops: Ops) -> Any:
    """The backend's plan for fused dispatch and combine (`Ops.plan_dispatch`) with its environment set, or None.

    Raises ValueError for settings that the backend cannot honour.
    """
    sizes = dispatch_sizes(settings, config)
    plan = None if sizes is None else ops.plan_dispatch(sizes)
    check_npu_options(settings, ops, plan)
    if plan is not None:
        plan.set_environment()
    return plan


def check_npu_options(settings: Settings, ops: Ops, plan: Any) -> None:
    """ValueError where an option of Ascend NPUs is set that cannot be honoured."""
    key = "model_config.npu_prefetch"
    if settings.model_config.npu_prefetch and ops.name != "npu":
        raise ValueError(f"{key}: only possible on device npu; leave it out")
    if settings.model_config.npu_prefetch and settings.exe_mode == "graph":
        raise ValueError(f"{key}: only possible with exe_mode: eager; leave one of them out")
    parallel = settings.parallel_config
    if not parallel.npu_mm_all_reduce_base:
        return
    refusal = ops.refuses_linear_all_reduce(parallel.attn_tp_size)
    if refusal is None and parallel.sequence_parallel:
        refusal = "there is no all_reduce with parallel_config.sequence_parallel: True"
    if refusal is None and plan is not None:
        refusal = "its communicator would have to be that of dispatch and combine, which this layout uses"
    if refusal is not None:
        raise ValueError(f"parallel_config.npu_mm_all_reduce_base: {refusal}; leave it out")


def choose_exchanges(
    settings: Settings, config: Qwen3MoeConfig, parallel: ParallelContext, ops: Ops, plan: Any, device: torch.device
) -> dict[bool, ExpertExchange]:
    """The exchanges of prefill (True) and decode (False) steps: those that send the least.

    Decode takes a backend's fused pair where there is one. A captured step, or one of a device on which waiting for a
    number is dear, needs an exchange of which the host reads nothing.
    """
    num_local_experts = config.num_experts // parallel.moe_ep.size
    gather = GatherExchange(parallel, num_local_experts)
    dtype = getattr(torch, settings.model_config.dtype)
    sent = sent_bytes_per_token(parallel, config.num_experts_per_tok, config.hidden_size, dtype.itemsize)
    all_to_all = AllToAllExchange(parallel, num_local_experts, ops)
    cheaper = all_to_all if sent["all_to_all"] < sent["gather"] else gather
    decode: ExpertExchange = gather if settings.exe_mode == "graph" or ops.decode_reads_nothing else cheaper
    detail = ""
    if plan is not None:
        pair = plan.make(parallel.dispatch)
        if all(parallel.control.all_gather(torch.tensor([int(pair.works(dtype, device))], device=device)).tolist()):
            decode, detail = FusedExchange(parallel, pair), f" by {pair.name}"
    if parallel.world.size > 1:
        logger.info(
            "exchange of tokens: prefill %s, decode %s%s", type(cheaper).__name__, type(decode).__name__, detail
        )
    return {True: cheaper, False: decode}
