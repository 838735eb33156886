# SPDX-License-Identifier: Apache-2.0
"""Matmul with all-reduce in one operation (op-plugin docs: npu_mm_all_reduce_base)."""

import torch
import torch.distributed as dist

from tests.npu.emulator.communicators import gather, group_of
from tests.npu.emulator.registry import (
    HALVES,
    kernel,
    product,
    require,
    require_contiguous,
    require_dtype,
    require_not_empty,
    require_same_dtype,
    require_shape,
)


@kernel("npu_mm_all_reduce_base", nz=("x2",))
def npu_mm_all_reduce_base(
    x1: torch.Tensor,
    x2: torch.Tensor,
    hcom: str,
    reduce_op: str,
    bias: torch.Tensor | None,
    x3: torch.Tensor | None,
    comm_turn: int,
) -> torch.Tensor:
    """The sum over ranks of x1 @ x2 + bias + x3, each rank's part rounded to x1's dtype before the sum. A2 only."""
    require(product() == "A2", "npu_mm_all_reduce_base: A2 only")
    require_not_empty(x1=x1, x2=x2)
    require_contiguous(x1=x1)
    require_dtype("x1", x1, HALVES)
    require_same_dtype(x1=x1, x2=x2)
    require(x1.dim() in (2, 3) and x2.dim() == 2, f"x1 {list(x1.shape)}, x2 {list(x2.shape)}")
    require(x1.shape[-1] == len(x2), f"x1 {list(x1.shape)} @ x2 {list(x2.shape)}")
    require(reduce_op == "sum", f"reduce_op '{reduce_op}': only sum")
    require(comm_turn == 0, f"comm_turn {comm_turn}: only 0")
    group = group_of(hcom, "matmul")
    ranks = dist.get_world_size(group)
    require(ranks in (1, 2, 4, 8), f"{ranks} ranks: 1, 2, 4 or 8")
    part = x1.float() @ x2.float()
    if bias is not None:
        require_same_dtype(x1=x1, bias=bias)
        require_shape("bias", bias, x2.shape[1])
        part = part + bias.float()
    if x3 is not None:
        require_same_dtype(x1=x1, x3=x3)
        require_shape("x3", x3, *part.shape)
        part = part + x3.float()
    return torch.stack(gather(group, part.to(x1.dtype))).float().sum(0).to(x1.dtype)
