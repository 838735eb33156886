# SPDX-License-Identifier: Apache-2.0
"""What a model says of its parameters (name, shape, where in the checkpoint they come from), and how it gets them."""

from dataclasses import dataclass
from enum import Enum

import torch

from ops import Ops, Weight


class Role(Enum):
    """What a parameter is for: decides its random initial values and whether it may have a number format of its own."""

    MATRIX = "matrix"  # multiplied with activations: handed to the model as a Weight
    TABLE = "table"  # embedding and router: plain tensors
    NORM = "norm"
    BIAS = "bias"


@dataclass(frozen=True)
class Source:
    """One tensor of the checkpoint, the part of it that this rank reads, and the region of a parameter it fills."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    part: tuple[slice, ...]
    region: tuple[int | slice, ...]


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of the model; its sources fill it completely, and so do those of `stacked`, where it has any:
    the same values in a checkpoint that holds all experts' matrices in one tensor."""

    name: str
    shape: tuple[int, ...]
    role: Role
    sources: tuple[Source, ...]
    stacked: tuple[Source, ...] = ()


class Parameters:
    """Loaded parameters by name; `within` narrows the view to a part of the model."""

    def __init__(self, values: dict[str, torch.Tensor | Weight], prefix: str = ""):
        self.values = values
        self.prefix = prefix

    def __getitem__(self, name: str) -> torch.Tensor | Weight:
        return self.values[self.prefix + name]

    def prepare(self, ops: Ops) -> None:
        """Brings the weights into the form `ops` wants, one after the other: memory holds only one of them twice."""
        for name, value in self.values.items():
            if not isinstance(value, torch.Tensor):
                self.values[name] = ops.prepare_weight(value)

    def within(self, part: str) -> "Parameters":
        return Parameters(self.values, f"{self.prefix}{part}.")
