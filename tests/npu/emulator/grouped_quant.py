# SPDX-License-Identifier: Apache-2.0
"""SwiGLU between the experts' int8 matmuls (op-plugin docs: npu_grouped_matmul_swiglu_quant_v2, npu_dequant_...).

R rows, K in width, N out width of gate and up together, H = N / 2, E groups. Rows past the last group are undefined.
"""

import torch

from tests.npu.emulator.matmul import INNER_LIMIT, Tensors, bounds
from tests.npu.emulator.quant import int8_product, quantise_rows
from tests.npu.emulator.registry import (
    FRACTAL_NZ,
    kernel,
    npu_format,
    poison,
    require,
    require_contiguous,
    require_dtype,
    require_not_empty,
    require_shape,
)

WIDEST_GATE_UP = 10240
WIDEST_DEQUANT = 7232  # CANN's page for A2 and A3; op-plugin's says H at most 10496
DEQUANT_ALIGNMENT = 64

Pair = tuple[torch.Tensor, torch.Tensor]


def _swiglu_quant(wide: torch.Tensor, gate_first: bool, smooth: torch.Tensor | None = None) -> Pair:
    """int8 [R, H] and fp32 [R] of SwiGLU of fp32 [R, N], times `smooth` [H]."""
    first, second = wide.chunk(2, -1)
    gate, up = (first, second) if gate_first else (second, first)
    product = torch.nn.functional.silu(gate) * up
    return quantise_rows(product if smooth is None else product * smooth.float())


@kernel("npu_grouped_matmul_swiglu_quant_v2", nz=("weight",))
def npu_grouped_matmul_swiglu_quant_v2(
    x: torch.Tensor,
    weight: Tensors,
    weight_scale: Tensors,
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    group_list_type: int | None,
    tuning_config: list[int] | None,
) -> Pair:
    """(int8 [R, H], scale fp32 [R]) of SwiGLU of x @ weight[e] * weight_scale[e] * x_scale, gate first.

    int8 x and weight only, one weight tensor [E, K, N] in FRACTAL_NZ. tuning_config, a hint, changes nothing.
    """
    require(len(weight) == len(weight_scale) == 1, f"{len(weight)} weights, {len(weight_scale)} weight_scales: one")
    matrix, scale = weight[0], weight_scale[0]
    for name, tensor in (("x", x), ("weight", matrix)):
        require_dtype(name, tensor, (torch.int8,))
    require(npu_format(matrix) == FRACTAL_NZ, "weight is ND; int8 weights must be FRACTAL_NZ")
    require(x.dim() == 2 and matrix.dim() == 3, f"x {list(x.shape)}, weight {list(matrix.shape)}: [R, K], [E, K, N]")
    require_not_empty(x=x, weight=matrix)
    require_contiguous(weight=matrix)
    groups, depth, width = matrix.shape
    require(x.shape[1] == depth, f"K differs: x {list(x.shape)}, weight {list(matrix.shape)}")
    require(groups <= 1024, f"{groups} groups: at most 1024")
    require(width <= WIDEST_GATE_UP, f"N {width}: at most {WIDEST_GATE_UP}")
    require(depth < INNER_LIMIT, f"K {depth} reaches {INNER_LIMIT}")
    require(width % 32 == 0 and depth % 16 == 0, f"weight {list(matrix.shape)}: N / 32 and K / 16 tiles")
    require_dtype("weight_scale", scale, (torch.float32, torch.float16, torch.bfloat16))
    require_shape("weight_scale", scale, groups, width)
    require_dtype("x_scale", x_scale, (torch.float32,))
    require_shape("x_scale", x_scale, len(x))
    ends = bounds(group_list, group_list_type or 0, groups, len(x), one_count=True)
    out, out_scale = poison((len(x), width // 2), torch.int8), poison((len(x),), torch.float32)
    for group, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        wide = int8_product(x[start:end], matrix[group]).float() * scale[group].float() * x_scale[start:end, None]
        out[start:end], out_scale[start:end] = _swiglu_quant(wide, gate_first=True)
    return out, out_scale


def _check_dequant(x: torch.Tensor, group_index: torch.Tensor | None, quant_mode: int, swiglu_mode: int) -> None:
    require(quant_mode == 1, f"quant_mode {quant_mode} (the default is 0, static): the emulator has 1, dynamic")
    require(swiglu_mode == 0, f"swiglu_mode {swiglu_mode}: the emulator has 0")
    require_dtype("x", x, (torch.int32, torch.bfloat16))
    require(x.dim() == 2, f"x {list(x.shape)}: two dimensions")
    require_contiguous(x=x)
    width = x.shape[1] // 2
    require(x.shape[1] % 2 == 0 and width > 0, f"x {list(x.shape)}: the last axis is gate and up")
    require(group_index is not None, "group_index is None, which CANN does not take on A2 and A3")
    require(width % DEQUANT_ALIGNMENT == 0, f"H {width} with group_index: a multiple of {DEQUANT_ALIGNMENT}")
    require(2 * width <= WIDEST_DEQUANT, f"x {list(x.shape)} with group_index: at most {WIDEST_DEQUANT} wide")
    require_dtype("group_index", group_index, (torch.int64,))
    require(group_index.dim() == 1 and len(group_index) > 0, f"group_index {list(group_index.shape)}: [E]")
    require(bool((group_index >= 0).all()), "group_index has a negative count")
    total = int(group_index.sum())
    require(total <= len(x), f"group_index sums to {total} (it takes counts), x has {len(x)} rows")


@kernel("npu_dequant_swiglu_quant")
def npu_dequant_swiglu_quant(
    x: torch.Tensor,
    weight_scale: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    quant_scale: torch.Tensor | None,
    group_index: torch.Tensor | None,
    activate_left: bool,
    quant_mode: int,
    swiglu_mode: int,
) -> Pair:
    """(int8 [R, H], scale fp32 [R]) of SwiGLU of x * weight_scale[e] * activation_scale, times quant_scale[e].

    int32 x needs both scales, bf16 x takes none. activate_left=False, the default, has the gate in the second half.
    """
    _check_dequant(x, group_index, quant_mode, swiglu_mode)
    assert group_index is not None
    groups, width = len(group_index), x.shape[1] // 2
    given = (("weight_scale", weight_scale), ("activation_scale", activation_scale), ("quant_scale", quant_scale))
    for name, tensor in given:
        if name != "quant_scale":
            wanted = x.dtype == torch.int32
            require((tensor is not None) == wanted, f"{name} {'is needed for' if wanted else 'given with'} {x.dtype} x")
        if tensor is not None:
            require_dtype(name, tensor, (torch.float32,))
            require_contiguous(**{name: tensor})
    wide = x.float()
    if weight_scale is not None and activation_scale is not None:
        require_shape("weight_scale", weight_scale, groups, 2 * width)
        fits = tuple(activation_scale.shape) in ((len(x),), (len(x), 1))
        require(fits, f"activation_scale {list(activation_scale.shape)}: [{len(x)}] or [{len(x)}, 1]")
        token_scale = activation_scale.view(-1, 1)
    if quant_scale is not None:
        require_shape("quant_scale", quant_scale, groups, width)
    out, out_scale = poison((len(x), width), torch.int8), poison((len(x),), torch.float32)
    start = 0
    for group, count in enumerate(group_index.tolist()):
        rows, start = slice(start, start + count), start + count
        part = wide[rows] if weight_scale is None else wide[rows] * weight_scale[group] * token_scale[rows]
        smooth = None if quant_scale is None else quant_scale[group]
        out[rows], out_scale[rows] = _swiglu_quant(part, activate_left, smooth)
    return out, out_scale
