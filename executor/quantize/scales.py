# SPDX-License-Identifier: Apache-2.0
"""Channel scales of a layer (AWQ, Lin et al. 2023), folded into the weights around them.

The inputs of a linear layer are divided by the scales and the columns of its weight multiplied by them: the layer
computes the same, and columns with large scales are rounded more finely. What divides the inputs is the weight of the
norm before, or the rows of the linear layer before. Shape letters as in models/qwen3_moe/model.py.
"""

import re
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

LAYER_TENSOR = re.compile(r"model\.layers\.(\d+)\.(?:self_attn\.|mlp\.)?(?:experts\.(\d+)\.)?(\w+)\.(weight|bias)")


@dataclass(frozen=True, kw_only=True)
class LayerScales:
    """Scales of the inputs of a layer's linear layers, all float32, and mean squares of these inputs, unscaled.

    A dense feed-forward block counts as one expert.
    """

    attention: torch.Tensor  # [D], of q_proj, k_proj and v_proj
    output: torch.Tensor  # [H * C], of o_proj; ones under grouped-query attention
    value: torch.Tensor  # [G * C], the same for the rows of v_proj
    feed_forward: torch.Tensor  # [D], of gate_proj and up_proj of all experts, and the router
    down: torch.Tensor  # [E, F], of down_proj
    attention_squares: torch.Tensor  # [D]
    output_squares: torch.Tensor  # [H * C]
    feed_forward_squares: torch.Tensor  # [E, D]
    down_squares: torch.Tensor  # [E, F]
    errors: torch.Tensor  # [4, 2], of each group of scales: relative squared error of its output without, and with them

    def tensors(self) -> dict[str, torch.Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


class Folding(NamedTuple):
    """What multiplies the columns of a tensor and divides its rows, and the mean squares of its scaled inputs [K]."""

    columns: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    importance: torch.Tensor | None = None

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Scales a tensor [N, K], or [N], in float32."""
        tensor = tensor.float()
        if self.columns is not None:
            tensor = tensor * self.columns
        if self.rows is not None:
            tensor = tensor / (self.rows if tensor.dim() == 1 else self.rows[:, None])
        return tensor


def folding_of(name: str, scales: LayerScales) -> Folding | None:
    """How the scales of its layer change the tensor `name`; None: not at all."""
    found = LAYER_TENSOR.fullmatch(name)
    if found is None:
        return None
    expert = int(found[2] or 0)
    attention, down, feed_forward = scales.attention, scales.down[expert], scales.feed_forward
    match found[3], found[4]:
        case "input_layernorm", "weight":
            return Folding(rows=attention)
        case "q_proj" | "k_proj", "weight":
            return Folding(attention, importance=scales.attention_squares / attention**2)
        case "v_proj", "weight":
            return Folding(attention, scales.value, scales.attention_squares / attention**2)
        case "v_proj", "bias":
            return Folding(rows=scales.value)
        case "o_proj", "weight":
            return Folding(scales.output, importance=scales.output_squares / scales.output**2)
        case "post_attention_layernorm", "weight":
            return Folding(rows=feed_forward)
        case "gate", "weight":
            return Folding(feed_forward)
        case "gate_proj", "weight":
            return Folding(feed_forward, importance=scales.feed_forward_squares[expert] / feed_forward**2)
        case "up_proj", "weight":
            return Folding(feed_forward, down, scales.feed_forward_squares[expert] / feed_forward**2)
        case "down_proj", "weight":
            return Folding(down, importance=scales.down_squares[expert] / down**2)
    return None


def layer_of(name: str) -> int | None:
    """The number of the layer that has a tensor; None for embedding, last norm and lm_head."""
    found = LAYER_TENSOR.fullmatch(name)
    return None if found is None else int(found[1])
