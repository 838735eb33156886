# SPDX-License-Identifier: Apache-2.0
"""Tensor-parallel linear layers: row-parallel with all-reduce, and column-parallel with the preceding norm."""

import torch

from models.layers.padding import pad_rows, share_of
from ops import Ops, StepMetadata, Weight
from ops.comm import Group


class RowLinear:
    """Row-parallel y = x W^T + b: the input dimension is sharded over a group, and partial sums are all-reduced.

    In a sequence-parallel step the partial sums are reduce-scattered over the tokens.
    """

    def __init__(self, weight: Weight, bias: torch.Tensor | None, group: Group, ops: Ops):
        self.weight = weight.with_columns_over(group)
        self.bias = bias
        self.group = group
        self.ops = ops

    def __call__(self, hidden_states: torch.Tensor, step: StepMetadata) -> torch.Tensor:
        if self.group.size == 1:
            return self.ops.linear(hidden_states, self.weight, self.bias)
        if step.sequence_parallel:
            share = share_of(step.num_tokens, self.group.size)
            partial = self.ops.linear(hidden_states, self.weight)
            output = self.group.reduce_scatter(pad_rows(partial, share * self.group.size))
        else:
            output = self.group.all_reduce(self.ops.linear(hidden_states, self.weight))
        return output if self.bias is None else output + self.bias


class NormLinear:
    """Column-parallel linear, fused with the preceding residual add and RMSNorm; returns output and new residual.

    The output dimension of W is sharded over `group`. In a sequence-parallel step the input tokens are sharded, and
    all-gathered between norm and matmul.
    """

    def __init__(
        self,
        norm_weight: torch.Tensor,
        eps: float,
        weight: Weight,
        bias: torch.Tensor | None,
        group: Group,
        ops: Ops,
    ):
        self.norm_weight = norm_weight
        self.eps = eps
        self.weight = weight
        self.bias = bias
        self.group = group
        self.ops = ops

    def __call__(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None, step: StepMetadata
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if step.sequence_parallel:
            normed, residual = self.ops.add_norm(hidden_states, residual, self.norm_weight, self.eps)
            normed = self.group.all_gather(normed)[: step.num_tokens]
            return self.ops.linear(normed, self.weight, self.bias), residual
        return self.ops.norm_linear(hidden_states, residual, self.norm_weight, self.eps, self.weight, self.bias)
