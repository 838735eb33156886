# SPDX-License-Identifier: Apache-2.0
"""Linear layers with quantised weights on torch_npu, and the selection of the calls for a number format.

Families of variants are named as `Ops.fallbacks` names operations on formats. They are probed when the first weight of
a format is loaded, with numbers, as what a version of CANN does not take is not always an error.
"""

import logging

import torch
from torch import Tensor

from ops.npu.bindings import NpuBindings
from ops.npu.calls import npu
from ops.npu.quantized_probe import probe
from ops.npu.weights import (
    Int4Matrix,
    Int8Experts,
    Int8Linear,
    Int8StaticLinear,
    Quantized,
    int4_matrix,
    int8_experts,
    int8_linear,
    int8_static_linear,
    moved,
    refusal,
    tiled,
)
from ops.quantized_matmul import unknown_weight
from ops.weight import DenseWeight, Int4Weight, Int8StaticWeight, Int8Weight, Weight, dequantize

logger = logging.getLogger(__name__)


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds rows [R, K] to int8 [R, K], with scales [R] float32 of max |x| / 127 over the columns of this rank.

    Under tensor parallelism that differs from one rank's rounding, whose scale (`Int8Weight.column_group`) is over all
    columns: the operation takes no scale, and an exchange of the ranks would cost more than it gains.
    """
    return npu.npu_dynamic_quant(rows)


def multiply_int8(values: Tensor, row_scales: Tensor, weight: Int8Linear, dtype: torch.dtype) -> Tensor:
    """int8 [T, K] with scales [T] float32 -> [T, N] of `dtype`; the default is int8."""
    return npu.npu_quant_matmul(values, weight.data, weight.scales, pertoken_scale=row_scales, output_dtype=dtype)


def norm_int8(hidden_states: Tensor, residual: Tensor, norm_weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    """Add, RMSNorm and `quantize_rows`: int8 [T, D], scales [T] float32, residual [T, D]."""
    # torch_npu 2.8 to 2.12 have a default mask that they refuse
    values, _, residual, row_scales, _ = npu.npu_add_rms_norm_dynamic_quant(
        residual, hidden_states, norm_weight, epsilon=eps, output_mask=[True, False]
    )
    return values, row_scales, residual


def quantize_static(hidden_states: Tensor, weight: Int8StaticLinear) -> Tensor:
    """Rounds [T, K] to int8 with the scale and offset of a weight."""
    if weight.input_bias is not None:
        hidden_states = hidden_states + weight.input_bias
    return npu.npu_quantize(hidden_states, weight.input_scale, weight.input_offset, torch.qint8, -1, True)


def multiply_static(values: Tensor, weight: Int8StaticLinear, dtype: torch.dtype) -> Tensor:
    """int8 [T, K] -> [T, N] of `dtype`; the default is int8."""
    return npu.npu_quant_matmul(values, weight.data, weight.scales, bias=weight.quant_bias, output_dtype=dtype)


def norm_static(
    hidden_states: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, weight: Int8StaticLinear
) -> tuple[Tensor, Tensor]:
    """Add, RMSNorm and `quantize_static`: int8 [T, D], residual [T, D]."""
    values, _, residual = npu.npu_add_rms_norm_quant(
        residual,
        hidden_states,
        norm_weight,
        weight.column_scales,
        weight.column_offsets,
        weight.input_bias,
        epsilon=eps,
        div_mode=True,
    )
    return values, residual


def multiply_int4(hidden_states: Tensor, weight: Int4Matrix) -> Tensor:
    """[T, K] -> [T, N]; the offset is added before the scale is multiplied."""
    size = weight.group_size
    return npu.npu_weight_quant_batchmatmul(
        hidden_states,
        weight.qweight,
        weight.scales,
        weight.offsets,
        antiquant_group_size=0 if size == hidden_states.shape[1] else size,  # 0: one group
    )


def multiply_swiglu(
    values: Tensor, row_scales: Tensor, weight: Int8Experts, tokens_per_expert: Tensor
) -> tuple[Tensor, Tensor]:
    """Grouped matmul, SwiGLU and `quantize_rows`: int8 [R, D], scales [R] -> int8 [R, F], scales [R]."""
    return npu.npu_grouped_matmul_swiglu_quant_v2(
        values, [weight.data], [weight.swiglu_scales], row_scales, tokens_per_expert, group_list_type=1
    )


DEQUANTIZED = "dequantised"  # when loaded
# family -> variants: whether the first operation is used
FAMILIES: dict[str, dict[str, bool]] = {
    "linear w8a8": {"npu_quant_matmul": True, DEQUANTIZED: False},
    "norm_linear w8a8": {"npu_add_rms_norm_dynamic_quant": True, "npu_dynamic_quant": False},
    "experts w8a8": {"npu_grouped_matmul": True, DEQUANTIZED: False},
    "silu_and_mul w8a8": {"npu_grouped_matmul_swiglu_quant_v2": True, "npu_dynamic_quant": False},
    "linear w8a8-static": {"npu_quant_matmul": True},
    "norm_linear w8a8-static": {"npu_add_rms_norm_quant": True, "npu_quantize": False},
    "linear w4a16": {"npu_weight_quant_batchmatmul": True, DEQUANTIZED: False},
    "experts w4a16": {"npu_grouped_matmul": True, DEQUANTIZED: False},
}
FUSED = {  # family of matmuls -> that of the operation which is fused with one
    "linear w8a8": "norm_linear w8a8",
    "experts w8a8": "silu_and_mul w8a8",
    "linear w8a8-static": "norm_linear w8a8-static",
}


class NpuQuantized(NpuBindings):
    """Linear layers with quantised weights; weights that no operation takes are dequantised when loaded."""

    def __init__(self, device: str):
        super().__init__(device)
        self.uses: dict[str, bool] = {}  # family -> whether its first variant is in use

    def prepare_weight(self, weight: Weight, dtype: torch.dtype) -> Weight:
        """Converts a quantised weight for activations of `dtype`; ValueError where nothing can be done with it."""
        if isinstance(weight, self.dequantizes):
            return self.dequantized(weight, dtype)
        family = f"{'linear' if len(weight.shape) == 2 else 'experts'} {weight.format_name}"
        if not isinstance(weight, Int8Weight | Int8StaticWeight | Int4Weight) or family not in FAMILIES:
            raise unknown_weight(weight)
        why = refusal(weight)
        if why is not None:
            if isinstance(weight, Int8StaticWeight):
                raise ValueError(f"model_path: a {weight.format_name} weight is not possible on device npu: {why}")
            self.note(f"{family} ({DEQUANTIZED}: {why})")
            return self.dequantized(weight, dtype)
        if family not in self.uses:
            self.select_family(family, dtype)
            if family in FUSED and self.uses[family]:
                self.select_family(FUSED[family], dtype)
        return self.converted(weight, dtype) if self.uses[family] else self.dequantized(weight, dtype)

    def note(self, replaced: str) -> None:
        """Reports a replacement that the sizes of a weight require, once."""
        if replaced not in self.replaced:
            self.replaced.append(replaced)
            logger.warning("ops: npu, %s", replaced)

    def select_family(self, family: str, dtype: torch.dtype) -> None:
        """Selects a variant by running it on random weights."""

        def probe_variant(is_used: bool, device: str) -> None:
            self.uses[family] = is_used
            if DEQUANTIZED not in FAMILIES[family] or is_used:
                probe(self, family, dtype, device)

        self.select_variant(family, FAMILIES[family], probe_variant)
        logger.info("ops: npu, %s: %s", family, self.bindings[family])

    def dequantized(self, weight: Weight, dtype: torch.dtype) -> DenseWeight:
        if len(weight.shape) == 2:
            return DenseWeight(dequantize(self.on_host(weight), dtype).to(weight.device))
        output = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        for expert in range(weight.shape[0]):  # one at a time, to limit memory
            output[expert] = dequantize(self.on_host(weight[expert]), dtype)
        return DenseWeight(output)

    def on_host(self, weight: Quantized) -> Quantized:
        """Copies a weight to the CPU, as A2 and A3 compute neither with float8 nor with shifts of every integer."""
        return moved(weight, "cpu") if self.on_npu else weight

    def converted(self, weight: Weight, dtype: torch.dtype) -> Weight:
        """Converts a weight to the layout of its operations."""
        match weight:
            case Int8Weight() if len(weight.shape) == 2:
                return tiled(int8_linear(weight))
            case Int8Weight():
                fuses = self.uses.get("silu_and_mul w8a8", False)
                found = tiled(int8_experts(weight, dtype, fuses))
                if fuses and found.swiglu_scales is None:
                    self.note(f"silu_and_mul w8a8 (npu_dynamic_quant: {weight.shape[1]} rows)")
                return found
            case Int8StaticWeight():
                return tiled(int8_static_linear(weight, dtype))
            case Int4Weight():
                return moved(int4_matrix(self.on_host(weight), dtype), weight.device)
        raise unknown_weight(weight)

    def linear(self, hidden_states: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if not isinstance(weight, Int8Linear | Int8StaticLinear | Int4Matrix) or len(weight.shape) != 2:
            raise unknown_weight(weight)
        if hidden_states.shape[0] == 0:
            return hidden_states.new_empty(0, weight.shape[0])
        match weight:
            case Int8Linear():
                output = multiply_int8(*quantize_rows(hidden_states), weight, hidden_states.dtype)
            case Int8StaticLinear():
                output = multiply_static(quantize_static(hidden_states, weight), weight, hidden_states.dtype)
            case Int4Matrix():
                output = multiply_int4(hidden_states, weight)
        return output if bias is None else output + bias

    def norm_linear(
        self,
        hidden_states: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        eps: float,
        weight: Weight,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As in the interface; with int8 activations the norm rounds them, where there is a residual to add."""
        fuses = self.uses.get(f"norm_linear {weight.format_name}", False)
        if not fuses or residual is None or hidden_states.shape[0] == 0:
            normed, residual = self.add_norm(hidden_states, residual, norm_weight, eps)
            return self.linear(normed, weight, bias), residual
        match weight:
            case Int8Linear():
                values, row_scales, residual = norm_int8(hidden_states, residual, norm_weight, eps)
                output = multiply_int8(values, row_scales, weight, hidden_states.dtype)
            case Int8StaticLinear():
                values, residual = norm_static(hidden_states, residual, norm_weight, eps, weight)
                output = multiply_static(values, weight, hidden_states.dtype)
            case _:
                raise unknown_weight(weight)
        return (output if bias is None else output + bias), residual
