# SPDX-License-Identifier: Apache-2.0
"""Writes `logits.safetensors` beside each checkpoint: `token_ids` [T] int64 and `logits` [T, V] float32.

The path is independent of the project's: transformers' float32 model, whose quantised matrices are replaced by

- their dequantised weights where only weights are quantised, FP8 included (activations stay float32);
- exact integer arithmetic for W8A8. Dynamic: one scale a token, `amax / 127`, and
  `(round(x / scale) @ w.T) * weight_scale * scale`. Static: `q = clamp(round(x / input_scale) + input_offset)` and
  `(q @ w.T + quant_bias) * deq_scale`, the bias of the module being part of `quant_bias`.

Run it in the environment of the tests as `python expected_logits.py WORK`; WORK holds the unquantised models that
`make_fixtures.py source WORK` made, from whose logits these must not be far.
"""

import argparse
import json
import re
from pathlib import Path

import torch
from make_fixtures import HERE, SOURCE_OF, tidy
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

TOKEN_IDS = [51, 44, 59, 17, 59, 13, 45, 40, 62, 11, 5, 47]  # none of whose activations lies near a rounding tie
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # which of eight columns lies in the i-th nibble, lowest first
LEAST_SIMILARITY = 0.9
MOST_CHANGE = 3e-5


class Float(nn.Module):
    """Linear map by a float32 weight [N, K]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.matrix = weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T


class Dynamic(nn.Module):
    """W8A8 with scales of tokens: int8 weight [N, K], scale [N, 1]."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.matrix, self.scale = weight, scale.float().flatten()

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(dim=-1, keepdim=True) / 127
        q = (x / scale).round().clamp(-128, 127)
        return (q.int() @ self.matrix.int().T).float() * self.scale * scale


class Static(nn.Module):
    """W8A8 with one scale and offset for all inputs: int8 weight [N, K], quant_bias and deq_scale [N]."""

    def __init__(self, weight: Tensor, scale: Tensor, offset: Tensor, bias: Tensor, deq_scale: Tensor) -> None:
        super().__init__()
        if deq_scale.dtype == torch.int64:
            deq_scale = deq_scale.int().view(torch.float32)
        self.matrix, self.bias, self.deq_scale = weight, bias, deq_scale
        self.input_scale, self.input_offset = scale.float(), offset.float()

    def forward(self, x: Tensor) -> Tensor:
        q = ((x / self.input_scale).round() + self.input_offset).clamp(-128, 127)
        return (q.int() @ self.matrix.int().T + self.bias).float() * self.deq_scale


class Experts(nn.Module):
    """Routed experts, one module a matrix: [gate_proj, up_proj, down_proj] of each expert."""

    def __init__(self, experts: list[list[nn.Module]]) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.ModuleList(expert) for expert in experts])

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden_states)
        for index, (gate_proj, up_proj, down_proj) in enumerate(self.experts):
            tokens, choice = torch.where(topk_ids == index)
            if len(tokens):
                x = hidden_states[tokens]
                y = down_proj(nn.functional.silu(gate_proj(x)) * up_proj(x))
                result.index_add_(0, tokens, y * topk_weights[tokens, choice, None])
        return result


def nibbles(packed: Tensor) -> Tensor:
    """Unpacks int32 [..., n] to its unsigned nibbles [..., n, 8], lowest first."""
    return packed.unsqueeze(-1) >> torch.arange(0, 32, 4) & 15


def from_compressed_tensors(packed: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Dequantises packed [N, K / 8], scale [N, K / g], zero_point [N / 8, K / g] to float32 [N, K]."""
    q = nibbles(packed).flatten(-2)
    zeros = torch.full(scale.shape, 8) if zero_point is None else nibbles(zero_point.T).flatten(-2).T
    group = q.shape[1] // scale.shape[1]
    return (q - zeros.repeat_interleave(group, 1)).float() * scale.float().repeat_interleave(group, 1)


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """Dequantises qweight [K, N / 8], qzeros [K / g, N / 8], scales [K / g, N] to float32 [N, K]."""
    back = torch.tensor(AWQ_ORDER).argsort()
    q, zeros = (nibbles(packed)[..., back].flatten(-2) for packed in (qweight, qzeros))
    group = q.shape[0] // scales.shape[0]
    return ((q - zeros.repeat_interleave(group, 0)).float() * scales.float().repeat_interleave(group, 0)).T.contiguous()


def from_gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, stored_less: int) -> Tensor:
    """Dequantises qweight [K / 8, N], qzeros [K / g, N / 8], scales [K / g, N] to float32 [N, K].

    `stored_less`: by how much the stored zero points are less than the true ones.
    """
    q = nibbles(qweight.T).flatten(-2).T
    zeros = nibbles(qzeros).flatten(-2) + stored_less
    return ((q - zeros[g_idx.long()]).float() * scales.float()[g_idx.long()]).T.contiguous()


def from_fp8(weight: Tensor, inverse: Tensor) -> Tensor:
    """Dequantises e4m3 [N, K] and its scales of 128 x 128 blocks, of which transformers drops dimensions of 1."""
    rows, columns = weight.shape
    scales = inverse.float().reshape(-(-rows // 128), -(-columns // 128))
    return weight.float() * scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]


def linear(tensors: dict[str, Tensor], name: str, config: dict[str, str]) -> nn.Module:
    """Builds the module `name` from the tensors of its format, of which none may be left over."""
    own = {key: tensors.pop(key) for key in list(tensors) if key.startswith(name + ".")}
    own = {key.removeprefix(name + "."): tensor for key, tensor in own.items()}
    kinds = set(own)
    if kinds == {"weight"}:
        return Float(own["weight"].float())
    if "weight_packed" in kinds:
        assert kinds - {"weight_zero_point"} == {"weight_packed", "weight_scale", "weight_shape"}
        matrix = from_compressed_tensors(own["weight_packed"], own["weight_scale"], own.get("weight_zero_point"))
        assert list(matrix.shape) == own["weight_shape"].tolist()
        return Float(matrix)
    if kinds == {"qweight", "qzeros", "scales"} and config["quant_method"] == "awq":
        return Float(from_awq(own["qweight"], own["qzeros"], own["scales"]))
    if kinds == {"qweight", "qzeros", "scales", "g_idx"} and config["quant_method"] == "gptq":
        return Float(from_gptq(**own, stored_less=int(config["checkpoint_format"] == "gptq")))
    if kinds == {"weight", "weight_scale_inv"}:
        return Float(from_fp8(own["weight"], own["weight_scale_inv"]))
    if "deq_scale" in kinds:
        keys = ("weight", "input_scale", "input_offset", "quant_bias", "deq_scale")
        assert kinds - {"bias", "weight_scale", "weight_offset"} == set(keys)
        return Static(*(own[key] for key in keys))
    assert kinds - {"weight_offset"} == {"weight", "weight_scale"} and own["weight"].dtype == torch.int8, (name, kinds)
    assert "weight_offset" not in own or not own["weight_offset"].any()
    return Dynamic(own["weight"], own["weight_scale"])


def load(folder: Path) -> Qwen3MoeForCausalLM:
    """Builds transformers' float32 model of a checkpoint, quantised or not."""
    settings = json.loads((folder / "config.json").read_text())
    quantization = settings.pop("quantization_config", {})
    config = Qwen3MoeConfig(**settings, attn_implementation="eager")
    config.dtype = torch.float32
    model = Qwen3MoeForCausalLM(config).eval()
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name != "logits.safetensors":
            tensors |= load_file(path)
    for index, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, linear(tensors, f"{prefix}.self_attn.{name}", quantization))
        experts = []
        for expert in range(config.num_experts):
            names = [f"{prefix}.mlp.experts.{expert}.{part}_proj" for part in ("gate", "up", "down")]
            experts.append([linear(tensors, name, quantization) for name in names])
        layer.mlp.experts = Experts(experts)
    for name in [name for name in tensors if re.search(r"norm\.bias$", name)]:
        add_bias(model.get_submodule(name.removesuffix(".bias")), tensors.pop(name).float())
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=True)
    return model


def add_bias(module: nn.Module, bias: Tensor) -> None:
    """Makes a module add `bias` to what it returns."""
    module.register_forward_hook(lambda module, inputs, output: output + bias)


def change_by_noise(model: Qwen3MoeForCausalLM, token_ids: Tensor, trials: int = 50) -> float:
    """Returns the greatest change of a logit when the embeddings change by a few units of float32's last place.

    Where it is large, an activation lies so near a tie that another order of summation rounds it otherwise.
    """
    embeddings = model.model.embed_tokens.weight
    logits, original, greatest = model(token_ids[None]).logits, embeddings.clone(), 0.0
    generator = torch.Generator().manual_seed(0)
    for _ in range(trials):
        embeddings.copy_(original * (1 + 5e-7 * torch.randn(original.shape, generator=generator)))
        greatest = max(greatest, (model(token_ids[None]).logits - logits).abs().max().item())
    embeddings.copy_(original)
    return greatest


def main() -> None:
    """Writes the logits of every checkpoint and prints how near they are to those of the unquantised model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work
    token_ids = torch.tensor(TOKEN_IDS)
    for name, source in SOURCE_OF.items():
        with torch.no_grad():
            model = load(HERE / name)
            logits = model(token_ids[None]).logits[0]
            original = load(work / source)(token_ids[None]).logits[0]
            change = change_by_noise(model, token_ids)
        similarity = nn.functional.cosine_similarity(logits.flatten(), original.flatten(), dim=0).item()
        print(f"{name:32} cosine similarity to the unquantised model {similarity:.4f}, change by noise {change:.1e}")
        if similarity < LEAST_SIMILARITY:
            raise ValueError(f"{name}: cosine similarity {similarity:.4f}, expected at least {LEAST_SIMILARITY}")
        if change > MOST_CHANGE:
            raise ValueError(f"{name}: noise changes a logit by {change:.1e}; choose other TOKEN_IDS")
        save_file({"token_ids": token_ids, "logits": logits.contiguous()}, HERE / name / "logits.safetensors")
        tidy(name)


if __name__ == "__main__":
    main()
