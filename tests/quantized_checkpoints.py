# SPDX-License-Identifier: Apache-2.0
"""Quantised checkpoints written from the formats' descriptions, and the weights that they stand for.

Every writer takes a float32 matrix [N, K], and returns the tensors to store, by suffix, and the matrix after rounding.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeForCausalLM

from tests.checkpoints import make_checkpoint

CONFIG = {
    "vocab_size": 208,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
}
Written = tuple[dict[str, torch.Tensor], torch.Tensor]
Writer = Callable[[torch.Tensor], Written]


def rounded_groups(
    matrix: torch.Tensor, group: int, dtype: torch.dtype, symmetric: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """4-bit values [N, K], zero points and scales [N, K / group] of random quality, and the matrix they stand for."""
    n, k = matrix.shape
    parts = matrix.view(n, k // group, group)
    scales = ((parts.amax(-1) - parts.amin(-1)) / 15).clamp(min=1e-3).to(dtype)
    zeros = torch.full_like(scales, 8) if symmetric else (-parts.amin(-1) / scales).round().clamp(0, 15)
    values = (parts / scales[..., None].float() + zeros[..., None]).round().clamp(0, 15)
    exact = (values - zeros[..., None].float()) * scales[..., None].float()
    return values.view(n, k).int(), zeros.int(), scales, exact.view(n, k)


def words(values: torch.Tensor, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> torch.Tensor:
    """Packs along the last dimension: the value at position order[i] of each eight is in bits 4i to 4i + 3."""
    packed = torch.zeros(*values.shape[:-1], values.shape[-1] // 8, dtype=torch.int64)
    for bits, position in enumerate(order):
        packed |= values[..., position::8].long() << (4 * bits)
    return (packed - (packed >> 31 << 32)).int()


def awq(matrix: torch.Tensor, group: int = 16) -> Written:
    values, zeros, scales, exact = rounded_groups(matrix, group, torch.float16)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {"qweight": words(values.t(), order), "qzeros": words(zeros.t(), order), "scales": scales.t()}
    return tensors, exact


def gptq(matrix: torch.Tensor, group: int = 16, less: int = 1) -> Written:
    values, zeros, scales, exact = rounded_groups(matrix, group, torch.float16)
    tensors = {
        "qweight": words(values).t(),
        "qzeros": words((zeros.t() - less) & 15),
        "scales": scales.t(),
        "g_idx": (torch.arange(matrix.shape[1]) // group).int(),
    }
    return tensors, exact


def packed(matrix: torch.Tensor, group: int = 16, symmetric: bool = True) -> Written:
    values, zeros, scales, exact = rounded_groups(matrix, group, torch.bfloat16, symmetric)
    tensors = {
        "weight_packed": words(values),
        "weight_scale": scales,
        "weight_shape": torch.tensor(matrix.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = words(zeros.t()).t()
    return tensors, exact


def int8(matrix: torch.Tensor, scale_dtype: torch.dtype = torch.bfloat16, flat: bool = False) -> Written:
    """The largest value of every row is 127 or -127, as IntegerLinear assumes."""
    largest, at = matrix.abs().max(1, keepdim=True)
    scales = (largest / 127).to(scale_dtype)
    values = (matrix / scales.float()).round().clamp(-127, 127)
    values = values.scatter(1, at, 127 * matrix.gather(1, at).sign())
    stored = scales[:, 0] if flat else scales
    return {"weight": values.to(torch.int8), "weight_scale": stored}, values * scales.float()


def modelslim(matrix: torch.Tensor) -> Written:
    tensors, exact = int8(matrix, torch.float32)
    return {**tensors, "weight_offset": torch.zeros_like(tensors["weight_scale"])}, exact


def fp8(matrix: torch.Tensor, block: tuple[int, int] = (32, 16)) -> Written:
    """Blocks at the lower and right edge may be partial."""
    n, k = matrix.shape
    rows, columns = torch.arange(n) // block[0], torch.arange(k) // block[1]
    scales = torch.rand(-(-n // block[0]), -(-k // block[1])) / 100 + 0.002
    spread = scales[rows][:, columns]
    stored = (matrix / spread).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale_inv": scales}, stored.float() * spread


def compressed_tensors(weights: dict[str, Any], activations: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


W4A16 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
PER_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
W8A8 = compressed_tensors(INT8, PER_TOKEN)
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 16]}

# name -> (writer, quantization_config)
FORMATS: dict[str, tuple[Writer, dict[str, Any] | None]] = {
    "awq": (awq, AWQ),
    "awq_groups_of_8": (lambda matrix: awq(matrix, 8), AWQ),
    "awq_one_group": (lambda matrix: awq(matrix, matrix.shape[1]), AWQ),
    "gptq": (gptq, GPTQ),
    "gptq_v2": (lambda matrix: gptq(matrix, less=0), {**GPTQ, "checkpoint_format": "gptq_v2"}),
    "w4a16": (packed, compressed_tensors(W4A16)),
    "w4a16_asymmetric": (lambda matrix: packed(matrix, 8, False), compressed_tensors({**W4A16, "symmetric": False})),
    "fp8": (fp8, FP8),
    "w8a8": (int8, W8A8),
    "w8a8_flat_scales": (lambda matrix: int8(matrix, torch.float32, True), W8A8),
    "modelslim": (modelslim, None),
}
INTEGER = ("w8a8", "w8a8_flat_scales", "modelslim")  # formats whose activations are quantised too


def quantize(
    folder: Path,
    write: Writer,
    quantization_config: dict[str, Any] | None,
    is_quantized: Callable[[str], bool] = lambda module: True,
    **config: Any,
) -> Qwen3MoeForCausalLM:
    """Writes a quantised checkpoint; returns transformers' float32 model with the weights that it stands for.

    Router, embedding and lm_head stay float, and modules that are not `is_quantized`.
    """
    model = make_checkpoint(folder, **{**CONFIG, **config})
    stored = load_file(folder / "model.safetensors")
    exact, description = {}, {}
    for name in sorted(stored):
        module = name.removesuffix(".weight")
        description[name] = "FLOAT"
        if ("_proj" in name and name.endswith(".weight")) and is_quantized(module):
            tensors, exact[name] = write(stored.pop(name))
            stored |= {f"{module}.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}
            description |= dict.fromkeys((f"{module}.{suffix}" for suffix in tensors), "W8A8_DYNAMIC")
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    if quantization_config is None:
        (folder / "quant_model_description.json").write_text(json.dumps({**description, "metadata": {}}))
    else:
        raw["quantization_config"] = quantization_config
    (folder / "config.json").write_text(json.dumps(raw))
    load_exact(model, exact)
    return model


@torch.no_grad()
def load_exact(model: Qwen3MoeForCausalLM, exact: dict[str, torch.Tensor]) -> None:
    """Replaces the model's matrices, whose experts are stacked, by those of a checkpoint's names."""
    parameters = dict(model.named_parameters())
    for name, matrix in exact.items():
        if ".experts." not in name:
            parameters[name].copy_(matrix)
            continue
        prefix, _, rest = name.partition(".experts.")
        expert, kind, _ = rest.split(".")
        stacked = parameters[f"{prefix}.experts.{'down_proj' if kind == 'down_proj' else 'gate_up_proj'}"]
        width = stacked.shape[1] // (1 if kind == "down_proj" else 2)
        start = width if kind == "up_proj" else 0
        stacked[int(expert), start : start + width].copy_(matrix)


class IntegerLinear(torch.nn.Module):
    """W8A8 with dynamic activations as it is documented, in whole numbers."""

    def __init__(self, matrix: torch.Tensor):
        super().__init__()
        self.scales = matrix.abs().amax(-1) / 127  # the largest of every row is 127
        self.values = (matrix / self.scales[..., None]).round().long()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        row_scales = rows.abs().amax(-1, keepdim=True) / 127
        quantized = (rows / row_scales).round().long()
        return (quantized @ self.values.t()).float() * self.scales * row_scales


class IntegerExperts(torch.nn.Module):
    """Experts of IntegerLinear layers."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor):
        super().__init__()
        self.layers = [(IntegerLinear(one), IntegerLinear(other)) for one, other in zip(gate_up, down, strict=True)]

    def forward(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(hidden_states)
        for token, (ids, weights) in enumerate(zip(topk_ids.tolist(), topk_weights, strict=True)):
            for expert, weight in zip(ids, weights, strict=True):
                gate_up, down = self.layers[expert]
                gate, up = gate_up(hidden_states[token : token + 1]).chunk(2, dim=-1)
                output[token] += weight * down(torch.nn.functional.silu(gate) * up)[0]
        return output


class StaticLinear(torch.nn.Module):
    """msModelSlim's static W8A8 in whole numbers, from its stored tensors."""

    def __init__(self, stored: dict[str, torch.Tensor], module: str, norm_bias: torch.Tensor | float):
        super().__init__()
        for name in ("weight", "deq_scale", "quant_bias", "input_scale", "input_offset"):
            setattr(self, name, stored[f"{module}.{name}"])
        if self.deq_scale.dtype is torch.int64:
            self.deq_scale = torch.tensor(self.deq_scale.int().numpy().view("float32"))
        self.norm_bias = norm_bias

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        values = ((rows + self.norm_bias) / self.input_scale).round().long() + self.input_offset.long()
        sums = values.clamp(-128, 127) @ self.weight.long().t() + self.quant_bias
        return sums.float() * self.deq_scale


def quantize_static(folder: Path, as_bits: bool, **config: Any) -> Qwen3MoeForCausalLM:
    """Writes msModelSlim's mixture: experts W8A8_DYNAMIC, attention static W8A8, norms with biases."""
    model = with_integer_layers(quantize(folder, modelslim, None, **config))
    stored = load_file(folder / "model.safetensors")
    description = json.loads((folder / "quant_model_description.json").read_text())
    for layer_id, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{layer_id}"
        norm_bias = torch.randn(model.config.hidden_size) / 10
        input_scale = torch.rand(1) / 20 + 0.02
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            module = f"{prefix}.self_attn.{name}"
            scales = stored.pop(f"{module}.weight_scale")[:, 0] * input_scale
            del stored[f"{module}.weight_offset"]
            bits = torch.tensor(scales.numpy().view("int32")).long()
            stored |= {
                f"{module}.deq_scale": bits if as_bits else scales,
                f"{module}.quant_bias": torch.randint(-3000, 3000, scales.shape, dtype=torch.int32),
                f"{module}.input_scale": input_scale.clone(),
                f"{module}.input_offset": torch.full((1,), 5.0),
            }
            if name != "o_proj":
                stored[f"{module}.bias"] = torch.randn(scales.shape)  # within quant_bias
            linear = StaticLinear(stored, module, 0.0 if name == "o_proj" else norm_bias)
            setattr(layer.self_attn, name, linear)
            description |= {key: "W8A8" for key in stored if key.startswith(module)}
        stored[f"{prefix}.input_layernorm.bias"] = norm_bias
        for name in ("post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
            stored[f"{prefix}.{name}.bias"] = torch.zeros_like(stored[f"{prefix}.{name}.weight"])
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "quant_model_description.json").write_text(json.dumps(description))
    return model


def with_integer_layers(model: Qwen3MoeForCausalLM) -> Qwen3MoeForCausalLM:
    """Replaces the linear layers and experts of a model whose weights are those of a W8A8 checkpoint."""
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, IntegerLinear(getattr(layer.self_attn, name).weight.detach()))
        experts = layer.mlp.experts
        layer.mlp.experts = IntegerExperts(experts.gate_up_proj.detach(), experts.down_proj.detach())
    return model
