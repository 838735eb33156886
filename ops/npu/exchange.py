# SPDX-License-Identifier: Apache-2.0
"""Tokens to their experts and back by npu_moe_distribute_dispatch_v2 and _combine_v2, for decode steps.

BS tokens of this rank, D hidden size, K experts a token, EL experts of a rank, A rows that a rank has room for.
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
    """An algorithm that takes these sizes; what it needs is to be there before the ranks meet."""

    algorithm: Algorithm
    sizes: ExchangeSizes

    def set_environment(self) -> None:
        """Sets HCCL_BUFFSIZE; ValueError where the user's is too small.

        Every communicator gets a buffer of that size. A size for one group alone, in the options of its process group,
        exists on A3 only and would hide from the user's variable.
        """
        setting = buffer_setting(self.algorithm, self.sizes, os.environ.get(BUFFER_VARIABLE))
        need = self.algorithm.buffer_mib(self.sizes)
        logger.info("%s: %s MB, of which dispatch and combine need %d", BUFFER_VARIABLE, setting, need)
        os.environ[BUFFER_VARIABLE] = setting

    def make(self, group: Group) -> "DispatchCombine":
        """The pair over a group that nothing else may use."""
        return DispatchCombine(self.algorithm, self.sizes, group)


class Sent(NamedTuple):
    """What combine wants of its dispatch, to be handed on as it is."""

    tokens: int  # of this rank, without a padding one
    max_tokens: int
    expert_ids: torch.Tensor  # [BS, K] int32
    expert_weights: torch.Tensor  # [BS, K] float32
    assist_info: torch.Tensor
    receive_counts: torch.Tensor
    expand_scales: torch.Tensor


class DispatchCombine:
    """The pair bound to an algorithm and a communicator. The host reads nothing back.

    Ranks may have different numbers of tokens but none may have no token: an idle one sends a token of zeros.
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
        """[T, D], [T, K], [T, K] -> rows [A, D], tokens_per_expert [EL] int64, what combine wants.

        max_tokens: the largest T of any rank. A is a capacity: rows beyond the sum of the counts are undefined.
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
            global_bs=max_tokens * self.sizes.ranks,  # ranks may differ
            expert_token_nums_type=1,  # counts
            comm_alg=self.algorithm.name,
        )
        return rows, counts, Sent(tokens, max_tokens, ids, weights, assist_info, receive_counts, expand_scales)

    def combine(self, output: torch.Tensor, sent: Sent) -> torch.Tensor:
        """[A, D] -> the sums [T, D], weighted in float32."""
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
        """Whether a step in which every rank is idle goes through; all ranks ask at the same time."""
        nothing = torch.empty(0, self.sizes.hidden_size, dtype=dtype, device=device)
        choices = torch.empty(0, self.sizes.top_k, device=device)
        try:
            rows, _, sent = self.dispatch(nothing, choices, choices, 0)
            self.combine(torch.zeros_like(rows), sent)
            if device.type == "npu":
                torch.npu.synchronize()  # launches fail late
        except (RuntimeError, AttributeError) as error:
            logger.info("ops: npu lacks %s: %s", self.name, str(error).splitlines()[0])
            return False
        return True
