# SPDX-License-Identifier: Apache-2.0
"""Storage formats (op-plugin docs: npu_format_cast, get_npu_format).

A FRACTAL_NZ tensor keeps its logical values here; what its tiled storage forbids (a slice of it, an operation that
takes ND only) is refused by the operations.
"""

import warnings

import torch

from tests.npu.emulator.registry import (
    FRACTAL_NZ,
    ND,
    kernel,
    mark_nz,
    npu_format,
    require,
    require_contiguous,
    require_dtype,
)
from tests.npu.emulator.stand_in import CONFIG

NZ_DTYPES = (torch.float16, torch.bfloat16, torch.int8, torch.int32)


@kernel("npu_format_cast", "_npu_format_cast", nz=("input",))
def npu_format_cast(input: torch.Tensor, acl_format: int) -> torch.Tensor:
    """A copy in the wanted format: 2 (ND) or 29 (FRACTAL_NZ, for a contiguous tensor of two or more dimensions).

    While torch.npu.config.allow_internal_format is False, 29 warns and gives ND, as on A2 and A3.
    """
    require(acl_format in (ND, FRACTAL_NZ), f"acl_format {acl_format}: allowed are {ND} (ND), {FRACTAL_NZ} (NZ)")
    if acl_format == FRACTAL_NZ:
        require(input.dim() >= 2, f"a tensor of shape {list(input.shape)} has no FRACTAL_NZ form")
        require_dtype("input", input, NZ_DTYPES)
        require_contiguous(input=input)
    result = input.clone(memory_format=torch.contiguous_format)
    if acl_format == FRACTAL_NZ and not CONFIG.allow_internal_format:
        warnings.warn("allow_internal_format is False: the tensor stays ND", stacklevel=2)
    elif acl_format == FRACTAL_NZ:
        mark_nz(result)
    return result


@kernel("npu_format_cast_.acl_format", nz=("input",))
def npu_format_cast_(input: torch.Tensor, acl_format: int) -> torch.Tensor:
    """As npu_format_cast, on the tensor itself."""
    require(acl_format == FRACTAL_NZ, f"in place only to {FRACTAL_NZ} (FRACTAL_NZ), not {acl_format}")
    require(input.dim() >= 2 and input.dtype in NZ_DTYPES, f"{input.dtype} {list(input.shape)} has no NZ form")
    require_contiguous(input=input)
    if CONFIG.allow_internal_format:
        mark_nz(input)
    return input


@kernel("get_npu_format", nz=("input",))
def get_npu_format(input: torch.Tensor) -> int:
    return npu_format(input)
