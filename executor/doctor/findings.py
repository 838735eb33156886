# SPDX-License-Identifier: Apache-2.0
"""Results of comparing operations with the reference, their error metric, and the context of the comparisons."""

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from executor.doctor.inputs import Inputs, Pair, Shapes
from ops.reference import ReferenceOps

if TYPE_CHECKING:
    from ops.npu import NpuOps

EPS = 1e-6
ROUNDED_ONCE, ROUNDED_OFTEN = 0.01, 0.02  # limits of the relative error; bfloat16 rounds by up to 0.4 %
TOKENS = (1, 8, 300)


@dataclasses.dataclass(frozen=True)
class Finding:
    """Result of one comparison. `error` is None if it failed, and `problem` says why.

    Where `relied_on` is False, a failure or difference does not fail the doctor.
    """

    operation: str  # of ops.Ops
    variant: str  # vendor operation under test
    case: str
    error: float | None
    limit: float
    problem: str = ""
    relied_on: bool = True
    time_ms: float | None = None  # of one call, where it was measured

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

    @property
    def severity(self) -> float:
        """Sort key of the worst finding: the error, infinite where the comparison failed."""
        return math.inf if self.error is None else self.error


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest relative L2 error of any row, so that one wrong row of many shows. ValueError if the shapes differ.

    Norms of the expected rows are clamped to at least 1 % of their mean.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"the result is {list(actual.shape)}, not {list(expected.shape)}")
    if not expected.numel():
        return 0.0
    lengths = expected.norm(dim=-1)
    differences = (actual.to("cpu", torch.float32) - expected).norm(dim=-1)
    errors = differences / lengths.clamp(min=max(0.01 * float(lengths.mean()), 1e-20))
    return float(errors.nan_to_num(nan=torch.inf).max())


class Context:
    """Backend, reference and inputs of the comparisons at one shape. The reference runs in float32 on the CPU."""

    def __init__(self, ops: "NpuOps", device: torch.device, shapes: Shapes):
        self.ops = ops
        self.reference = ReferenceOps()
        self.shapes = shapes
        self.inputs = Inputs(device, shapes)

    def compare(
        self, operation: str, variant: str, case: str, run: Callable[[], Pair], limit: float, relied_on: bool = True
    ) -> Finding:
        """Calls `run`, which returns (actual, expected), and reports its error; an exception becomes a finding."""
        error, problem = None, ""
        try:
            error = relative_error(*run())
        except Exception as raised:  # the other comparisons still have to run
            problem = f"{type(raised).__name__}: {first_line(raised)}"
        return Finding(operation, variant, f"{self.shapes.name}, {case}", error, limit, problem, relied_on)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
