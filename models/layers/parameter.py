# SPDX-License-Identifier: Apache-2.0
"""Specifications of a model's parameters (name, shape, checkpoint tensors), and access to the loaded ones."""

from dataclasses import dataclass
from enum import Enum

import torch

from ops import Ops, Weight


class Role(Enum):
    """Kind of parameter: determines its random initialisation and whether it may be quantised."""

    MATRIX = "matrix"  # matmul weight, wrapped in a Weight
    TABLE = "table"  # embedding and router weights: plain tensors
    NORM = "norm"
    BIAS = "bias"


@dataclass(frozen=True)
class Source:
    """A checkpoint tensor, the slice of it that this rank reads, and the region of the parameter that it fills."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    part: tuple[slice, ...]
    region: tuple[int | slice, ...]


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter of the model and the checkpoint tensors that fill it: `sources`, or `stacked` (if any) in a
    checkpoint that stacks all experts of a layer in one tensor."""

    name: str
    shape: tuple[int, ...]
    role: Role
    sources: tuple[Source, ...]
    stacked: tuple[Source, ...] = ()


class Parameters:
    """Loaded parameters by name; `within` returns a view of a submodule."""

    def __init__(self, values: dict[str, torch.Tensor | Weight], prefix: str = ""):
        self.values = values
        self.prefix = prefix

    def __getitem__(self, name: str) -> torch.Tensor | Weight:
        return self.values[self.prefix + name]

    def prepare(self, ops: Ops, dtype: torch.dtype) -> None:
        """Converts the weights to the layout of backend `ops`, one at a time to limit peak memory."""
        for name, value in self.values.items():
            if not isinstance(value, torch.Tensor):
                self.values[name] = ops.prepare_weight(value, dtype)

    def formats(self) -> list[str]:
        """Names of the number formats of the weights."""
        return sorted({value.format_name for value in self.values.values() if isinstance(value, Weight)})

    def within(self, part: str) -> "Parameters":
        return Parameters(self.values, f"{self.prefix}{part}.")
