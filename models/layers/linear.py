# SPDX-License-Identifier: Apache-2.0
"""Matrix products of a layer, with and without the norm before them."""

import torch

from ops import Ops, Weight


class Linear:
    """y = x W^T + b."""

    def __init__(self, weight: Weight, bias: torch.Tensor | None, ops: Ops):
        self.weight = weight
        self.bias = bias
        self.ops = ops

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.ops.linear(hidden_states, self.weight, self.bias)


class NormLinear:
    """Adds the residual, normalises, multiplies; returns the product and the new residual."""

    def __init__(self, norm_weight: torch.Tensor, eps: float, weight: Weight, bias: torch.Tensor | None, ops: Ops):
        self.norm_weight = norm_weight
        self.eps = eps
        self.weight = weight
        self.bias = bias
        self.ops = ops

    def __call__(self, hidden_states: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.ops.norm_linear(hidden_states, residual, self.norm_weight, self.eps, self.weight, self.bias)
