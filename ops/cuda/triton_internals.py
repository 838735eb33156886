# SPDX-License-Identifier: Apache-2.0
"""What is relied on of Triton beside its documented interface, each with why; no other file knows of it.

Where a version of Triton differs, kernels are launched by Triton's own slower `kernel[grid](...)`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import triton

# Triton's settings are not documented, but nothing else tells whether `triton.jit` has made interpreted kernels.
INTERPRETED = triton.knobs.runtime.interpret
KNOWS_LAUNCHER = triton.__version__.startswith("3.6.")  # whose launcher takes the arguments that are given it here
IS_TRITON_3_4 = triton.__version__.startswith("3.4.")
COMPILES_PDL = not IS_TRITON_3_4  # whose functions for it take an argument it does not pass
COMPILES_NARROW_DOT = not IS_TRITON_3_4  # which wants at least 16 columns


class Launcher(NamedTuple):
    """How a compiled kernel is started without Triton's Python: `launch(*grid, stream, *head, *arguments)`.

    The arguments are those of the kernel, tensors as addresses, constants included.
    """

    launch: Callable[..., None]
    head: tuple[Any, ...]


def launcher_of(compiled: Any) -> Launcher:
    """The launcher of what `kernel[grid](...)` returns: calling it saves the twenty microseconds around it."""
    run = compiled.run
    assert not run.global_scratch_size and not run.profile_scratch_size, "the launcher would have to allocate"
    # neither scratch memory nor a profiler's hooks
    head = (
        *(compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None),
        *(compiled.packed_metadata, None, None, None),
    )
    return Launcher(run.launch, head)


def argument_names(kernel: Any) -> list[str]:
    """Of a `triton.jit` function, in order: the launcher takes constants by their place, not by name."""
    return kernel.arg_names
