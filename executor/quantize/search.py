# SPDX-License-Identifier: Apache-2.0
"""Search of channel scales (AWQ, Lin et al. 2023): of several powers of the inputs' magnitudes, and of these relative
to the weights', the one whose rounded weights give the smallest squared error of the output.

Shape letters as in models/qwen3_moe/model.py; T tokens of the calibration text.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from executor.quantize.recipe import Recipe

EXPONENTS = tuple(step / 20 for step in range(1, 21))
MIN_ROWS = 32  # of an expert, for scales of its own
MAX_ROWS = 512  # of an expert, with which the scales of a whole block are compared
SMALLEST = 1e-4  # scale or magnitude, relative to others of about 1


class InputStatistics:
    """Sums over the inputs [T, K] of a linear layer, in float32."""

    def __init__(self, columns: int, device: torch.device):
        self.count = 0
        self.gram = torch.zeros(columns, columns, device=device)  # [K, K], sum of x x^T
        self.magnitudes = torch.zeros(columns, device=device)  # [K], sum of |x|

    def add(self, rows: torch.Tensor) -> "InputStatistics":
        self.count += rows.shape[0]
        self.gram.addmm_(rows.t(), rows)
        self.magnitudes += rows.abs().sum(0)
        return self

    @property
    def mean_magnitudes(self) -> torch.Tensor:
        return self.magnitudes / max(1, self.count)

    @property
    def mean_squares(self) -> torch.Tensor:
        return self.gram.diagonal() / max(1, self.count)

    def energy(self, weight: torch.Tensor) -> torch.Tensor:
        """Sum of the squared outputs of a linear layer [N, K] on these inputs."""
        return ((weight @ self.gram) * weight).sum()


class Found(NamedTuple):
    """Scales [K], and the relative squared errors [2] of the output without and with them."""

    scales: torch.Tensor
    errors: torch.Tensor


class FoundExperts(NamedTuple):
    """Scales of an MoE block: of its input [D], which all experts and the router share, and of down_proj [E, F]."""

    scales: torch.Tensor
    squares: torch.Tensor  # [E, D], mean squares of the inputs of each expert
    errors: torch.Tensor  # [2]
    down_scales: torch.Tensor
    down_squares: torch.Tensor  # [E, F]
    down_errors: torch.Tensor  # [2]


def candidates(magnitudes: torch.Tensor, columns: torch.Tensor) -> list[torch.Tensor]:
    """Scales [K] to try, beginning with ones; columns: `column_magnitudes` of the weights that they multiply."""
    inputs = magnitudes.clamp(min=SMALLEST * float(magnitudes.max()) + 1e-30)
    found = [torch.ones_like(inputs)]
    for exponent in EXPONENTS:
        for scales in (inputs**exponent, inputs**exponent / columns ** (1 - exponent)):
            centred = scales / (scales.max() * scales.min()).sqrt()
            found.append(centred.clamp(SMALLEST, 1 / SMALLEST))
    return found


def column_magnitudes(weight: torch.Tensor) -> torch.Tensor:
    """Mean magnitudes of the columns of [..., N, K], relative to the largest of each row: [K]."""
    largest = weight.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return (weight.abs() / largest).flatten(0, -2).mean(0).clamp(min=SMALLEST)


def search_linear(
    recipe: Recipe, weights: Sequence[torch.Tensor], inputs: InputStatistics, only_ones: bool = False
) -> Found:
    """Searches the scales of linear layers [N, K] with the same inputs; their relative errors count alike.

    only_ones: just computes the error without scales.
    """
    energies = [inputs.energy(weight).clamp(min=1e-30) for weight in weights]
    errors = []
    tried = candidates(inputs.mean_magnitudes, column_magnitudes(torch.cat(list(weights))))
    tried = tried[:1] if only_ones else tried
    for scales in tried:
        changes = (recipe.nearest(weight * scales) / scales - weight for weight in weights)
        relative = [inputs.energy(change) / energy for change, energy in zip(changes, energies, strict=True)]
        errors.append(torch.stack(relative).mean())
    return best(tried, torch.stack(errors))


def best(tried: Sequence[torch.Tensor], errors: torch.Tensor) -> Found:
    """The scales with the smallest error; the first of `tried` are ones."""
    least = int(errors.argmin())
    return Found(tried[least], errors[[0, least]])


def search_experts(
    recipe: Recipe,
    gate_up: torch.Tensor,  # [E, 2F, D]
    down: torch.Tensor,  # [E, D, F]
    rows: torch.Tensor,  # [T, D]
    topk_ids: torch.Tensor,  # [T, K]
    topk_weights: torch.Tensor,  # [T, K]
) -> FoundExperts:
    """Searches the scales of an MoE block on its inputs.

    Those of down_proj are compared by the weighted output of their expert, those of the block's input by the sum over
    the experts. An expert with fewer than MIN_ROWS tokens has ones, and mean squares of all tokens.
    """
    tried = candidates(rows.abs().mean(0), column_magnitudes(gate_up))
    errors, energy, down_energy = (torch.zeros(size, device=rows.device) for size in (len(tried), (), ()))
    squares, down_squares, down_scales = rows.square().mean(0).repeat(len(down), 1), [], []
    down_errors = torch.zeros(2, device=rows.device)
    for expert in range(len(down)):
        tokens, choice = (topk_ids == expert).nonzero(as_tuple=True)
        inputs, weights = rows[tokens], topk_weights[tokens, choice, None].float()
        activated = swiglu(inputs, gate_up[expert])
        reference, found = InputStatistics(down.shape[-1], rows.device).add(activated * weights), None
        if len(tokens) >= MIN_ROWS:
            squares[expert] = inputs.square().mean(0)
            found = search_linear(recipe, [down[expert]], reference)
            down_errors += found.errors * reference.energy(down[expert])
        down_scales.append(torch.ones_like(reference.magnitudes) if found is None else found.scales)
        down_squares.append(torch.ones_like(reference.magnitudes) if found is None else reference.mean_squares)
        down_energy += reference.energy(down[expert])
        part = slice(0, MAX_ROWS)
        energy += F.linear(activated[part] * weights[part], down[expert]).square().sum()
        for index, scales in enumerate(tried):
            changed = swiglu(inputs[part], recipe.nearest(gate_up[expert] * scales) / scales) - activated[part]
            errors[index] += F.linear(changed * weights[part], down[expert]).square().sum()
    chosen = best(tried, errors / energy.clamp(min=1e-30))
    return FoundExperts(
        scales=chosen.scales,
        squares=squares,
        errors=chosen.errors,
        down_scales=torch.stack(down_scales),
        down_squares=torch.stack(down_squares),
        down_errors=down_errors / down_energy.clamp(min=1e-30),
    )


def swiglu(inputs: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """SiLU(gate) * up: [T, D] x [2F, D] transposed -> [T, F]."""
    gate, up = F.linear(inputs, gate_up).chunk(2, dim=-1)
    return F.silu(gate) * up
