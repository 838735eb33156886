# SPDX-License-Identifier: Apache-2.0
"""Matrix products of a layer, with and without the norm before them."""

import torch

from ops import Ops, Weight
from ops.comm import Group


class RowLinear:
    """y = x W^T + b, the columns of W split over a group: each rank has its part of x and all get the sum."""

    def __init__(self, weight: Weight, bias: torch.Tensor | None, group: Group, ops: Ops):
        self.weight = weight
        self.bias = bias
        self.group = group
        self.ops = ops

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.group.size == 1:
            return self.ops.linear(hidden_states, self.weight, self.bias)
        partial = self.group.all_reduce(self.ops.linear(hidden_states, self.weight))
        return partial if self.bias is None else partial + self.bias


class NormLinear:
    """Adds the residual, normalises, multiplies; returns the product and the new residual.

    Where the rows of W are split over ranks, each holds its part of the product.
    """

    def __init__(self, norm_weight: torch.Tensor, eps: float, weight: Weight, bias: torch.Tensor | None, ops: Ops):
        self.norm_weight = norm_weight
        self.eps = eps
        self.weight = weight
        self.bias = bias
        self.ops = ops

    def __call__(self, hidden_states: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.ops.norm_linear(hidden_states, residual, self.norm_weight, self.eps, self.weight, self.bias)
