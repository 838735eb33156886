# SPDX-License-Identifier: Apache-2.0
"""Writes a planned checkpoint: its shards, index, config.json and the files that are carried over."""

import json
from functools import lru_cache
from pathlib import Path

import torch
from tqdm import tqdm

from executor.loading.checkpoint import INDEX_NAME, open_checked
from executor.quantize.calibration import read_scales
from executor.quantize.plan import WEIGHT, Job, Plan, float_modules, scale_dtype
from executor.quantize.scales import Folding, folding_of, layer_of
from executor.quantize.shards import TensorFile, copy_file, tensor_file, write_text
from executor.utils.files import files_in
from executor.utils.reading import refusing
from executor.utils.text import one_line

NOT_CARRIED = ("config.json", "card.json")  # what a card says of the float weights is not true of these
PIECE_BYTES = 8 << 20  # of unquantised tensors, which are copied in pieces
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


def write_checkpoint(plan: Plan, folder: Path, device: torch.device, scales_folder: Path | None) -> None:
    """Writes all files of the checkpoint into `folder`; shards that are there are finished and stay.

    device: that rounds. scales_folder: calibration of the layers, if there is one. ValueError for weights that are not
    finite.
    """
    reader = Reader(device, scales_folder)
    total = sum(job.stored_bytes for job in plan.jobs)
    with tqdm(total=total, unit="B", unit_scale=True, desc="quantizing") as progress:
        for index, shard in enumerate(plan.shards):
            file = folder / plan.shard_name(index)
            if file.exists():
                progress.update(sum(job.stored_bytes for job in shard))
                continue
            with tensor_file(file, {name: found for job in shard for name, found in job.outputs.items()}) as writing:
                for job in shard:
                    reader.transfer(plan, job, writing)
                    progress.update(job.stored_bytes)
    if len(plan.shards) > 1:
        write_text(folder / INDEX_NAME, index_of(plan))
    for source in carried_files(plan.model_path):
        copy_file(source, folder / source.name)
    raw = plan.raw_config | {"quantization_config": plan.recipe.configuration(float_modules(plan.config))}
    write_text(folder / "config.json", json.dumps(raw, indent=2, ensure_ascii=False) + "\n")


class Reader:
    """Reads stored tensors, scales and quantises them."""

    def __init__(self, device: torch.device, scales_folder: Path | None):
        self.device = device
        self.scales_folder = scales_folder
        self.read_scales = lru_cache(maxsize=1)(read_scales)  # of the layer at hand

    def transfer(self, plan: Plan, job: Job, writing: TensorFile) -> None:
        """Writes what becomes of a stored tensor."""
        folding = self.folding(job.name)
        if job.is_quantized:
            weight = scaled(read(job, job.part), job, folding).to(self.device)
            importance = None
            if folding is not None and folding.importance is not None:
                importance = folding.importance.to(self.device)
            written = plan.recipe.quantize(job.name.removesuffix(WEIGHT), weight, scale_dtype(job.dtype), importance)
            for name, tensor in written.items():
                writing.write(name, tensor.cpu())
            return
        row_bytes = job.stored_bytes // job.shape[0]
        count = max(1, PIECE_BYTES // row_bytes) if folding is None else job.shape[0]  # scaled ones are small
        for start in range(0, job.shape[0], count):
            rows = scaled(read(job, (slice(start, start + count),)), job, folding)
            writing.write(job.name, rows, start * row_bytes)

    def folding(self, name: str) -> Folding | None:
        layer = layer_of(name)
        if self.scales_folder is None or layer is None:
            return None
        return folding_of(name, self.read_scales(self.scales_folder, layer))


def read(job: Job, part: tuple[int | slice, ...]) -> torch.Tensor:
    """Reads a slice of a stored tensor. The file is opened anew: pages of a mapped file would stay in memory."""
    with open_checked(job.stored.file) as handle, refusing(str(job.stored.file), job.stored.name):
        return handle.get_slice(job.stored.name)[part or ...]


def scaled(tensor: torch.Tensor, job: Job, folding: Folding | None) -> torch.Tensor:
    """Applies the scales of the calibration. ValueError for values that are not finite, or would not be."""
    result = tensor if folding is None else folding.apply(tensor)
    if not job.is_quantized:
        result = result.to(job.dtype)
    if not result.isfinite().all():
        why = "" if not tensor.isfinite().all() else " once scaled"
        raise ValueError(one_line(f"{job.stored.file}: {job.name} has values that are not finite{why}"))
    return result


def index_of(plan: Plan) -> str:
    """Text of model.safetensors.index.json."""
    files = {name: plan.shard_name(at) for at, shard in enumerate(plan.shards) for job in shard for name in job.outputs}
    total = sum(job.nbytes for job in plan.jobs)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}, indent=2) + "\n"


def carried_files(model_path: Path) -> list[Path]:
    """Files of a checkpoint that are copied: not weights, their indexes, config.json, cards, programs, hidden files."""

    def is_carried(file: Path) -> bool:
        is_other = file.name.endswith((".index.json", ".md", ".py", *WEIGHT_SUFFIXES)) or file.name in NOT_CARRIED
        return file.is_file() and not is_other and not file.name.startswith(".")

    return sorted(file for file in files_in(model_path) if is_carried(file))
