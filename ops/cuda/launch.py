# SPDX-License-Identifier: Apache-2.0
"""Kernel launch with low overhead: grid and constants are bound once, each launch then takes about 2 us on the host.

Triton's own `kernel[grid](...)` takes 20 to 30 us, longer than most kernels of a decode step run.

Programmatic dependent launch (PDL) lets a kernel start while the previous one still runs. Three rules make it safe:
1. Every kernel of a decode step calls `pdl_wait` before it reads the output of a kernel and before any write. After its
   wait, all earlier kernels are complete, not only the previous one.
2. Before the wait a kernel may read weights and data from before the step: cached keys and values, step metadata.
3. A kernel calls `pdl_trigger` at its start, or after its own wait where the next kernel reads results of earlier
   kernels before its wait: the first kernel of a step (attention reads metadata that torch has just written) and
   gate_up (down reads the router logits or the plan). Attention may trigger later, for speed.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from ops.cuda.triton_internals import COMPILES_PDL, INTERPRETED, KNOWS_LAUNCHER, argument_names, launcher_of

ALIGNMENT = 16  # bytes; kernels are compiled for pointers of this alignment


def has_pdl() -> bool:
    """Returns whether GPU (Hopper or later) and Triton version support programmatic dependent launch."""
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
    """A kernel bound to its grid, constexprs and fixed arguments.

    Call it with the remaining arguments (tensors and ints), which come first in the kernel's signature; then follow the
    fixed ones, then the constexprs. Tensors may differ between calls, but must keep dtype and alignment.
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
        """Compiles the kernel if needed, runs it, and caches the launcher for later calls."""
        compiled = self.kernel[self.grid](*varying, *self.fixed, **self.constants, **self.options)
        if INTERPRETED or not KNOWS_LAUNCHER:
            return  # no cached launcher: every call takes this path
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
    """Returns the largest power of two that divides `number` and is at most `limit`."""
    return math.gcd(number, limit)


def fits(*tensors: torch.Tensor | None) -> bool:
    """Returns whether all tensors are contiguous and aligned, as the kernels require."""
    return all(tensor is None or (tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0) for tensor in tensors)
