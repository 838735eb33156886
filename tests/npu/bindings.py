# SPDX-License-Identifier: Apache-2.0
"""Variants that the NPU backend has to select where torch_npu has all of them."""

BEST = {
    "rotary": "npu_apply_rotary_pos_emb TND",
    "cache write": "npu_scatter_pa_kv_cache",
    "attention": "npu_fused_infer_attention_score_v2",
    "gating": "npu_moe_gating_top_k_softmax_v2",
    "combine": "npu_moe_finalize_routing",
    "local experts": "npu_moe_finalize_routing, index -1",
    "regroup": "npu_moe_re_routing",
    "qkv": "npu_qkv_rms_norm_rope_cache",
}
UNFUSED = BEST | {"qkv": "npu_rms_norm"}  # where attention reads no tiled cache, or nothing is computed
QUANTIZED = {
    "linear w8a8": "npu_quant_matmul",
    "norm_linear w8a8": "npu_add_rms_norm_dynamic_quant",
    "experts w8a8": "npu_grouped_matmul",
    "silu_and_mul w8a8": "npu_grouped_matmul_swiglu_quant_v2",
    "linear w8a8-static": "npu_quant_matmul",
    "norm_linear w8a8-static": "npu_add_rms_norm_quant",
    "linear w4a16": "npu_weight_quant_batchmatmul",
    "experts w4a16": "npu_grouped_matmul",
}
