# SPDX-License-Identifier: Apache-2.0
"""Adapter for undocumented parts of Triton; no other file uses them.

With Triton versions that differ, kernels are launched by Triton's own slower `kernel[grid](...)`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import triton

# Undocumented, but the only way to tell whether `triton.jit` returns interpreted kernels.
INTERPRETED = triton.knobs.runtime.interpret
KNOWS_LAUNCHER = triton.__version__.startswith("3.6.")  # versions whose launcher has the signature used here
IS_TRITON_3_4 = triton.__version__.startswith("3.4.")
COMPILES_PDL = not IS_TRITON_3_4  # 3.4: PDL functions take an argument that it does not pass
COMPILES_NARROW_DOT = not IS_TRITON_3_4  # 3.4: tl.dot needs at least 16 columns


class Launcher(NamedTuple):
    """Launches a compiled kernel without Triton's Python overhead: `launch(*grid, stream, *head, *arguments)`.

    The arguments are those of the kernel including constexprs, with tensors as addresses.
    """

    launch: Callable[..., None]
    head: tuple[Any, ...]


def launcher_of(compiled: Any) -> Launcher:
    """Returns the launcher of a compiled kernel (the result of `kernel[grid](...)`); saves about 20 us per launch."""
    run = compiled.run
    assert not run.global_scratch_size and not run.profile_scratch_size, "the launcher would have to allocate"
    # no scratch memory, no profiler hooks
    head = (
        *(compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None),
        *(compiled.packed_metadata, None, None, None),
    )
    return Launcher(run.launch, head)


def argument_names(kernel: Any) -> list[str]:
    """Argument names of a `triton.jit` function, in order; the launcher takes constexprs by position."""
    return kernel.arg_names
