# SPDX-License-Identifier: Apache-2.0
"""Dynamic int8 quantisation and the int8 matmul (op-plugin docs: npu_dynamic_quant, npu_quant_matmul)."""

import torch

from tests.npu.emulator.registry import (
    HALVES,
    kernel,
    require,
    require_dtype,
    require_shape,
)

# the values that torch passes where a schema takes a dtype as an int
DTYPES = {1: torch.int8, 3: torch.int32, 5: torch.float16, 6: torch.float32, 15: torch.bfloat16}


def dtype_of(code: int | torch.dtype | None, default: torch.dtype) -> torch.dtype:
    """The dtype that an `int?` or `ScalarType?` argument names; ValueError for one no emulated operation gives."""
    if code is None or isinstance(code, torch.dtype):
        return code or default
    require(code in DTYPES, f"dtype {code}: allowed are {DTYPES}")
    return DTYPES[code]


def int8_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The exact int32 product of int8 matrices, as float64."""
    return x.double() @ weight.double()


@kernel("npu_dynamic_quant")
def npu_dynamic_quant(
    input: torch.Tensor, smooth_scales: torch.Tensor | None, dst_type: int | None, quant_mode: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(round(x * smooth / scale) int8, scale fp32 = max |x * smooth| of the row / 127); a row of zeros gives zeros."""
    require_dtype("input", input, HALVES)
    require(input.dim() >= 2, f"input {list(input.shape)}: at least two dimensions")
    require(quant_mode == "pertoken", f"quant_mode '{quant_mode}': the emulator has pertoken")
    require(dtype_of(dst_type, torch.int8) == torch.int8, f"dst_type {dst_type}: the emulator has int8")
    wide = input.float()
    if smooth_scales is not None:
        require(smooth_scales.dtype == input.dtype, f"smooth_scales is {smooth_scales.dtype}, input {input.dtype}")
        require_shape("smooth_scales", smooth_scales, input.shape[-1])
        wide = wide * smooth_scales.float()
    scale = wide.abs().amax(-1) / 127
    return (wide / scale[..., None]).nan_to_num(0).round().to(torch.int8), scale


@kernel("npu_quant_matmul", nz=("x2",))
def npu_quant_matmul(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    pertoken_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    output_dtype: int | None,
) -> torch.Tensor:
    """(x1 @ x2 + int32 bias) * scale[n] * pertoken_scale[m] + float bias, in fp32, rounded to bf16 or fp16."""
    for name, tensor in (("x1", x1), ("x2", x2)):
        require_dtype(name, tensor, (torch.int8,))
        require(tensor.dim() == 2 and tensor.shape[-1] <= 65535, f"{name} {list(tensor.shape)}: 2-D, 65535 wide")
    require(x1.shape[1] == len(x2), f"x1 {list(x1.shape)} @ x2 {list(x2.shape)}")
    width = x2.shape[1]
    dtype = dtype_of(output_dtype, torch.int8)
    require(dtype in HALVES, f"output_dtype {dtype} (the default is int8): the emulator has bfloat16 and float16")
    require_dtype("scale", scale, (torch.float32, torch.bfloat16) if dtype == torch.bfloat16 else (torch.float32,))
    require(dtype == torch.bfloat16 or pertoken_scale is not None, "fp16 output with an fp32 scale: pertoken_scale")
    require(scale.dim() == 1 and len(scale) in (1, width), f"scale {list(scale.shape)} for {width} columns")
    product = int8_product(x1, x2)
    if bias is not None:
        require_dtype("bias", bias, (torch.int32, torch.float32, dtype))
        require_shape("bias", bias, width)
    if bias is not None and bias.dtype == torch.int32:
        product = product + bias
    out = product.float() * scale.float()
    if pertoken_scale is not None:
        require_dtype("pertoken_scale", pertoken_scale, (torch.float32,))
        require_shape("pertoken_scale", pertoken_scale, len(x1))
        out = out * pertoken_scale[:, None]
    if bias is not None and bias.dtype != torch.int32:
        out = out + bias.float()
    return out.to(dtype)
