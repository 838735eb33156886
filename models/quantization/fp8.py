# SPDX-License-Identifier: Apache-2.0
"""float8 weights in blocks, as Qwen publishes them: e4m3, `weight_scale_inv` holds the factor of each block."""

import torch

from models.quantization.format import SCALE_DTYPES, Component, Format
from ops.weight import Fp8Weight


def fp8_blocks(module: str, shape: tuple[int, ...], block: tuple[int, int], is_scalar: bool) -> Format:
    """FP8 weight [N, K] with weight_scale_inv [ceil(N / rows), ceil(K / columns)].

    is_scalar: transformers stores a scalar for a matrix that is no larger than a block.
    """
    name, dtypes = f"{module}.weight_scale_inv", SCALE_DTYPES
    span = min(block[0], shape[0]), min(block[1], shape[1])
    scales = Component(name=name, field="scales", dtypes=dtypes, span=span)
    if is_scalar:
        scales = Component(name=name, field="scales", dtypes=dtypes, axes=(), span=(), decode=as_matrix)
    components = (
        Component(name=f"{module}.weight", field="data", dtypes=("F8_E4M3",), unit=(1, 1), dtype=torch.float8_e4m3fn),
        scales,
    )
    return Format(name=f"FP8, blocks of {block[0]} x {block[1]}", weight=Fp8Weight, components=components)


def as_matrix(scalar: torch.Tensor) -> torch.Tensor:
    return scalar.view(1, 1)
