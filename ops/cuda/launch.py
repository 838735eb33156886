# SPDX-License-Identifier: Apache-2.0
"""How kernels are started: bound once with grid and constants, then launched for about two microseconds each.

Triton's own `kernel[grid](...)` takes twenty to thirty, which is more than most kernels of a decode step run.

Programmatic dependent launch (PDL) lets a kernel start while the one before it still runs. Three rules keep it safe:
1. Every kernel of a decode step waits (`pdl_wait`) before it reads what a kernel wrote and before it writes anything.
   Then whoever has waited knows that everything before the previous kernel is finished, too.
2. Before the wait a kernel may read weights, and what is older than the step: cached keys and values, step metadata.
3. A kernel lets the next one start (`pdl_trigger`) at once, except where that one reads more before its own wait: the
   first kernel of a step (torch has just written the metadata), and gate_up (down reads the router logits early).
   Attention may do so later, for speed.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from ops.cuda.triton_internals import COMPILES_PDL, INTERPRETED, KNOWS_LAUNCHER, argument_names, launcher_of

ALIGNMENT = 16  # bytes; kernels are compiled for pointers that are multiples of it


def has_pdl() -> bool:
    """Whether a kernel can start before the previous one has finished: on Hopper and later, by this Triton."""
    on_gpu = not INTERPRETED and torch.cuda.is_available()
    return on_gpu and COMPILES_PDL and torch.cuda.get_device_capability()[0] >= 9


@triton.jit
def pdl_trigger(PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    if PDL:
        gdc_wait()


class BoundKernel:
    """A kernel with its grid, its constants and those of its arguments that stay the same.

    It is called with the others, tensors and ints, which the kernel takes first; the fixed ones follow, then the
    constants. Tensors of later calls may be other ones, but of the same dtypes and as well aligned.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        num_warps: int,
        pdl: bool = False,
        fixed: tuple[torch.Tensor | TensorDescriptor | int, ...] = (),
        **constants: Any,
    ):
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.options = {} if INTERPRETED else {"num_warps": num_warps, "launch_pdl": pdl}
        self.fixed = fixed
        self.constants = constants
        self.launch: Any = None

    def __call__(self, *varying: torch.Tensor | int) -> None:
        if self.launch is None:
            self.first_call(varying)
            return
        addresses = [
            argument if type(argument) is int else argument.data_ptr()  # type: ignore[union-attr] # isinstance: slower
            for argument in varying
        ]
        self.launch(*self.grid, current_stream(self.device_index), *self.head, *addresses, *self.tail)

    def first_call(self, varying: tuple[torch.Tensor | int, ...]) -> None:
        """Compiles where need be, runs, and keeps what Triton's launcher is to be called with from now on."""
        compiled = self.kernel[self.grid](*varying, *self.fixed, **self.constants, **self.options)
        if INTERPRETED or not KNOWS_LAUNCHER:
            return  # every call is a first call
        launch, self.head = launcher_of(compiled)
        self.device_index = torch.cuda.current_device()
        names = argument_names(self.kernel)[len(varying) + len(self.fixed) :]
        fixed = (argument.data_ptr() if isinstance(argument, torch.Tensor) else argument for argument in self.fixed)
        self.tail = (*fixed, *(self.constants[name] for name in names))
        self.launch = launch


def current_stream(device_index: int) -> int:
    return torch._C._cuda_getCurrentRawStream(device_index)


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def power_of_two_factor(number: int, limit: int) -> int:
    """The largest power of two that divides `number` and is at most `limit`."""
    return math.gcd(number, limit)


def fits(*tensors: torch.Tensor | None) -> bool:
    """Whether kernels can take these tensors: contiguous and aligned."""
    return all(tensor is None or (tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0) for tensor in tensors)
