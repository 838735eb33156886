# SPDX-License-Identifier: Apache-2.0
"""Quantises small random Qwen3-MoE models with the tools that users' checkpoints come from, one folder a checkpoint.

Each tool runs in a Python 3.11 environment of its own, on the CPU, with HF_HUB_OFFLINE=1. WORK is a scratch folder
outside the repository; `source` fills it with the unquantised models and goes first, `expected_logits.py` goes last.

    python make_fixtures.py source WORK          the environment of the tests
    python make_fixtures.py llmcompressor WORK   llmcompressor==0.14.0.1 torch==2.13.0 (compressed-tensors
                                                 0.19.0, transformers 5.17.0)
    python make_fixtures.py autoawq WORK         autoawq==0.2.9, --no-deps --no-build-isolation, after torch==2.6.0
                                                 transformers==4.51.3 accelerate datasets tokenizers zstandard
    python make_fixtures.py gptqmodel WORK       gptqmodel==7.7.0, --no-deps --no-build-isolation, after torch==2.13.0
                                                 and the rest of its requirements.txt (transformers 5.24.0);
                                                 with two cores it wants GPTQMODEL_CPU_WORKERS=2
    python make_fixtures.py msmodelslim WORK     msmodelslim==26.1.0 torch==2.6.0 transformers==4.57.6 accelerate, and
                                                 PYTHONPATH=M, where M has the folder `example` of its source
                                                 repository (Ascend/msmodelslim, commit 3de0a3c), which wheels lack
    python make_fixtures.py fp8 WORK             the environment of llmcompressor (transformers 5.17.0)
    python expected_logits.py WORK               the environment of the tests: `logits.safetensors` of every folder

All of them are what the tool itself wrote, less tokenizers and logs, but for `fp8_partial_blocks`: transformers leaves
a matrix that is no multiple of 128 unquantised, so that one is written here, with bfloat16 scales as Qwen's own
checkpoints have. For `fp8_transformers` its check for a GPU is passed over; what it does after that is plain torch.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
KEPT = ("config.json", "generation_config.json", "quantize_config.json", "quant_model_description.json")
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WHOLE_BLOCKS = {"hidden_size": 128, "head_dim": 64, "num_attention_heads": 2, "moe_intermediate_size": 128}
SOURCES: dict[str, dict[str, Any]] = {
    "one_layer": {},
    "one_layer_float16": {},
    "two_experts": {"num_experts": 2},
    "two_layers": {"num_hidden_layers": 2},
    "three_rotated_blocks": {"hidden_size": 96, "num_experts": 2},  # msModelSlim leaves the first two as they are
    "whole_blocks": {**WHOLE_BLOCKS, "num_experts": 2},
    "partial_blocks": {"hidden_size": 128, "head_dim": 16, "moe_intermediate_size": 136, "num_experts": 2},
}
SOURCE_OF = {
    "llmcompressor_w8a8": "one_layer",
    "llmcompressor_w4a16": "two_layers",
    "llmcompressor_w4a16_asymmetric": "one_layer",
    "autoawq": "one_layer",
    "gptqmodel_gptq": "one_layer",
    "gptqmodel_gptq_desc_act": "two_experts",
    "gptqmodel_gptq_asymmetric": "two_experts",
    "gptqmodel_gptq_v2": "two_experts",
    "gptqmodel_awq": "one_layer",
    "msmodelslim_v0": "one_layer",
    "msmodelslim_v0_rotated": "three_rotated_blocks",
    "msmodelslim_v1_rotated": "one_layer_float16",
    "fp8_transformers": "whole_blocks",
    "fp8_partial_blocks": "partial_blocks",
}


def make_source(work: Path) -> None:
    """Saves the random models, their config.json as transformers 4 and 5 both read it."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    for name, changes in SOURCES.items():
        sizes = {**SIZES, **changes}
        torch.manual_seed(7)
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "norm" in key:
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(0, 1.0 if "embed" in key else 1.5 / parameter.shape[-1] ** 0.5)
        dtype = "float16" if "float16" in name else "bfloat16"
        model.to(getattr(torch, dtype)).save_pretrained(work / name)
        config = json.loads((work / name / "config.json").read_text())
        for key in ("dtype", "rope_parameters", "num_local_experts"):
            config.pop(key, None)
        config |= {"torch_dtype": dtype, "rope_theta": sizes["rope_theta"], "rope_scaling": None}
        config["num_experts"] = sizes["num_experts"]
        (work / name / "config.json").write_text(json.dumps(config, indent=2))


def calibration_rows(rows: int = 64, length: int = 64) -> list[list[int]]:
    """Random token ids: what a tool that wants data is calibrated with."""
    generator = torch.Generator().manual_seed(11)
    return torch.randint(3, SIZES["vocab_size"], (rows, length), generator=generator).tolist()


def output(name: str) -> str:
    """Empties the fixture's folder and returns its path."""
    shutil.rmtree(HERE / name, ignore_errors=True)
    return str(HERE / name)


def tidy(name: str) -> None:
    """Removes what no loader of weights reads, and makes the files readable for all."""
    for path in sorted((HERE / name).rglob("*"), reverse=True):
        if path.is_dir():
            path.chmod(0o755)
        elif path.suffix == ".safetensors" or path.name.endswith(".index.json") or path.name in KEPT:
            path.chmod(0o644)
        else:
            path.unlink()
    (HERE / name).chmod(0o755)


def make_llmcompressor(work: Path) -> None:
    """Writes llmcompressor's W8A8 and its W4A16, symmetric and asymmetric, which need no data."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    def groups_of_32(symmetric: bool) -> dict[str, Any]:
        weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": symmetric}
        return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}

    recipes: dict[str, dict[str, Any]] = {
        "llmcompressor_w8a8": {"targets": ["Linear"], "scheme": "W8A8"},
        "llmcompressor_w4a16": groups_of_32(symmetric=True),
        "llmcompressor_w4a16_asymmetric": groups_of_32(symmetric=False),
    }
    for name, recipe in recipes.items():
        model = AutoModelForCausalLM.from_pretrained(work / SOURCE_OF[name], dtype="auto")
        oneshot(model=model, recipe=QuantizationModifier(ignore=["lm_head", r"re:.*mlp\.gate$"], **recipe))
        model.save_pretrained(output(name), save_compressed=True)
        tidy(name)


def make_autoawq(work: Path) -> None:
    """Writes AutoAWQ's GEMM layout with zero points."""
    from awq import AutoAWQForCausalLM

    model = AutoAWQForCausalLM.from_pretrained(str(work / SOURCE_OF["autoawq"]), device_map="cpu", use_cache=False)
    settings = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    settings["modules_to_not_convert"] = ["mlp.gate"]
    model.quantize(None, quant_config=settings, calib_data=calibration_rows(), max_calib_seq_len=64)
    model.save_quantized(output("autoawq"))
    tidy("autoawq")


def make_gptqmodel(work: Path) -> None:
    """Writes GPTQModel's GPTQ, its variants in activation order and with true zero points, and its AWQ."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    variants: dict[str, dict[str, Any]] = {
        "gptqmodel_gptq": {},
        "gptqmodel_gptq_desc_act": {"desc_act": True},
        "gptqmodel_gptq_asymmetric": {"sym": False},
        "gptqmodel_gptq_v2": {"format": "gptq_v2", "sym": False},
        "gptqmodel_awq": {"quant_method": "awq", "format": "gemm"},
    }
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in calibration_rows()]
    for name, settings in variants.items():
        settings = {"bits": 4, "group_size": 32, "desc_act": False, "offload_to_disk": False, **settings}
        model = GPTQModel.load(str(work / SOURCE_OF[name]), QuantizeConfig(**settings), device="cpu")
        model.quantize(rows, batch_size=8, backend=BACKEND.TORCH)
        model.save(output(name))
        tidy(name)


def make_msmodelslim(work: Path) -> None:
    """Writes msModelSlim's W8A8 (experts dynamic, attention static): API v0, v0 rotated, v1 rotated."""
    for name, rotated in (("msmodelslim_v0", False), ("msmodelslim_v0_rotated", True)):
        make_msmodelslim_v0(work / SOURCE_OF[name], name, rotated)
    make_msmodelslim_v1(work, "msmodelslim_v1_rotated")


def make_msmodelslim_v0(source: Path, name: str, rotated: bool) -> None:
    """Does what example/Qwen3-MOE/quant_qwen_moe_w8a8.py does, on the CPU; `rotated` is its --rot."""
    from functools import partial

    from example.common.copy_config_files import copy_config_files, modify_config_json
    from example.common.rot_utils.rot_qwen import rot_model
    from msmodelslim.pytorch.llm_ptq.anti_outlier import AntiOutlier, AntiOutlierConfig
    from msmodelslim.pytorch.llm_ptq.llm_ptq_tools import Calibrator, QuantConfig
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", attn_implementation="eager")
    model.config.use_cache = False
    data = [[rows, torch.ones_like(rows)] for rows in torch.tensor(calibration_rows()).split(4)]
    with torch.no_grad():
        if rotated:
            rot_model(model)
        smoothing = AntiOutlierConfig(w_bit=8, a_bit=8, anti_method="m4", dev_type="cpu")
        AntiOutlier(model, calib_data=data, cfg=smoothing).process()
    gates = [f"model.layers.{layer}.mlp.gate" for layer in range(model.config.num_hidden_layers)]
    settings = {"a_bit": 8, "w_bit": 8, "act_method": 1, "pr": 1.0, "w_sym": True, "mm_tensor": False}
    quant_config = QuantConfig(disable_names=gates, dev_type="cpu", **settings)
    kinds = {"*.mlp.*": "w8a8_dynamic", "*": "w8a8"}
    calibrator = Calibrator(model, quant_config, calib_data=data, disable_level="L0", mix_cfg=kinds)
    calibrator.run()
    folder = output(name)
    calibrator.save(
        folder,
        json_name="quant_model_description.json",
        safetensors_name="quant_model_weight_w8a8_dynamic.safetensors",
        save_type=["ascendV1"],
        part_file_size=4,
    )
    hook = partial(modify_config_json, custom_hook=lambda config: config.update(quantize="w8a8_dynamic"))
    copy_config_files(str(source), folder, quant_config, mindie_format=False, custom_hooks={"config.json": hook})
    tidy(name)


def make_msmodelslim_v1(work: Path, name: str) -> None:
    """Runs `msmodelslim quant` with the processors of its recipes for MoE; float16 makes it write int64 `deq_scale`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    source, recipe, data = work / SOURCE_OF[name], work / "recipe.yaml", work / "calibration.jsonl"
    words = Tokenizer(models.WordLevel({str(token): token for token in range(SIZES["vocab_size"])}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", unk_token="0").save_pretrained(source)
    lines = [json.dumps({"inputs_pretokenized": " ".join(map(str, row))}) for row in calibration_rows()]
    data.write_text("\n".join(lines))

    def linear(scope: str, symmetric: bool, include: str) -> dict[str, Any]:
        common = {"dtype": "int8", "method": "minmax"}
        activations = {"scope": scope, "symmetric": symmetric, **common}
        weights = {"scope": "per_channel", "symmetric": True, **common}
        return {"type": "linear_quant", "qconfig": {"act": activations, "weight": weights}, "include": [include]}

    smoothing = {"type": "flex_smooth_quant", "enable_subgraph_type": ["norm-linear", "ov"], "include": ["*"]}
    static, dynamic = linear("per_tensor", False, "*self_attn*"), linear("per_token", True, "*experts*")
    settings = {
        "apiversion": "modelslim_v1",
        "metadata": {
            "config_id": "qwen3-moe-w8a8",
            "score": 90,
            "verified_model_types": ["Qwen3-30B"],
            "label": {"w_bit": 8, "a_bit": 8, "is_sparse": False, "kv_cache": False},
        },
        "spec": {
            "dataset": str(data),
            "process": [{"type": "quarot", "block_size": 32}, smoothing, static, dynamic],
            "save": [{"type": "ascendv1_saver", "part_file_size": 4}],
        },
    }
    recipe.write_text(json.dumps(settings))
    command = [str(Path(sys.executable).with_name("msmodelslim")), "quant", "--model_type", "Qwen3-30B"]
    command += ["--model_path", str(source), "--save_path", output(name), "--config_path", str(recipe)]
    subprocess.run([*command, "--device", "cpu"], check=True)
    tidy(name)


def make_fp8(work: Path) -> None:
    """Writes Qwen's own FP8 layout: by transformers, and here for a matrix with a partial last block."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    FineGrainedFP8HfQuantizer.validate_environment = lambda self, *args, **kwargs: None
    layer = "model.layers.0"
    kept = ["lm_head", f"{layer}.input_layernorm", f"{layer}.mlp.gate", f"{layer}.post_attention_layernorm"]
    model = AutoModelForCausalLM.from_pretrained(
        work / SOURCE_OF["fp8_transformers"],
        dtype="auto",
        device_map="cpu",
        quantization_config=FineGrainedFP8Config(modules_to_not_convert=kept),
    )
    model.save_pretrained(output("fp8_transformers"))
    tidy("fp8_transformers")

    source, folder = work / SOURCE_OF["fp8_partial_blocks"], Path(output("fp8_partial_blocks"))
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if "_proj." in name]:
        values, inverse = fp8_blocks(tensors[name].float())
        tensors |= {name: values, name.replace(".weight", ".weight_scale_inv"): inverse}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": kept,
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tidy("fp8_partial_blocks")


def fp8_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises `weight` [N, K] float32 in blocks of 128 x 128: e4m3 [N, K], bfloat16 scales [ceil N, ceil K]."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    scales = torch.empty(rows, columns, dtype=torch.bfloat16)
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for row in range(rows):
        for column in range(columns):
            block = (slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128))
            scales[row, column] = weight[block].abs().max() / 448
            values[block] = (weight[block] / scales[row, column].float()).clamp(-448, 448).to(values.dtype)
    return values, scales


def main() -> None:
    """Runs one of the tools."""
    tools = {
        "source": make_source,
        "llmcompressor": make_llmcompressor,
        "autoawq": make_autoawq,
        "gptqmodel": make_gptqmodel,
        "msmodelslim": make_msmodelslim,
        "fp8": make_fp8,
    }
    parser = argparse.ArgumentParser()
    parser.add_argument("tool", choices=tools)
    parser.add_argument("work", type=Path)
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(exist_ok=True)
    os.chdir(work)  # where GPTQModel leaves its logs
    tools[arguments.tool](work)


if __name__ == "__main__":
    main()
