# SPDX-License-Identifier: Apache-2.0
"""Fills a model's parameters from safetensors files, all or nothing, or with random numbers."""

import json
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from models.layers.parameter import Parameters, ParameterSpec, Role, Source
from ops import DenseWeight

logger = logging.getLogger(__name__)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
LOADABLE_DTYPES = ("F32", "BF16", "F16")
MAPPED_BYTES = 8 << 20  # a file is mapped anew after that many bytes, so that pages already copied leave memory
PROGRESS_FROM_BYTES = 1 << 30


def load_parameters(
    model_path: Path,
    specs: list[ParameterSpec],
    whole_model: list[ParameterSpec],
    dtype: torch.dtype,
    device: torch.device,
    quiet: bool = False,
) -> Parameters:
    """Reads this rank's parameters `specs` from the checkpoint folder `model_path` into memory of `device`.

    Only the parts they need are read; floating-point tensors are converted to `dtype`. Raises ValueError, before
    anything is allocated, naming the tensors of `whole_model` (all ranks' parameters) that are missing, of another
    shape or type, tensors it does not expect, and files that are missing or damaged.
    """
    files = weight_files(model_path)
    check_tensors(model_path, files, whole_model)
    values = {spec.name: torch.empty(spec.shape, dtype=dtype, device=device) for spec in specs}
    sources = {source.name: source for spec in specs for source in spec.sources}
    targets = {source.name: values[spec.name][source.region] for spec in specs for source in spec.sources}
    total = parameter_bytes(specs, dtype)
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="loading", disable=quiet or total < PROGRESS_FROM_BYTES
    ) as progress:
        for file in files:
            for name, part in read_parts(file, sources):
                targets[name].copy_(part)
                progress.update(part.numel() * dtype.itemsize)
    return as_parameters(specs, values)


def random_parameters(
    specs: list[ParameterSpec], dtype: torch.dtype, device: torch.device, std: float, seed: int = 0
) -> Parameters:
    """The same parameters as normal random numbers made on the device; norms are ones.

    A tensor's numbers follow from its name in the checkpoint, so that ranks hold parts of one and the same model.
    """
    generator = torch.Generator(device)
    values = {}
    for spec in specs:
        values[spec.name] = torch.ones(spec.shape, dtype=dtype, device=device)
        for source in spec.sources if spec.role is not Role.NORM else ():
            generator.manual_seed(seed + zlib.crc32(source.name.encode()))
            whole = torch.empty(source.shape, dtype=dtype, device=device).normal_(0, std, generator=generator)
            values[spec.name][source.region] = whole[source.part]
    return as_parameters(specs, values)


def as_parameters(specs: list[ParameterSpec], values: dict[str, torch.Tensor]) -> Parameters:
    return Parameters(
        {spec.name: DenseWeight(values[spec.name]) if spec.role is Role.MATRIX else values[spec.name] for spec in specs}
    )


def parameter_bytes(specs: list[ParameterSpec], dtype: torch.dtype) -> int:
    """Memory of all parameters."""
    return sum(torch.Size(spec.shape).numel() for spec in specs) * dtype.itemsize


def weight_files(model_path: Path) -> list[Path]:
    """The checkpoint's weight files: those its index names, or the single file. Other files beside them don't count."""
    index = model_path / INDEX_NAME
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if not names or not all(isinstance(name, str) for name in names):
                raise ValueError("its weight_map has no file names")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: not a safetensors index: {error!r}") from None
        absent = [name for name in names if not (model_path / name).is_file()]
        if absent:
            raise ValueError(f"{index}: {some(absent)} named there but not in the folder (an incomplete download?)")
        return [model_path / name for name in names]
    if not (model_path / SINGLE_NAME).is_file():
        raise ValueError(f"model_path: {model_path} has neither {INDEX_NAME} nor {SINGLE_NAME}")
    return [model_path / SINGLE_NAME]


def check_tensors(model_path: Path, files: list[Path], specs: list[ParameterSpec]) -> None:
    """Compares what the files hold with what the model needs, headers only."""
    sources = {source.name: source for spec in specs for source in spec.sources}
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        with open_checked(file) as handle:
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                if name in found:
                    raise ValueError(f"{file}: tensor {name} is also in another file of this checkpoint")
                tensor = handle.get_slice(name)
                found[name] = (tuple(tensor.get_shape()), tensor.get_dtype())
    if "lm_head.weight" in found and "lm_head.weight" not in sources:
        raise ValueError(f"{model_path}: lm_head.weight is not expected, as the config ties it to the embedding")
    wrong_shape = [
        f"{name} is {list(found[name][0])} instead of {list(source.shape)}"
        for name, source in sources.items()
        if name in found and found[name][0] != source.shape
    ]
    wrong_dtype = [
        f"{name} is {found[name][1]} instead of {', '.join(LOADABLE_DTYPES)}"
        for name in sources
        if name in found and found[name][1] not in LOADABLE_DTYPES
    ]
    problems = {
        "missing": [name for name in sources if name not in found],
        "not expected": [name for name in found if name not in sources],
        "of another shape": wrong_shape,
        "of another type": wrong_dtype,
    }
    if any(problems.values()):
        text = "; ".join(f"{len(names)} {problem}: {some(names)}" for problem, names in problems.items() if names)
        raise ValueError(f"{model_path}: tensors do not fit the config: {text}")


def open_checked(file: Path) -> safe_open:
    """An open safetensors file; ValueError if it is truncated or not one."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: truncated or not a safetensors file: {error}") from None


def read_parts(file: Path, sources: dict[str, Source]) -> Iterator[tuple[str, torch.Tensor]]:
    """The wanted parts of a file's tensors, with at most about MAPPED_BYTES of it in memory."""
    remaining = None
    while remaining is None or remaining:
        mapped = 0
        with open_checked(file) as handle:
            if remaining is None:
                remaining = sorted(set(handle.keys()) & set(sources), reverse=True)
            while remaining and mapped < MAPPED_BYTES:
                source = sources[remaining.pop()]
                part = handle.get_slice(source.name)[source.part or ...]
                rows_apart = len(source.part) > 1  # then most pages of the whole tensor are touched
                mapped += part.nbytes * (source.shape[-1] // part.shape[-1] if rows_apart else 1)
                yield source.name, part
                del part


def some(names: list[str], limit: int = 3) -> str:
    """The first few of a list, for one line of text."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
