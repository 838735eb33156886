# SPDX-License-Identifier: Apache-2.0
"""Plan of a quantised checkpoint, from headers only: which tensors it has, and how they are divided into files."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig

from executor.loading.before_loading import load_config
from executor.loading.checkpoint import StoredTensor, read_description, read_unique_object
from executor.loading.stored_model import DTYPES, StoredModel, check_tensors
from executor.quantize.recipe import Recipe
from executor.utils.reading import refusing
from executor.utils.text import one_line, quoted
from models.layers.parameter import ParameterSpec, Role
from models.quantization.scheme import Scheme
from models.qwen3_moe.sharding import Layout
from models.qwen3_moe.weights import HEAD, is_sparse_layer, parameter_specs

WEIGHT = ".weight"


@dataclass(frozen=True)
class Job:
    """A tensor of the model and the stored tensor, or slice of one, that holds it.

    `outputs`: dtype and shape of what is written for it, by name.
    """

    name: str
    stored: StoredTensor
    part: tuple[int | slice, ...]
    shape: tuple[int, ...]
    is_quantized: bool
    outputs: dict[str, tuple[torch.dtype, tuple[int, ...]]]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.stored.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes to write."""
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.outputs.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes to read."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is known before the first weight is read."""

    model_path: Path
    raw_config: dict[str, Any]
    config: Qwen3MoeConfig
    stored: StoredModel
    recipe: Recipe
    shards: list[list[Job]]

    @property
    def jobs(self) -> list[Job]:
        return [job for shard in self.shards for job in shard]

    def shard_name(self, index: int) -> str:
        count = len(self.shards)
        return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def make_plan(model_path: Path, recipe: Recipe, shard_bytes: int) -> Plan:
    """Checks the checkpoint and plans the new one. ValueError for what cannot be quantised."""
    with refusing("--model_path"):
        is_folder = model_path.is_dir()
    if not is_folder:
        raise ValueError(one_line(f"--model_path: {model_path} is not the folder of a checkpoint"))
    raw = read_unique_object(model_path / "config.json")
    refuse_quantized(model_path, raw)
    config = load_config(model_path)
    specs = parameter_specs(config, Layout())
    stored = check_tensors(model_path, specs, Scheme())
    if stored.formats:
        name, found = next(iter(stored.formats.items()))
        raise already_quantized(model_path, f"{name}: {found.name}")
    matrices = [spec for spec in specs if is_quantized(spec)]
    recipe.check_widths({spec.sources[0].name: spec.shape[-1] for spec in matrices})
    jobs = [job for spec in specs for job in jobs_of(spec, stored, recipe)]
    return Plan(
        model_path=model_path,
        raw_config=raw,
        config=config,
        stored=stored,
        recipe=recipe,
        shards=divided(jobs, shard_bytes),
    )


def refuse_quantized(model_path: Path, raw: dict[str, Any]) -> None:
    """Raises ValueError for a checkpoint that declares a quantisation."""
    declared = raw.get("quantization_config", raw.get("compression_config"))
    if declared is not None:
        method = declared.get("quant_method") if isinstance(declared, dict) else declared
        raise already_quantized(model_path, f"quant_method {quoted(method)} in its config.json")
    if read_description(model_path) is not None:
        raise already_quantized(model_path, "it has a quant_model_description of msModelSlim")


def already_quantized(model_path: Path, why: str) -> ValueError:
    return ValueError(one_line(f"--model_path: {model_path} is already quantised ({why}): give the float checkpoint"))


def is_quantized(spec: ParameterSpec) -> bool:
    """Whether a parameter is quantised: the matrices of attention and feed-forward blocks, but for routers."""
    return spec.role is Role.MATRIX and spec.sources[0].name != HEAD


def jobs_of(spec: ParameterSpec, stored: StoredModel, recipe: Recipe) -> list[Job]:
    """Jobs of a parameter, one for each tensor of the published layout, where experts are not stacked."""
    stacked = None if spec.sources[0].name in stored.tensors else stored.tensors[spec.stacked[0].name]
    jobs = []
    for source in spec.sources:
        tensor = stored.tensors[source.name] if stacked is None else stacked
        part = () if stacked is None else source.region
        dtype = DTYPES[tensor.dtype]
        outputs = {source.name: (dtype, source.shape)}
        if is_quantized(spec):
            module = source.name.removesuffix(WEIGHT)
            found = recipe.stored(source.shape, scale_dtype(dtype))
            outputs = {f"{module}{suffix}": one for suffix, one in found.items()}
        jobs.append(Job(source.name, tensor, part, source.shape, is_quantized(spec), outputs))
    return jobs


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the scales of weights that are stored in `dtype`: the same, but float64 is not read by all."""
    return torch.float32 if dtype is torch.float64 else dtype


def divided(jobs: list[Job], shard_bytes: int) -> list[list[Job]]:
    """Divides the jobs, in order, into files of at most `shard_bytes`; a larger tensor has a file of its own."""
    shards: list[list[Job]] = []
    size = 0
    for job in jobs:
        if not shards or size + job.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(job)
        size += job.nbytes
    return shards


def float_modules(config: Qwen3MoeConfig) -> list[str]:
    """Names of the linear modules that stay float: routers and lm_head."""
    layers = range(config.num_hidden_layers)
    return [*(f"model.layers.{layer}.mlp.gate" for layer in layers if is_sparse_layer(config, layer)), "lm_head"]
