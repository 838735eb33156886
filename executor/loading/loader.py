# SPDX-License-Identifier: Apache-2.0
"""Loads parameters from safetensors files, or initializes them randomly."""

import logging
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from executor.loading.checkpoint import StoredTensor, open_checked, read_headers, some, weight_files
from executor.utils.text import one_line
from models.layers.parameter import Parameters, ParameterSpec, Role, Source
from models.qwen3_moe.weights import EMBEDDING, HEAD, NOT_A_WEIGHT, name_in_model
from ops import DenseWeight

logger = logging.getLogger(__name__)

LOADABLE_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}  # safetensors dtype -> bytes per element
MAPPED_BYTES = 8 << 20  # remap the file after this many bytes, so that pages already copied are released
PROGRESS_FROM_BYTES = 1 << 30


@dataclass(frozen=True)
class Piece:
    """Slice of a stored tensor that is read in one call, and its destination in a parameter."""

    name: str
    part: tuple[slice, ...]
    target: torch.Tensor
    mapped_bytes: int


def load_parameters(
    model_path: Path,
    specs: list[ParameterSpec],
    whole_model: list[ParameterSpec],
    dtype: torch.dtype,
    device: torch.device,
    quiet: bool = False,
) -> Parameters:
    """Loads this rank's parameters `specs` from the checkpoint folder `model_path` onto `device`.

    Reads only this rank's shards; converts floating-point tensors to `dtype`. Raises ValueError before anything is
    allocated: for tensors of `whole_model` (all ranks' parameters) that are missing or of wrong shape or dtype, for
    unexpected tensors, and for missing or damaged files.
    """
    found = check_tensors(model_path, whole_model)
    values = {spec.name: torch.empty(spec.shape, dtype=dtype, device=device) for spec in specs}
    wanted: dict[Path, list[Piece]] = {}
    for spec in specs:
        for source in stored_sources(spec, found):
            tensor = found[source.name]
            target = values[spec.name][source.region]
            wanted.setdefault(tensor.file, []).extend(pieces(tensor, source, target))
    total = parameter_bytes(specs, dtype)
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="loading", disable=quiet or total < PROGRESS_FROM_BYTES
    ) as progress:
        for file in sorted(wanted):
            for part, target in read_parts(file, wanted[file]):
                target.copy_(part)
                progress.update(part.numel() * dtype.itemsize)
    return as_parameters(specs, values)


def random_parameters(
    specs: list[ParameterSpec], dtype: torch.dtype, device: torch.device, std: float, seed: int = 0
) -> Parameters:
    """Initializes the parameters `specs` with normal random numbers on the device; norm weights are ones.

    The seed of each tensor derives from its checkpoint name, so that all ranks hold shards of the same model.
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
    """Total size of the parameters in bytes."""
    return sum(torch.Size(spec.shape).numel() for spec in specs) * dtype.itemsize


def check_tensors(model_path: Path, whole_model: list[ParameterSpec]) -> dict[str, StoredTensor]:
    """Checks the checkpoint's tensors against the model (headers only); returns them by their names in the model."""
    needed = {source.name for spec in whole_model for source in (*spec.sources, *spec.stacked)}
    found: dict[str, StoredTensor] = {}
    for tensor in read_headers(weight_files(model_path)).values():
        name = name_in_model(tensor.name, needed)
        if name in found:
            raise ValueError(one_line(f"{tensor.file}: tensor {tensor.name} is in the checkpoint under two names"))
        found[name] = tensor
    skipped = [name for name in found if name not in needed and NOT_A_WEIGHT.fullmatch(name)]
    for name in skipped:
        del found[name]
    tied = found.pop(HEAD) if HEAD in found and HEAD not in needed else None
    if tied is not None and EMBEDDING not in found:  # lm_head serves as the embedding, as in transformers
        found[EMBEDDING], tied = tied, None
    sources = {source.name: source for spec in whole_model for source in stored_sources(spec, found)}
    check_shapes(model_path, found, sources)
    if tied is not None:
        check_equal(tied, found[EMBEDDING])
        skipped.append(f"{HEAD} (equals the embedding)")
    if skipped:
        logger.info("%s", one_line(f"{model_path}: tensors that are not needed: {some(skipped, 8)}"))
    return found


def stored_sources(spec: ParameterSpec, found: Collection[str]) -> tuple[Source, ...]:
    """Selects where the checkpoint stores a parameter: all experts stacked in one tensor, or one tensor per expert."""
    return spec.stacked if any(source.name in found for source in spec.stacked) else spec.sources


def check_shapes(model_path: Path, found: dict[str, StoredTensor], sources: dict[str, Source]) -> None:
    """Raises ValueError that lists missing tensors, unexpected tensors, wrong shapes and wrong dtypes."""
    wrong_shape = [
        f"{name} is {list(found[name].shape)} instead of {list(source.shape)}"
        for name, source in sources.items()
        if name in found and found[name].shape != source.shape
    ]
    wrong_dtype = [
        f"{name} is {found[name].dtype} instead of {', '.join(LOADABLE_BYTES)}"
        for name in sources
        if name in found and found[name].dtype not in LOADABLE_BYTES
    ]
    problems = {
        "missing": [name for name in sources if name not in found],
        "not expected": [found[name].name for name in found if name not in sources],
        "of wrong shape": wrong_shape,
        "of wrong dtype": wrong_dtype,
    }
    if any(problems.values()):
        text = "; ".join(f"{len(names)} {problem}: {some(names)}" for problem, names in problems.items() if names)
        raise ValueError(one_line(f"{model_path}: tensors do not fit the config: {text}"))


def check_equal(tied: StoredTensor, embedding: StoredTensor) -> None:
    """Raises ValueError if the config ties lm_head to an embedding that differs; transformers would not tie them."""
    equal = tied.shape == embedding.shape and tied.dtype == embedding.dtype
    rows = 1 + (MAPPED_BYTES - 1) // (embedding.shape[1] * LOADABLE_BYTES[embedding.dtype])
    for start in range(0, embedding.shape[0] if equal else 0, rows):
        with open_checked(tied.file) as first, open_checked(embedding.file) as second:
            one, other = (
                handle.get_slice(tensor.name)[start : start + rows]
                for handle, tensor in ((first, tied), (second, embedding))
            )
            equal = equal and torch.equal(one, other)
    if not equal:
        raise ValueError(
            one_line(
                f"{tied.file}: {tied.name} differs from the embedding {embedding.name}, but the config ties them: "
                "tie_word_embeddings must be false"
            )
        )


def read_parts(file: Path, wanted: list[Piece]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (slice, destination) of the wanted pieces of a file, with at most about MAPPED_BYTES mapped."""
    remaining = sorted(wanted, key=lambda piece: piece.name, reverse=True)
    while remaining:
        mapped = 0
        with open_checked(file) as handle:
            while remaining and mapped < MAPPED_BYTES:
                piece = remaining.pop()
                mapped += piece.mapped_bytes
                yield handle.get_slice(piece.name)[piece.part], piece.target


def pieces(tensor: StoredTensor, source: Source, target: torch.Tensor) -> Iterator[Piece]:
    """Splits the slice of a tensor that fills `target` along dimension 0 into pieces of about MAPPED_BYTES."""
    first, *others = source.part or (slice(None),)
    start, stop, _ = first.indices(source.shape[0])
    columns_apart = source.shape[-1] // target.shape[-1]  # column shard: most pages of the whole rows are touched
    row_bytes = target[0].numel() * columns_apart * LOADABLE_BYTES[tensor.dtype]
    count = max(1, MAPPED_BYTES // row_bytes)
    for at in range(start, stop, count):
        run = slice(at, min(at + count, stop))
        region = target[run.start - start : run.stop - start]
        yield Piece(tensor.name, (run, *others), region, (run.stop - run.start) * row_bytes)
