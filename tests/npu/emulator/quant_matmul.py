# SPDX-License-Identifier: Apache-2.0
"""Matmuls of int8 activations and of int8 or int4 weights (op-plugin docs: npu_quant_matmul, ...batchmatmul).

M rows, K in width, N out width.
"""

import torch

from tests.npu.emulator.quant import dtype_of, int8_product, unpack_int4
from tests.npu.emulator.registry import (
    FRACTAL_NZ,
    HALVES,
    is_transposed,
    kernel,
    npu_format,
    require,
    require_contiguous,
    require_dtype,
    require_not_empty,
    require_shape,
)

WIDEST = 65535  # elements of an inner axis
OUTPUTS = {  # output -> dtypes of scale, dtypes of bias
    torch.bfloat16: ((torch.float32, torch.bfloat16), (torch.int32, torch.bfloat16, torch.float32)),
    torch.float16: ((torch.float32,), (torch.int32, torch.float16, torch.float32)),
    torch.int32: ((torch.float32, torch.bfloat16), (torch.int32,)),
}


def _truncated(scale: torch.Tensor) -> torch.Tensor:
    """The highest 19 bits of fp32 scales, as npu_trans_quant_param keeps them."""
    return (scale.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def _check_int8_operands(x1: torch.Tensor, x2: torch.Tensor, scale: torch.Tensor) -> None:
    for name, tensor in (("x1", x1), ("x2", x2)):
        require_dtype(name, tensor, (torch.int8,))
        require(tensor.dim() == 2, f"{name} {list(tensor.shape)}: the emulator has two dimensions")
        require(tensor.shape[-1] <= WIDEST, f"{name} {list(tensor.shape)}: the last axis passes {WIDEST}")
        require(tensor.is_contiguous() or is_transposed(tensor), f"{name} has strides {tensor.stride()}")
    require_not_empty(x1=x1, x2=x2, scale=scale)
    require(x1.shape[1] == len(x2), f"x1 {list(x1.shape)} @ x2 {list(x2.shape)}: K differs")
    if npu_format(x2) == FRACTAL_NZ:
        require_contiguous(x2=x2)
        require(1 not in x2.shape, f"x2 {list(x2.shape)}: FRACTAL_NZ has no axis of size 1")


@kernel("npu_quant_matmul", nz=("x2",))
def npu_quant_matmul(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    pertoken_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    output_dtype: int | None,
) -> torch.Tensor:
    """(x1 @ x2 + int32 bias) * scale[n] * pertoken_scale[m] + float bias, in fp32, rounded to bf16 or fp16.

    x2 may be FRACTAL_NZ. int32 output is the product and its bias alone. fp16 without pertoken_scale keeps 19 bits of
    the scale. int8, the default output, is refused.
    """
    _check_int8_operands(x1, x2, scale)
    width = x2.shape[1]
    dtype = dtype_of(output_dtype, torch.int8)
    require(dtype in OUTPUTS, f"output_dtype {dtype} (the default is int8): bfloat16, float16 or int32")
    scales, biases = OUTPUTS[dtype]
    require_dtype(f"scale of {dtype} output", scale, scales)
    require(scale.dim() == 1 and len(scale) in (1, width), f"scale {list(scale.shape)} for {width} columns")
    if pertoken_scale is not None:
        require(dtype != torch.int32, "int32 output takes no pertoken_scale")
        require_dtype("pertoken_scale", pertoken_scale, (torch.float32,))
        require_shape("pertoken_scale", pertoken_scale, len(x1))
    elif dtype == torch.float16:
        biases, scale = (torch.int32,), _truncated(scale)
    product = int8_product(x1, x2)
    if bias is not None:
        require_dtype(f"bias of {dtype} output", bias, biases)
        require_shape("bias", bias, width)
        if bias.dtype == torch.int32:
            product = product + bias
    if dtype == torch.int32:
        return product.to(torch.int32)
    out = product.float() * scale.float()
    if pertoken_scale is not None:
        out = out * pertoken_scale[:, None]
    if bias is not None and bias.dtype != torch.int32:
        out = out + bias.float()
    return out.to(dtype)


def _whole(name: str, parameter: torch.Tensor, depth: int, width: int, group_size: int) -> torch.Tensor:
    """A parameter of the weight as fp32 that broadcasts to [K, N]: one, per channel, or per group of K."""
    if group_size:
        require_shape(name, parameter, -(-depth // group_size), width)
        return parameter.float().repeat_interleave(group_size, 0)[:depth]
    shape = tuple(parameter.shape)
    require(shape in ((1,), (1, 1), (width,), (1, width)), f"{name} {list(shape)} for {width} columns, no groups")
    return parameter.float().view(1, -1)


def _int_weight(weight: torch.Tensor) -> torch.Tensor:
    """int8 [K, N] of an int8 weight or of an int4 one: int32 [K, N / 8], or transposed [K / 8, N]."""
    require_dtype("weight", weight, (torch.int8, torch.int32))
    require(weight.dim() == 2, f"weight {list(weight.shape)}: two dimensions")
    require(weight.is_contiguous() or is_transposed(weight), f"weight has strides {weight.stride()}")
    if weight.dtype == torch.int8:
        return weight.contiguous()
    return unpack_int4(weight.t()).t().contiguous() if is_transposed(weight) else unpack_int4(weight)


@kernel("npu_weight_quant_batchmatmul")
def npu_weight_quant_batchmatmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    antiquant_scale: torch.Tensor,
    antiquant_offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    antiquant_group_size: int,
    inner_precise: int,
) -> torch.Tensor:
    """x @ ((weight + offset) * scale) + bias: the weight rounded to x's dtype, fp32 sums, rounded once to x's dtype.

    The weight is ND: FRACTAL_NZ runs in torch.compile's graphs only. antiquant_group_size 0: not per group.
    """
    require_dtype("x", x, HALVES)
    require(x.dim() == 2, f"x {list(x.shape)}: two dimensions")
    require(x.is_contiguous() or is_transposed(x), f"x has strides {x.stride()}")
    require_not_empty(x=x, weight=weight, antiquant_scale=antiquant_scale)
    values = _int_weight(weight)
    depth, width = values.shape
    require(x.shape[1] == depth, f"K differs: x {list(x.shape)}, weight [{depth}, {width}]")
    require(max(depth, width) <= WIDEST, f"weight [{depth}, {width}]: an axis passes {WIDEST}")
    size = antiquant_group_size
    fits = size == 0 or (32 <= size < depth and size % 32 == 0)
    require(fits, f"antiquant_group_size {size}: 0, or a multiple of 32 from 32 to K - 1 ({depth - 1})")
    require(inner_precise == 0, f"inner_precise {inner_precise}: 1 is for FRACTAL_NZ weights")
    require_dtype("antiquant_scale", antiquant_scale, (x.dtype,))
    wide = values.float()
    if antiquant_offset is not None:
        require_dtype("antiquant_offset", antiquant_offset, (x.dtype,))
        require_shape("antiquant_offset", antiquant_offset, *antiquant_scale.shape)
        wide = wide + _whole("antiquant_offset", antiquant_offset, depth, width, size)
    if x.dtype == torch.float16:  # the golden adds and multiplies in fp16
        wide = wide.half().float()
    wide = (wide * _whole("antiquant_scale", antiquant_scale, depth, width, size)).to(x.dtype)
    out = x.float() @ wide.float()
    if bias is not None:
        require_dtype("bias", bias, (torch.float16 if x.dtype == torch.float16 else torch.float32,))
        require(tuple(bias.shape) in ((width,), (1, width)), f"bias {list(bias.shape)} for {width} columns")
        require_contiguous(bias=bias)
        out = out + bias.float()
    return out.to(x.dtype)
