# SPDX-License-Identifier: Apache-2.0
"""Selection of the expert exchange (dispatch and combine) of decode steps and of all others, once at start."""

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
    """Sizes for a fused dispatch and combine; None if the layout cannot use them.

    It cannot if all ranks hold the same tokens (no attention DP) or experts are tensor-parallel.
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
    """Plans the backend's fused dispatch and combine (`Ops.plan_dispatch`), sets its environment; None without one.

    Raises ValueError for settings that the backend does not support.
    """
    sizes = dispatch_sizes(settings, config)
    plan = None if sizes is None else ops.plan_dispatch(sizes)
    if plan is not None:
        plan.set_environment()
    return plan


def select_exchanges(
    settings: Settings, config: Qwen3MoeConfig, parallel: ParallelContext, ops: Ops, plan: Any, device: torch.device
) -> dict[bool, ExpertExchange]:
    """Selects the exchange with the least communication, of steps that prefill (True) and of decode steps (False).

    Decode uses the backend's fused dispatch and combine if available. Graph mode, and devices where a host sync is
    expensive, need an exchange without host sync.
    """
    num_local_experts = config.num_experts // parallel.moe_ep.size
    gather = GatherExchange(parallel, num_local_experts)
    dtype = getattr(torch, settings.model_config.dtype)
    sent = sent_bytes_per_token(parallel, config.num_experts_per_tok, config.hidden_size, dtype.itemsize)
    all_to_all = AllToAllExchange(parallel, num_local_experts, ops)
    cheaper = all_to_all if sent["all_to_all"] < sent["gather"] else gather
    decode: ExpertExchange = gather if settings.exe_mode == "graph" or ops.decode_without_host_sync else cheaper
    detail = ""
    for pair in plan.make(parallel.dispatch) if plan is not None else ():
        works = torch.tensor([int(pair.works(dtype, device))], device=device)
        if all(parallel.control.all_gather(works).tolist()):
            decode, detail = FusedExchange(parallel, pair), f" by {pair.name}"
            break
    if parallel.world.size > 1:
        logger.info("expert exchange: prefill %s, decode %s%s", type(cheaper).__name__, type(decode).__name__, detail)
    return {True: cheaper, False: decode}
