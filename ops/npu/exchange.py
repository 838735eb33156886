# SPDX-License-Identifier: Apache-2.0
"""Fused MoE dispatch and combine for decode steps: npu_moe_distribute_dispatch_v2 and _combine_v2.

BS tokens of this rank, D hidden size, K experts per token, EL experts per rank, A receive capacity in rows.
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


@dataclass(frozen=True)
class DispatchPlan:
    """Selected dispatch algorithm and its sizes; call `set_environment` before process groups are created."""

    algorithm: Algorithm
    sizes: ExchangeSizes

    def set_environment(self) -> None:
        """Sets HCCL_BUFFSIZE; ValueError if the user's value is too small.

        Every communicator allocates a buffer of that size. A size per process group, set in its options, exists on A3
        only and would override the user's variable.
        """
        setting = buffer_setting(self.algorithm, self.sizes, os.environ.get(BUFFER_VARIABLE))
        need = self.algorithm.buffer_mib(self.sizes)
        logger.info("%s: %s MB, of which dispatch and combine need %d", BUFFER_VARIABLE, setting, need)
        os.environ[BUFFER_VARIABLE] = setting

    def make(self, group: Group) -> "DispatchCombine":
        """Creates dispatch and combine on `group`, which must be reserved for them."""
        return DispatchCombine(self.algorithm, self.sizes, group)


class Sent(NamedTuple):
    """Handle of a dispatch: the outputs and arguments that its combine needs."""

    tokens: int  # of this rank; 0 if it sent only the padding token
    max_tokens: int
    expert_ids: torch.Tensor  # [BS, K] int32
    expert_weights: torch.Tensor  # [BS, K] float32
    assist_info: torch.Tensor
    receive_counts: torch.Tensor
    expand_scales: torch.Tensor


class DispatchCombine:
    """Fused dispatch and combine over one communicator, without host syncs.

    Ranks may have different numbers of tokens, but at least one: an idle rank sends one padding token of zeros.
    """

    def __init__(self, algorithm: Algorithm, sizes: ExchangeSizes, group: Group):
        self.name = f"dispatch and combine ({algorithm.name})"
        self.algorithm = algorithm
        self.sizes = sizes
        self.communicator = group.hccl_name
        self.rank = group.index

    def dispatch(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, max_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor, Sent]:
        """Sends tokens to their experts: [T, D], [T, K], [T, K] -> rows [A, D], tokens_per_expert [EL] int64, handle.

        max_tokens: the largest T of any rank. A is a capacity: rows past the sum of the counts are undefined.
        """
        tokens, max_tokens = hidden_states.shape[0], max(1, max_tokens)
        ids, weights = topk_ids.int(), topk_weights.float()
        if tokens == 0:
            hidden_states = hidden_states.new_zeros(1, hidden_states.shape[1])
            ids = torch.arange(ids.shape[1], dtype=torch.int32, device=ids.device)[None]
            weights = weights.new_zeros(1, weights.shape[1])
        rows, _, assist_info, counts, receive_counts, _, expand_scales = npu.npu_moe_distribute_dispatch_v2(
            hidden_states,
            ids,
            self.communicator,
            self.sizes.ranks,
            self.rank,
            self.sizes.experts,
            expert_scales=weights if self.algorithm.takes_scales else None,
            shared_expert_num=self.algorithm.shared_expert_num,
            quant_mode=0,
            global_bs=max_tokens * self.sizes.ranks,  # token counts may differ between ranks
            expert_token_nums_type=1,  # counts
            comm_alg=self.algorithm.name,
        )
        return rows, counts, Sent(tokens, max_tokens, ids, weights, assist_info, receive_counts, expand_scales)

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
            expand_scales=sent.expand_scales if self.algorithm.takes_scales else None,
            shared_expert_num=self.algorithm.shared_expert_num,
            global_bs=sent.max_tokens * self.sizes.ranks,
            comm_alg=self.algorithm.combine_name,
        )
        return sums if sent.tokens else sums[:0]

    def works(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Probes dispatch and combine with an empty step. Collective: all ranks must call it."""
        nothing = torch.empty(0, self.sizes.hidden_size, dtype=dtype, device=device)
        choices = torch.empty(0, self.sizes.top_k, device=device)
        try:
            rows, _, sent = self.dispatch(nothing, choices, choices, 0)
            self.combine(torch.zeros_like(rows), sent)
            if device.type == "npu":
                torch.npu.synchronize()  # launch errors are asynchronous
        except (RuntimeError, AttributeError) as error:
            logger.info("ops: npu lacks %s: %s", self.name, str(error).splitlines()[0])
            return False
        return True
