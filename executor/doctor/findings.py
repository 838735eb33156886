# SPDX-License-Identifier: Apache-2.0
"""What a comparison of a backend's operation with the reference found, and what the comparisons share."""

import dataclasses
from collections.abc import Callable

import torch

from executor.doctor.inputs import Inputs, Pair, Shapes
from ops import Ops
from ops.reference import ReferenceOps

EPS = 1e-6
ROUNDED_ONCE, ROUNDED_OFTEN = 0.01, 0.02  # limits of the error; bfloat16 rounds a number by up to 0.004 of it
TOKENS = (1, 8, 300)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One comparison. Without an error, `problem` says what happened. What is not relied on is no fault."""

    operation: str  # of ops.Ops
    variant: str  # the vendor's operation that this is about
    case: str
    error: float | None
    limit: float
    problem: str = ""
    relied_on: bool = True

    @property
    def verdict(self) -> str:
        if self.error is None:
            return "FAILS" if self.relied_on else "not usable"
        if self.error <= self.limit:
            return "ok"
        return "DIFFERS" if self.relied_on else "differs"

    @property
    def fine(self) -> bool:
        return self.verdict == "ok" or not self.relied_on


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected| of the worst row, so that one wrong row of many is seen.

    Rows far smaller than the others count as if they had a hundredth of the mean length.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"the result is {list(actual.shape)}, not {list(expected.shape)}")
    lengths = expected.norm(dim=-1)
    differences = (actual.to("cpu", torch.float32) - expected).norm(dim=-1)
    errors = differences / lengths.clamp(min=max(0.01 * float(lengths.mean()), 1e-20))
    return float(errors.nan_to_num(nan=torch.inf).max())


class Context:
    """The two sides of the comparisons at one shape. The reference computes in float32 on the CPU."""

    def __init__(self, ops: Ops, device: torch.device, shapes: Shapes):
        self.ops = ops
        self.reference = ReferenceOps()
        self.shapes = shapes
        self.inputs = Inputs(device, shapes)

    def compare(
        self, operation: str, variant: str, case: str, run: Callable[[], Pair], limit: float, relied_on: bool = True
    ) -> Finding:
        """`run` gives what the backend computed and what is right."""
        error, problem = None, ""
        try:
            error = relative_error(*run())
        except Exception as raised:  # whatever it is, the other comparisons are wanted all the same
            problem = f"{type(raised).__name__}: {first_line(raised)}"
        return Finding(operation, variant, f"{self.shapes.name}, {case}", error, limit, problem, relied_on)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
