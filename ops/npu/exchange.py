# SPDX-License-Identifier: Apache-2.0
"""Fused MoE dispatch and combine for decode steps: npu_moe_distribute_dispatch_v2 and _combine_v2.

BS rows of every rank, T of them tokens, D hidden size, K experts per token, EL experts per rank, A receive capacity in
rows: BS * ranks * min(EL, K).
"""

import logging
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ops.ascend import Algorithm, ExchangeSizes, buffer_setting
from ops.comm import Group
from ops.npu.calls import npu

logger = logging.getLogger(__name__)

DISPATCH_AND_COMBINE = ("npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2")
BUFFER_VARIABLE = "HCCL_BUFFSIZE"
TRIAL_ERROR = 2**-6  # relative; bfloat16 rounds by up to 2**-9, twice


@dataclass(frozen=True)
class DispatchPlan:
    """Dispatch algorithms, the preferred first, and their sizes; `set_environment` comes before process groups."""

    algorithms: tuple[Algorithm, ...]
    sizes: ExchangeSizes

    def set_environment(self) -> None:
        """Sets HCCL_BUFFSIZE; ValueError if the user's value is too small.

        Every communicator allocates a buffer of that size. A size per process group, set in its options, exists on A3
        only and would override the user's variable.
        """
        setting = buffer_setting(self.algorithms, self.sizes, os.environ.get(BUFFER_VARIABLE))
        need = max(algorithm.buffer_mib(self.sizes) for algorithm in self.algorithms)
        logger.info("%s: %s MB, of which dispatch and combine need %d", BUFFER_VARIABLE, setting, need)
        os.environ[BUFFER_VARIABLE] = setting

    def make(self, group: Group) -> "list[DispatchCombine]":
        """Creates dispatch and combine by each of the algorithms on `group`, which must be reserved for them."""
        return [DispatchCombine(algorithm, self.sizes, group) for algorithm in self.algorithms]


class Sent(NamedTuple):
    """Handle of a dispatch: the outputs and arguments that its combine needs."""

    tokens: int  # of this rank
    is_token: torch.Tensor  # [BS] bool
    expert_ids: torch.Tensor  # [BS, K] int32
    expert_weights: torch.Tensor  # [BS, K] float32
    assist_info: torch.Tensor
    receive_counts: torch.Tensor
    expand_scales: torch.Tensor


class DispatchCombine:
    """Fused dispatch and combine over one communicator, without host syncs.

    All ranks send equally many rows, as not every algorithm and version of CANN takes unequal ones. Rows that are no
    tokens are masked: they reach no expert. global_bs stays 0, which means BS * ranks.
    """

    def __init__(self, algorithm: Algorithm, sizes: ExchangeSizes, group: Group):
        self.name = f"dispatch and combine ({algorithm.name})"
        self.algorithm = algorithm
        self.sizes = sizes
        self.communicator = group.hccl_name
        self.rank = group.index

    def prepare(self, dtype: torch.dtype, device: torch.device) -> None:
        """Allocates padding rows: hidden states [BS, D], expert ids [BS, K] int32, weights [BS, K] float32."""
        count, top_k = self.sizes.tokens, self.sizes.top_k
        self.padding = (
            torch.zeros(count, self.sizes.hidden_size, dtype=dtype, device=device),
            torch.arange(top_k, dtype=torch.int32, device=device).repeat(count, 1),  # an expert twice is not allowed
            torch.zeros(count, top_k, device=device),
        )

    def dispatch(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, is_token: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Sent]:
        """Sends tokens to their experts: [T, D], [T, K], [T, K] -> rows [A, D], tokens_per_expert [EL] int64, handle.

        is_token: [BS] bool; BS is at least T and the same on all ranks. The rows that are tokens come first. A is a
        capacity: rows past the sum of the counts are undefined.
        """
        tokens, missing = hidden_states.shape[0], is_token.shape[0] - hidden_states.shape[0]
        parts = [hidden_states, topk_ids.int(), topk_weights.float()]
        if missing:
            padding = [rows[:missing] for rows in self.padding]
            parts = [torch.cat(pair) for pair in zip(parts, padding, strict=True)] if tokens else padding
        hidden_states, ids, weights = parts
        rows, _, assist_info, counts, receive_counts, _, expand_scales = npu.npu_moe_distribute_dispatch_v2(
            hidden_states,
            ids,
            self.communicator,
            self.sizes.ranks,
            self.rank,
            self.sizes.experts,
            x_active_mask=is_token,
            expert_scales=weights if self.algorithm.takes_scales else None,
            tp_world_size=self.algorithm.tp_world_size,
            shared_expert_num=self.algorithm.shared_expert_num,
            quant_mode=0,
            expert_token_nums_type=1,  # counts
            comm_alg=self.algorithm.name,
        )
        return rows, counts, Sent(tokens, is_token, ids, weights, assist_info, receive_counts, expand_scales)

    def combine(self, output: torch.Tensor, sent: Sent) -> torch.Tensor:
        """Returns expert outputs to the tokens: [A, D] -> weighted sums [T, D], accumulated in float32."""
        sums = npu.npu_moe_distribute_combine_v2(
            output,
            sent.expert_ids,
            sent.assist_info,
            sent.receive_counts,
            sent.expert_weights,
            self.communicator,
            self.sizes.ranks,
            self.rank,
            self.sizes.experts,
            x_active_mask=sent.is_token,
            expand_scales=sent.expand_scales if self.algorithm.takes_scales else None,
            tp_world_size=self.algorithm.tp_world_size,
            shared_expert_num=self.algorithm.shared_expert_num,
            comm_alg=self.algorithm.combine_name,
        )
        return sums[: sent.tokens]

    def works(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether tokens of all ranks, unequally many, come back as they were sent. Collective: all ranks call it."""
        self.prepare(dtype, device)
        try:
            returned, expected = (part.float().cpu() for part in self.round_trip(dtype, device))  # waits for the device
            is_right = torch.allclose(returned, expected, rtol=TRIAL_ERROR)
        except (RuntimeError, AttributeError) as error:
            logger.info("ops: npu lacks %s: %s", self.name, str(error).splitlines()[0])
            return False
        if not is_right:
            logger.info("ops: npu lacks %s: tokens come back changed", self.name)
        return is_right

    def round_trip(self, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Dispatches up to BS tokens, the most of a step, and combines them; returns what came back and was sent."""
        count, top_k, experts = self.sizes.tokens, self.sizes.top_k, self.sizes.experts
        mine = count - self.rank % (count + 1)
        numbers = torch.arange(count)[:, None] + self.rank
        hidden_states = ((numbers + torch.arange(self.sizes.hidden_size)) % 16 + 1).to(device, dtype)
        ids = ((numbers + torch.arange(top_k) * (experts // top_k)) % experts).to(device)
        weights = torch.full((count, top_k), 1 / top_k).to(device)
        is_token = (torch.arange(count) < mine).to(device)
        rows, _, sent = self.dispatch(hidden_states[:mine], ids[:mine], weights[:mine], is_token)
        return self.combine(rows, sent), hidden_states[:mine]
