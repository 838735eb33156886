# SPDX-License-Identifier: Apache-2.0
"""Number formats are recognised by what is stored; what is not supported is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from executor.loading.before_loading import load_config, load_scheme
from executor.loading.loader import load_parameters
from executor.loading.stored_model import StoredModel, check_tensors
from models.quantization.scheme import SUPPORTED, parse_scheme
from models.qwen3_moe.sharding import Layout
from models.qwen3_moe.weights import parameter_specs
from ops.weight import Fp8Weight, Int4Weight, Int8Weight, dequantize
from tests.checkpoints import make_checkpoint, rewrite
from tests.quantized_checkpoints import (
    AWQ,
    CONFIG,
    FORMATS,
    FP8,
    GPTQ,
    INT8,
    PER_TOKEN,
    W4A16,
    W8A8,
    compressed_tensors,
    fp8,
    modelslim,
    quantize,
    quantize_static,
)

EXPERT = "model.layers.1.mlp.experts.2.up_proj"
CPU = torch.device("cpu")


def check(folder: Path) -> StoredModel:
    config = load_config(folder)
    raw = json.loads((folder / "config.json").read_text())
    return check_tensors(folder, parameter_specs(config, Layout()), load_scheme(folder, raw))


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as error:
        check(folder)
    line = str(error.value)
    assert "\n" not in line and len(line) <= 500
    return line


def configure(folder: Path, quantization_config: Any, key: str = "quantization_config") -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("quantization_config", None)
    (folder / "config.json").write_text(
        json.dumps(raw if quantization_config is None else raw | {key: quantization_config})
    )


def qkv_weight(folder: Path, stored: StoredModel) -> torch.Tensor:
    """The matrix that the loaded q, k and v of layer 0 stand for."""
    specs = parameter_specs(load_config(folder), Layout())
    return dequantize(
        load_parameters(stored, specs, torch.float32, CPU)["layers.0.self_attn.qkv_proj.weight"], torch.float32
    )


# what is stored, and what the configuration says instead
@pytest.mark.parametrize(
    ("name", "config", "key"),
    [
        ("awq", None, ""),
        ("awq", GPTQ, "quantization_config"),
        ("awq", {"w_bit": 4, "q_group_size": 128, "version": "GEMM"}, "quantization_config"),
        ("awq", W8A8, "quantization_config"),
        ("awq", {**AWQ, "group_size": 64}, "quantization_config"),
        ("gptq", None, ""),
        ("gptq", {**AWQ, "modules_to_not_convert": ["self_attn", "mlp"]}, "quantization_config"),
        ("gptq", {**GPTQ, "desc_act": True}, "quantization_config"),  # g_idx says that it has no effect
        ("w4a16", AWQ, "quantization_config"),
        ("w4a16", compressed_tensors(W4A16), "compression_config"),
        ("w4a16_asymmetric", None, ""),
        ("w4a16_asymmetric", {"quant_method": "fp8", "weight_block_size": [128, 128]}, "quantization_config"),
        ("w8a8", {**W8A8, "ignore": ["re:.*"]}, "quantization_config"),
        ("fp8", {**FP8, "modules_to_not_convert": ["model"]}, "quantization_config"),
    ],
)
def test_content_decides(name, config, key, tmp_path):
    model = quantize(tmp_path / "Qwen3-30B-A3B-AWQ-GPTQ-FP8", *FORMATS[name])
    [folder] = tmp_path.iterdir()
    configure(folder, config, key)
    stored = check(folder)
    expected = {"awq": Int4Weight, "gpt": Int4Weight, "w4a": Int4Weight, "w8a": Int8Weight, "fp8": Fp8Weight}[name[:3]]
    kinds = {
        stored.weight_type(spec) for spec in parameter_specs(load_config(folder), Layout()) if "_proj" in spec.name
    }
    assert kinds == {expected}
    attention = model.model.layers[0].self_attn
    exact = torch.cat([getattr(attention, f"{name}_proj").weight for name in "qkv"])
    assert torch.allclose(qkv_weight(folder, stored), exact, atol=1e-6)


NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
UNSUPPORTED: list[tuple[Any, str]] = [
    ({**GPTQ, "checkpoint_format": "marlin"}, "gptq with checkpoint_format 'marlin'"),
    ({"bits": 8}, "AWQ or GPTQ with 8 bits"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method 'bitsandbytes'"),
    ({"quant_method": "mxfp4"}, "quant_method 'mxfp4'"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_method 'modelopt'"),
    ({"quant_method": ["awq"]}, "quant_method"),
    ({**AWQ, "bits": 8}, "awq with 8 bits"),
    ({**AWQ, "version": "gemv"}, "awq with version 'gemv'"),
    ({**AWQ, "version": "marlin"}, "awq with version 'marlin'"),
    ({**GPTQ, "bits": 3}, "gptq with 3 bits"),
    ({**FP8, "activation_scheme": "static"}, "fp8 with activation_scheme 'static'"),
    ({**FP8, "weight_block_size": None}, "fp8 with weight_block_size None"),
    ({**FP8, "fmt": "e5m2"}, "fp8 with fmt 'e5m2'"),
    (compressed_tensors(NVFP4), "weights 4 bits float by tensor_group"),
    (compressed_tensors(W4A16, {**PER_TOKEN, "num_bits": 4}), "activations 4 bits int by token dynamic"),
    (compressed_tensors(W4A16, PER_TOKEN), "weights 4 bits int by group static and activations 8 bits int by token"),
    (compressed_tensors(INT8), "weights 8 bits int by channel static and activations float"),
    (compressed_tensors(INT8, {**PER_TOKEN, "dynamic": False}), "activations 8 bits int by token static"),
    (compressed_tensors(INT8, {**PER_TOKEN, "strategy": "tensor"}), "activations 8 bits int by tensor"),
    (compressed_tensors(INT8, {**PER_TOKEN, "symmetric": False}), "by token asymmetric dynamic"),
    (compressed_tensors({**INT8, "symmetric": False}, PER_TOKEN), "by channel asymmetric"),
    (compressed_tensors({**INT8, "type": "float"}, {**PER_TOKEN, "type": "float"}), "weights 8 bits float by channel"),
    ({**W8A8, "kv_cache_scheme": {"num_bits": 8}}, "compressed-tensors with kv_cache_scheme"),
    ({**W8A8, "transform_config": {"config_groups": {"u": {}}}}, "compressed-tensors with transform_config"),
    ({**W8A8, "sparsity_config": {"format": "sparse-24-bitmask"}}, "compressed-tensors with sparsity_config"),
]


@pytest.mark.parametrize(("config", "named"), UNSUPPORTED)
def test_unsupported_schemes_are_refused_by_name(config, named):
    with pytest.raises(ValueError) as error:
        parse_scheme({"quantization_config": config})
    line = str(error.value)
    assert named in line and line.endswith(f"is not supported; supported are {SUPPORTED}"), line


@pytest.mark.parametrize(
    "config",
    [
        "int8",
        ["awq"],
        {"quant_method": "compressed-tensors"},
        {"quant_method": "compressed-tensors", "config_groups": []},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": 1}},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": None}}},
        {**W8A8, "ignore": "lm_head"},
        {**W8A8, "ignore": ["re:("]},
        {**AWQ, "group_size": 0},
        {**AWQ, "group_size": "128"},
        {**AWQ, "modules_to_not_convert": [1]},
        {**FP8, "weight_block_size": [128]},
        {**FP8, "weight_block_size": [128, -1]},
        {**AWQ, "bits": None},
    ],
)
def test_malformed_schemes(config):
    with pytest.raises(ValueError):
        parse_scheme({"quantization_config": config})


@pytest.mark.parametrize("value", ["W4A8_DYNAMIC", "W8A16", "C8", "W4A4_DYNAMIC", "W8A8_MIX", "FP8"])
def test_unsupported_types_of_modelslim(value, tmp_path):
    with pytest.raises(ValueError, match=f"msModelSlim's type '{value}' of model.x.weight is not supported"):
        parse_scheme({}, {"model.x.weight": value, "version": "1.0.0", "metadata": {}, "group_size": 0})


def test_rotations_of_modelslim():
    """Those that are folded into the weights need nothing."""
    assert parse_scheme({}, {"optional": {"quarot": {"rotation_map": {}}}, "metadata": {}}).method == "msmodelslim"
    with pytest.raises(ValueError, match=r"online rotations \(metadata.quarot\) is not supported"):
        parse_scheme({}, {"metadata": {"quarot": {"heads_rotation": {}}}})


def test_names_come_before_patterns_and_these_before_classes():
    groups = {
        "all": {"targets": ["Linear"], "weights": W4A16},
        "attention": {"targets": ["re:.*self_attn.*"], "weights": INT8, "input_activations": PER_TOKEN},
        "one": {"targets": ["model.layers.0.self_attn.o_proj"], "weights": {**W4A16, "group_size": 8}},
    }
    config = {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}
    scheme = parse_scheme(config)
    module = "model.layers.0.self_attn.q_proj"
    assert scheme.quantizes_activations(module) and not scheme.quantizes_activations("model.layers.0.mlp.up_proj")
    assert scheme.group("model.layers.0.self_attn.o_proj").group_size == 8


@pytest.mark.parametrize(
    "pattern",
    ["re:(.*)*x", "re:^(([a-z0-9_.])+)+!$", "re:(a+){2,}b", r"re:(\w+\.?)*!", "re:(.+x?)+!", r"re:(\w|\w\w)+!"],
)
def test_patterns_that_repeat_a_group_are_refused(pattern):
    with pytest.raises(ValueError, match="repeats a group"):
        parse_scheme({"quantization_config": {**W8A8, "ignore": [pattern]}})
    parse_scheme({"quantization_config": {**W8A8, "ignore": ["re:.*mlp.gate$", "re:model\\.layers\\.(0|1)\\..*"]}})


Tensors = dict[str, torch.Tensor]


def change(suffix: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({f"{EXPERT}.{suffix}": edit(tensors[f"{EXPERT}.{suffix}"]).contiguous()})


def drop(suffix: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(f"{EXPERT}.{suffix}")


def add(suffix: str, tensor: torch.Tensor) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({f"{EXPERT}.{suffix}": tensor})


@pytest.mark.parametrize(
    ("name", "edit", "named"),
    [
        ("awq", drop("scales"), f"{EXPERT}.scales is missing"),
        ("awq", change("scales", lambda t: t[:3]), f"{EXPERT}.scales is [3, 64], whose groups do not divide 64"),
        ("awq", change("scales", lambda t: t.flatten()), f"{EXPERT}.scales is [256]"),
        ("awq", change("qzeros", lambda t: t[:2]), f"{EXPERT}.qzeros is [2, 8] instead of [4, 8]"),
        ("awq", change("qweight", lambda t: t[:, :4]), f"{EXPERT}.qweight [64, 4], neither AWQ's [64, 64 / 8]"),
        ("awq", change("qweight", torch.Tensor.long), f"{EXPERT}.qweight is I64 instead of I32"),
        ("gptq", drop("qzeros"), f"1 missing: {EXPERT}.qzeros"),
        ("w4a16", drop("weight_shape"), f"1 missing: {EXPERT}.weight_shape"),
        ("w4a16", change("weight_packed", lambda t: t.to(torch.uint8)), "weight_packed of U8 (4-bit floating point)"),
        ("gptq", drop("qweight"), f"{EXPERT}.qweight is missing"),
        ("w4a16", drop("weight_packed"), f"{EXPERT}.weight_packed is missing"),
        ("w4a16", add("weight_global_scale", torch.ones(1)), "weight_packed of I32 (4-bit floating point)"),
        ("w4a16", change("weight_packed", lambda t: t.repeat(1, 2)), f"{EXPERT}.weight_packed [64, 16], not [64, 64"),
        ("w4a16", add("weight_g_idx", torch.zeros(64).int()), "act-order (actorder: group) is not supported"),
        ("w4a16_asymmetric", drop("weight_zero_point"), f"{EXPERT}.weight_zero_point is missing"),
        ("awq", drop("qzeros"), f"{EXPERT}.qzeros is missing"),
        ("fp8", change("weight", lambda t: t.to(torch.float8_e5m2)), f"{EXPERT}.weight [64, 64] of F8_E5M2 is not"),
        ("fp8", drop("weight_scale_inv"), f"{EXPERT}.weight of FP8 without weight_scale_inv"),
        ("fp8", change("weight_scale_inv", lambda t: t[:1]), f"{EXPERT}.weight_scale_inv is [1, 4] instead of [2, 4]"),
        ("fp8", add("input_scale", torch.ones(1)), f"1 not expected: {EXPERT}.input_scale"),
        ("w8a8", drop("weight_scale"), f"{EXPERT}.weight_scale is missing"),
        ("w8a8", add("input_scale", torch.ones(1)), f"{EXPERT}.weight of int8 with static activation scales"),
        ("w8a8", change("weight_scale", lambda t: t[:1]), f"{EXPERT}.weight_scale is [1, 1] instead of [64, 1]"),
        ("w8a8", add("bias", torch.ones(64)), f"1 not expected: {EXPERT}.bias"),
        ("modelslim", add("deq_scale", torch.ones(64)), "experts with static activation scales"),
    ],
)  # fmt: skip
def test_stored_tensors_are_checked(name, edit, named, tmp_path):
    quantize(tmp_path, *FORMATS[name])
    rewrite(tmp_path, edit)
    assert named in refusal(tmp_path)


def test_act_order_needs_its_tensors(tmp_path):
    """Without g_idx nothing says which group a column has."""
    quantize(tmp_path, *FORMATS["gptq"])
    rewrite(tmp_path, lambda t: [t.pop(name) for name in list(t) if name.endswith("g_idx")])
    configure(tmp_path, GPTQ)
    assert check(tmp_path).formats
    configure(tmp_path, {**GPTQ, "desc_act": True})
    assert "GPTQ with act-order (desc_act: true) without g_idx is not supported" in refusal(tmp_path)
    quantize(tmp_path / "w4a16", *FORMATS["w4a16"])
    configure(tmp_path / "w4a16", compressed_tensors({**W4A16, "actorder": "group"}))
    assert "act-order (actorder: group) is not supported" in refusal(tmp_path / "w4a16")


def test_biases_that_are_zero_are_no_obstacle(tmp_path):
    quantize(tmp_path, *FORMATS["gptq"])
    rewrite(tmp_path, add("bias", torch.zeros(64)))
    assert f"{EXPERT}.bias" not in check(tmp_path).tensors


@pytest.mark.parametrize(
    ("name", "edit", "named"),
    [
        ("gptq", change("g_idx", lambda t: t.flip(0)), "GPTQ with act-order (desc_act) is not supported"),
        ("w4a16", change("weight_shape", lambda t: t.flip(0) + 1), "weight_shape: must hold [64, 64]"),
        ("modelslim", change("weight_offset", lambda t: t + 1), "asymmetric int8 weights"),
    ],
)
def test_values_are_checked_while_loading(name, edit, named, tmp_path):
    quantize(tmp_path, *FORMATS[name])
    rewrite(tmp_path, edit)
    with pytest.raises(ValueError) as error:
        qkv_weight(tmp_path, check(tmp_path))
    assert str(error.value).startswith(EXPERT) and named in str(error.value)


def test_static_weights_are_symmetric(tmp_path):
    quantize_static(tmp_path, as_bits=False)
    name = "model.layers.0.self_attn.k_proj.weight_offset"
    rewrite(tmp_path, lambda t: t.update({name: torch.ones(t[name.replace("weight_offset", "deq_scale")].shape)}))
    with pytest.raises(ValueError, match="k_proj.weight_offset: asymmetric int8 weights"):
        qkv_weight(tmp_path, check(tmp_path))


def test_one_expert_has_another_format(tmp_path):
    quantize(tmp_path, *FORMATS["awq"])
    rewrite(tmp_path, drop("qzeros"))
    configure(tmp_path, {**AWQ, "zero_point": False})
    stored = check(tmp_path)
    with pytest.raises(ValueError, match=f"{EXPERT}.weight is AWQ, groups of 16, no zero points: the parts of .* must"):
        qkv_weight(tmp_path, stored)


@pytest.mark.parametrize(
    ("name", "value"),
    [("input_scale", 0.0), ("input_scale", torch.inf), ("input_scale", torch.nan), ("input_scale", -1.0)]
    + [("input_offset", value) for value in (1000.0, 3.7, torch.nan, 128.0)],
)
def test_static_activations_need_a_scale_and_an_offset(name, value, tmp_path):
    quantize_static(tmp_path, as_bits=False)
    attention = "model.layers.0.self_attn"
    rewrite(tmp_path, lambda t: [t[f"{attention}.{p}_proj.{name}"].fill_(value) for p in "qkvo"])
    with pytest.raises(ValueError, match=f"{name} must be "):
        qkv_weight(tmp_path, check(tmp_path))


@pytest.mark.parametrize("module", ["self_attn.q_proj", "self_attn.k_proj", "mlp.experts.0.gate_proj"])
def test_scalar_scale_in_one_of_merged_modules(module, tmp_path):
    quantize(tmp_path, *FORMATS["fp8"])
    name = f"model.layers.0.{module}.weight"
    rewrite(tmp_path, lambda t: t.update({f"{name}_scale_inv": torch.tensor(2.0)}))
    specs = parameter_specs(load_config(tmp_path), Layout())
    loaded = load_parameters(check(tmp_path), specs, torch.float32, CPU)
    [(spec, source)] = [(spec, source) for spec in specs for source in spec.sources if source.name == name]
    found = dequantize(loaded[spec.name], torch.float32)[source.region]
    assert torch.equal(found, load_file(tmp_path / "model.safetensors")[name].float() * 2.0)


def test_block_larger_than_every_matrix(tmp_path):
    config = {**FP8, "weight_block_size": [1 << 40, 1 << 40]}
    model = quantize(tmp_path, lambda matrix: fp8(matrix, tuple(matrix.shape)), config)
    attention = model.model.layers[0].self_attn
    exact = torch.cat([getattr(attention, f"{name}_proj").weight for name in "qkv"])
    assert torch.allclose(qkv_weight(tmp_path, check(tmp_path)), exact, atol=1e-6)


def test_half_of_a_merged_projection_is_quantised(tmp_path):
    quantize(tmp_path, *FORMATS["awq"], is_quantized=lambda module: not module.endswith("0.self_attn.k_proj"))
    stored = check(tmp_path)
    with pytest.raises(
        ValueError, match="q_proj.weight is quantised and model.layers.0.self_attn.k_proj.weight is not"
    ):
        qkv_weight(tmp_path, stored)


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"moe_tp": (0, 16)}, "parallel_config.moe_tp_size: cuts model.layers.0.mlp.experts.0.down_proj.weight (AWQ, "
         "groups of 16) into parts of its 64 columns that are not multiples of 8; possible: 1, 2, 4, 8"),
    ],
)  # fmt: skip
def test_splits_that_cut_words_name_the_legal_sizes(sizes, named, tmp_path):
    quantize(tmp_path, *FORMATS["awq"])
    specs = parameter_specs(load_config(tmp_path), Layout(**sizes))
    with pytest.raises(ValueError) as error:
        load_parameters(check(tmp_path), specs, torch.float32, CPU)
    assert str(error.value) == named


def test_modelslim_without_a_description_is_refused(tmp_path):
    """Nothing then says whether the activations are quantised."""
    quantize(tmp_path, modelslim, None)
    (tmp_path / "quant_model_description.json").unlink()
    assert "of int8 with no quantization_config, not int8 activations too (W8A16), is not" in refusal(tmp_path)


def test_names_of_files_of_other_tools(tmp_path):
    quantize(tmp_path, *FORMATS["modelslim"])
    (tmp_path / "model.safetensors").rename(tmp_path / "quant_model_weight_w8a8-00001-of-00001.safetensors")
    assert check(tmp_path).formats
    quantize(tmp_path / "gptq", *FORMATS["gptq"])
    (tmp_path / "gptq/model.safetensors").rename(tmp_path / "gptq/gptq_model-4bit-128g.safetensors")
    assert check(tmp_path / "gptq").formats


def test_base_model_names(tmp_path):
    quantize(tmp_path, *FORMATS["awq"])
    rewrite(tmp_path, lambda t: [t.update({key.removeprefix("model."): t.pop(key)}) for key in list(t)])
    assert len(check(tmp_path).formats) == 2 * (4 + 3 * CONFIG["num_experts"])


def test_a_quantised_router_is_dequantised(tmp_path, caplog):
    config = {**CONFIG, "num_experts": 16}
    model = make_checkpoint(tmp_path, **config)
    write, quantization_config = FORMATS["awq"]
    name = "model.layers.0.mlp.gate"
    tensors, exact = write(model.model.layers[0].mlp.gate.weight.detach())

    def edit(stored: Tensors) -> None:
        del stored[f"{name}.weight"]
        stored.update({f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()})

    rewrite(tmp_path, edit)
    configure(tmp_path, quantization_config)
    specs = parameter_specs(load_config(tmp_path), Layout())
    loaded = load_parameters(check(tmp_path), specs, torch.float32, CPU)
    assert torch.allclose(loaded["layers.0.mlp.gate.weight"], exact, atol=1e-6)
    assert (
        "layers.0.mlp.gate.weight is quantised in the checkpoint and dequantised to torch.float32 here" in caplog.text
    )
