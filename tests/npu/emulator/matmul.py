# SPDX-License-Identifier: Apache-2.0
"""The grouped matmul of the experts (op-plugin docs: npu_grouped_matmul).

R rows, K in width, N out width, E groups. Plain fp16/bf16/fp32, int8 with scales per channel and token, and int8 or
int4 (packed along N in int32) weights with antiquant scales, which the page takes in ND only.
"""

import torch

from tests.npu.emulator.quant import dtype_of, int8_product, unpack_int4
from tests.npu.emulator.registry import (
    FLOATS,
    HALVES,
    ND,
    is_transposed,
    kernel,
    npu_format,
    poison,
    require,
    require_contiguous,
    require_dtype,
    require_not_empty,
    require_same_dtype,
    require_shape,
)

INNER_LIMIT = 65536
BIAS_DTYPES = {
    torch.float16: torch.float16,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.int8: torch.int32,
}
Tensors = list[torch.Tensor]


def _only(name: str, tensors: Tensors | None) -> torch.Tensor | None:
    require(tensors is None or len(tensors) == 1, f"{name}: one tensor for one weight tensor")
    return None if tensors is None else tensors[0]


def _check_operands(x: torch.Tensor, weight: torch.Tensor) -> None:
    """x [R, K] and weight [E, K, N] (or [K, N]): shapes, strides and dtypes that go together."""
    require_not_empty(x=x, weight=weight)
    require_contiguous(x=x)
    require(x.dim() == 2 and weight.dim() in (2, 3), f"x {list(x.shape)}, weight {list(weight.shape)}")
    require(weight.is_contiguous() or is_transposed(weight), f"weight has strides {weight.stride()}")
    require(x.shape[1] == weight.shape[-2], f"K differs: x {list(x.shape)}, weight {list(weight.shape)}")
    weight_inner = weight.shape[-2] if is_transposed(weight) else weight.shape[-1]
    require(max(x.shape[1], weight_inner) < INNER_LIMIT, f"an inner axis reaches {INNER_LIMIT}")
    if x.dtype in HALVES and weight.dtype in (torch.int8, torch.int32):
        require(npu_format(weight) == ND, "an int weight with antiquant scales is FRACTAL_NZ; only ND is allowed")
        packed_rows = weight.dtype == torch.int32 and is_transposed(weight)
        require(not packed_rows, "an int4 weight packed along N is transposed: its width is not multiplied by 8")
        return
    require_dtype("x", x, (*FLOATS, torch.int8))
    require_same_dtype(x=x, weight=weight)


def bounds(group_list: torch.Tensor, kind: int, groups: int, rows: int, one_count: bool = False) -> list[int]:
    """Where each group ends; `one_count`: whether a single count (kind 1) is allowed."""
    require_dtype("group_list", group_list, (torch.int64,))
    require_shape("group_list", group_list, groups)
    require(kind in (0, 1), f"group_list_type {kind}: 0 (cumulative) or 1 (counts)")
    require(bool((group_list >= 0).all()), "group_list has a negative number")
    if kind == 1:
        require(one_count or groups != 1, "group_list of counts (type 1) must not have length 1")
        ends = group_list.cumsum(0).tolist()
    else:
        ends = group_list.tolist()
        require(ends == sorted(ends), f"group_list {ends} (type 0) is not cumulative")
    require(ends[-1] <= rows, f"group_list sums to {ends[-1]}, x has {rows} rows")
    return ends


def _antiquant(weight: torch.Tensor, scale: torch.Tensor | None, offset: torch.Tensor | None, dtype: torch.dtype):
    """(weight + offset) * scale of [E, K, N], rounded to `dtype`; scales are [E, N] or (int4) [E, K / g, N]."""
    require(scale is not None and offset is not None, "an int weight needs antiquant_scale and antiquant_offset")
    packed = weight.dtype == torch.int32
    weight = unpack_int4(weight) if packed else weight
    for name, tensor in (("antiquant_scale", scale), ("antiquant_offset", offset)):
        require_dtype(name, tensor, (dtype,))
    groups, depth, width = weight.shape
    require_shape("antiquant_offset", offset, *scale.shape)
    if scale.dim() == 3:
        require(packed, "scales per group need an int4 weight")
        fits = (scale.shape[0], scale.shape[2]) == (groups, width) and depth % scale.shape[1] == 0
        require(fits, f"antiquant_scale {list(scale.shape)} for weight {[groups, depth, width]}")
        scale, offset = (tensor.repeat_interleave(depth // tensor.shape[1], 1) for tensor in (scale, offset))
    else:
        require_shape("antiquant_scale", scale, groups, width)
        scale, offset = scale[:, None], offset[:, None]
    wide = weight.float() + offset.float()
    if dtype == torch.float16:  # the golden adds and multiplies in fp16, but in fp32 for bf16
        wide = wide.half().float()
    return (wide * scale.float()).to(dtype)


def _int8_out(x: torch.Tensor, scale: torch.Tensor | None, token_scale: torch.Tensor | None, code: int | None):
    """The output dtype of int8 operands, which the scale's dtype settles."""
    dtype = dtype_of(code, torch.int8)
    if scale is None:
        require(dtype == torch.int32 and token_scale is None, f"int8 without scale gives int32, not {dtype}")
        return dtype
    wanted = {torch.bfloat16: torch.bfloat16, torch.float32: torch.float16}
    require(scale.dtype in wanted, f"scale is {scale.dtype}; the emulator has bfloat16 and float32")
    require(dtype == wanted[scale.dtype], f"scale {scale.dtype} gives {wanted[scale.dtype]}, not {dtype}")
    if token_scale is not None:
        require_dtype("per_token_scale", token_scale, (torch.float32,))
        require_shape("per_token_scale", token_scale, len(x))
    return dtype


def _check_hint(tuning_config: list[int] | None, x: torch.Tensor) -> None:
    """The rows expected of each group, for int8 operands only."""
    if tuning_config:
        require(x.dtype == torch.int8, f"tuning_config {tuning_config} goes with int8, not {x.dtype}")
        require(0 <= tuning_config[0] <= len(x), f"tuning_config {tuning_config}: 0 to the {len(x)} rows")


def _grouped(
    x: torch.Tensor,
    weight: torch.Tensor,
    ends: list[int],
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    token_scale: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Each group's rows of x [R, K] times its weight of [E, K, N]; rows past the last group are undefined."""
    out = poison((len(x), weight.shape[2]), dtype)
    start = 0
    for group, end in enumerate(ends):
        rows = slice(start, end)
        start = end
        if x.dtype == torch.int8:
            part = int8_product(x[rows], weight[group])
        else:
            part = x[rows].float() @ weight[group].float()
        if bias is not None:
            part = part + bias[group]
        if scale is not None:
            part = part.float() * scale[group].float()
        if token_scale is not None:
            part = part * token_scale[rows, None]
        out[rows] = part.to(dtype)
    return out


@kernel("npu_grouped_matmul", nz=("weight",))
def npu_grouped_matmul(
    x: Tensors,
    weight: Tensors,
    bias: Tensors | None,
    scale: Tensors | None,
    antiquant_scale: Tensors | None,
    antiquant_offset: Tensors | None,
    per_token_scale: Tensors | None,
    group_list: torch.Tensor | None,
    split_item: int | None,
    group_type: int | None,
    group_list_type: int | None,
    tuning_config: list[int] | None,
    output_dtype: int | None,
) -> Tensors:
    """[x @ weight[e] for each group's rows], accumulated in fp32 (int8: exactly) and rounded once.

    group_type 0 (split rows): one x, one [E, K, N] weight, split_item 2 or 3, a group_list; -1 (no groups): as many
    2-D weights as x, split_item 0 or 1. tuning_config, a hint, changes nothing.
    """
    require(group_type in (-1, 0), f"group_type {group_type}: 0 (rows) or -1 (none), and it must be given")
    for name, tensors in (("x", x), ("weight", weight)):
        require(0 < len(tensors) <= 128, f"{len(tensors)} tensors in {name}: 1 to 128")
    if group_type == -1:
        return _ungrouped(x, weight, bias, group_list, split_item)
    require(split_item in (2, 3), f"split_item {split_item}: 2 or 3 for group_type 0")
    require(len(x) == 1 and len(weight) == 1, "the emulator has one x and one weight tensor for group_type 0")
    rows, matrix = x[0], weight[0]
    require(matrix.dim() == 3, f"weight {list(matrix.shape)}: [E, K, N]")
    require(len(matrix) <= 1024, f"{len(matrix)} groups: at most 1024")
    require(group_list is not None, "group_type 0 needs group_list")
    _check_operands(rows, matrix)
    _check_hint(tuning_config, rows)
    ends = bounds(group_list, group_list_type, len(matrix), len(rows))
    bias_, scale_, token_scale = _only("bias", bias), _only("scale", scale), _only("per_token_scale", per_token_scale)
    if rows.dtype in HALVES and matrix.dtype in (torch.int8, torch.int32):
        matrix = _antiquant(matrix, _only("scales", antiquant_scale), _only("offsets", antiquant_offset), rows.dtype)
    else:
        require(antiquant_scale is None and antiquant_offset is None, "antiquant scales need an int weight")
    if rows.dtype == torch.int8:
        dtype = _int8_out(rows, scale_, token_scale, output_dtype)
    else:
        dtype = dtype_of(output_dtype, rows.dtype)
        require(dtype == rows.dtype, f"output_dtype {dtype}: {rows.dtype} gives {rows.dtype}")
        require(scale is None and per_token_scale is None, f"scale and per_token_scale go with int8, not {rows.dtype}")
    shape = (len(matrix), matrix.shape[2])
    for name, tensor in (("bias", bias_), ("scale", scale_)):
        if tensor is not None:
            require_shape(name, tensor, *shape)
    if bias_ is not None:
        require_dtype("bias", bias_, (BIAS_DTYPES[rows.dtype],))
    return [_grouped(rows, matrix, ends, bias_, scale_, token_scale, dtype)]


def _ungrouped(
    x: Tensors, weight: Tensors, bias: Tensors | None, group_list: torch.Tensor | None, split_item: int | None
) -> Tensors:
    require(split_item in (0, 1), f"split_item {split_item}: 0 or 1 for group_type -1")
    require(group_list is None, "group_type -1 takes no group_list")
    require(len(x) == len(weight), f"{len(x)} tensors in x, {len(weight)} in weight")
    require(bias is None, "the emulator has no bias for group_type -1")
    for rows, matrix in zip(x, weight, strict=True):
        require(matrix.dim() == 2, f"weight {list(matrix.shape)}: [K, N]")
        _check_operands(rows, matrix)
        require_dtype("x", rows, FLOATS)
        require_same_dtype(x=rows, weight=matrix)
    return [(rows.float() @ matrix.float()).to(rows.dtype) for rows, matrix in zip(x, weight, strict=True)]


@kernel("npu_grouped_matmul.List", nz=("weight",))
def npu_grouped_matmul_list(
    x: Tensors,
    weight: Tensors,
    group_list: list[int] | None,
    split_item: int | None,
    group_type: int | None,
    group_list_type: int | None,
) -> Tensors:
    """As npu_grouped_matmul with one 2-D weight per group and cumulative ends as integers (one x, split_item 2 or 3).

    Without group_list, x and weight have as many tensors and split_item is 0 or 1.
    """
    require(group_type in (None, -1, 0), f"group_type {group_type}: None with a list of integers")
    require(group_list_type in (None, 0), f"group_list_type {group_list_type}: 0 with a list of integers")
    if not group_list:
        return _ungrouped(x, weight, None, None, split_item)
    require(split_item in (2, 3) and len(x) == 1, "the emulator has one x and split_item 2 or 3 for a list")
    require(len(group_list) > 1, "group_list must not have length 1")
    require(len(group_list) == len(weight), f"{len(group_list)} groups, {len(weight)} weights")
    ends = list(group_list)
    require(ends == sorted(ends) and ends[0] >= 0, f"group_list {ends} is not cumulative")
    require(ends[-1] == len(x[0]), f"group_list ends at {ends[-1]}, x has {len(x[0])} rows")
    for matrix in weight:
        require(matrix.dim() == 2, f"weight {list(matrix.shape)}: [K, N]")
        _check_operands(x[0], matrix)
        require_same_dtype(x=x[0], weight=matrix)
    require(len({matrix.shape[1] for matrix in weight}) == 1, "the weights differ in N")
    require_dtype("x", x[0], FLOATS)
    return [_grouped(x[0], torch.stack(weight), ends, None, None, None, x[0].dtype)]
