# SPDX-License-Identifier: Apache-2.0
"""Loads parameters from safetensors files, or initializes them randomly."""

import logging
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from executor.loading.checkpoint import StoredTensor, open_checked
from executor.loading.stored_model import DTYPES, StoredModel
from executor.utils.text import one_line
from models.layers.parameter import Parameters, ParameterSpec, Role, Source
from models.quantization.format import Check, Component, Field, Shared, ranges_of, region_of
from models.quantization.rounding import rounding_of
from models.quantization.scheme import Scheme
from ops import DenseWeight, Weight
from ops.weight import dequantize

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
MAPPED_BYTES = 8 << 20  # remap the file after this many bytes, so that pages already copied are released
PROGRESS_FROM_BYTES = 1 << 30


@dataclass(frozen=True)
class Piece:
    """Slice of a stored tensor that is read in one call, and what becomes of it."""

    name: str
    part: tuple[slice, ...]
    store: Callable[[torch.Tensor], None]
    mapped_bytes: int


def load_parameters(
    stored: StoredModel, specs: list[ParameterSpec], dtype: torch.dtype, device: torch.device, quiet: bool = False
) -> Parameters:
    """Loads this rank's parameters `specs` from a checked checkpoint onto `device`.

    Reads only this rank's shards; converts unquantised tensors to `dtype`. Raises ValueError before anything is
    allocated for splits that a format does not allow, and while loading for values that are not supported.
    """
    fields = {spec.name: stored.fields(spec, dtype) for spec in specs}
    values = {
        name: {key: torch.empty(field.shape, dtype=field.dtype, device=device) for key, field in found.items()}
        for name, found in fields.items()
    }
    wanted: dict[Path, list[Piece]] = {}
    for spec in specs:
        for tensor, piece in pieces_of(spec, stored, fields[spec.name], values[spec.name]):
            wanted.setdefault(tensor.file, []).append(piece)
    total = sum(field.nbytes for found in fields.values() for field in found.values())
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="loading", disable=quiet or total < PROGRESS_FROM_BYTES
    ) as progress:
        for file in sorted(wanted):
            for part, piece in read_parts(file, wanted[file]):
                piece.store(part)
                progress.update(part.nbytes)
    return Parameters({spec.name: as_parameter(spec, stored, values[spec.name], dtype) for spec in specs})


def as_parameter(
    spec: ParameterSpec, stored: StoredModel, tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> torch.Tensor | Weight:
    if spec.role is Role.MATRIX:
        return stored.weight_type(spec)(**tensors)
    if not stored.is_quantized(spec):
        return tensors["data"]
    logger.warning("%s", one_line(f"{spec.name} is quantised in the checkpoint and dequantised to {dtype} here"))
    return dequantize(stored.weight_type(spec)(**tensors), dtype)


def random_parameters(
    specs: list[ParameterSpec],
    dtype: torch.dtype,
    device: torch.device,
    std: float,
    seed: int = 0,
    scheme: Scheme | None = None,
) -> Parameters:
    """Initializes the parameters `specs` with normal random numbers on the device; norm weights are ones.

    The seed of each tensor derives from its checkpoint name, so that all ranks hold shards of the same model. Modules
    that `scheme` declares as quantised are rounded to their format shard by shard: splits of columns differ slightly.
    """
    generator = torch.Generator(device)
    values: dict[str, torch.Tensor | Weight] = {}
    for spec in specs:
        value = torch.ones(spec.shape, dtype=dtype, device=device)
        for source in spec.sources if spec.role is not Role.NORM else ():
            generator.manual_seed(seed + zlib.crc32(source.name.encode()))
            whole = torch.empty(source.shape, dtype=dtype, device=device).normal_(0, std, generator=generator)
            value[source.region] = whole[source.part]
        values[spec.name] = value
        if spec.role is Role.MATRIX:
            round_weight = rounding_of(spec.sources[0].name.removesuffix(".weight"), scheme or Scheme())
            values[spec.name] = DenseWeight(value) if round_weight is None else rounded_on_host(round_weight, value)
    return Parameters(values)


def rounded_on_host(round_weight: Callable[[torch.Tensor], Weight], value: torch.Tensor) -> Weight:
    """Rounds a weight, on the host if its device is an NPU: these compute neither in float8 nor with all integers."""
    if value.device.type != "npu":
        return round_weight(value)
    weight = round_weight(value.cpu())
    tensors = {name: tensor.to(value.device) for name, tensor in weight.tensors.items()}
    return replace(weight, **tensors)  # type: ignore[type-var]


def random_bytes(spec: ParameterSpec, dtype: torch.dtype, scheme: Scheme, dequantized: tuple[type[Weight], ...]) -> int:
    """Bytes of a random parameter for a backend that converts the weight types `dequantized` to unquantised ones."""
    one = torch.empty(spec.shape[-2:], dtype=dtype, device="meta")
    round_weight = rounding_of(spec.sources[0].name.removesuffix(".weight"), scheme)
    rounded = None if spec.role is not Role.MATRIX or round_weight is None else round_weight(one)
    size = one.nbytes if rounded is None or isinstance(rounded, dequantized) else rounded.nbytes
    return size * torch.Size(spec.shape[:-2]).numel()


def read_parts(file: Path, wanted: list[Piece]) -> Iterator[tuple[torch.Tensor, Piece]]:
    """Reads the wanted pieces of a file, with at most about MAPPED_BYTES mapped."""
    remaining = sorted(wanted, key=lambda piece: piece.name, reverse=True)
    while remaining:
        mapped = 0
        with open_checked(file) as handle:
            while remaining and mapped < MAPPED_BYTES:
                piece = remaining.pop()
                mapped += piece.mapped_bytes
                whole = not piece.part  # a scalar cannot be sliced
                yield handle.get_tensor(piece.name) if whole else handle.get_slice(piece.name)[piece.part], piece


def pieces_of(
    spec: ParameterSpec, stored: StoredModel, fields: dict[str, Field], tensors: dict[str, torch.Tensor]
) -> Iterator[tuple[StoredTensor, Piece]]:
    """Everything to read for a parameter: stored tensors, and pieces of them that fill `tensors`."""
    if not stored.is_quantized(spec):
        for source in stored.sources(spec):
            tensor = stored.tensors[source.name]
            yield from ((tensor, piece) for piece in dense_pieces(tensor, source, tensors["data"][source.region]))
        return
    filled: set[str] = set()  # shared fields
    for source in spec.sources:
        found = stored.formats[source.name]
        for component in found.components:
            tensor, unit = stored.tensors[component.name], fields[component.field].unit
            target = tensors[component.field][region_of(source, len(spec.shape), unit)]
            yield tensor, component_piece(tensor, component, source, target, unit)
        for shared in found.shared:
            store = partial(fill_shared, shared, filled, tensors[shared.field])
            yield whole_piece(stored.tensors[shared.name], store)
        for check in found.checks:
            yield whole_piece(stored.tensors[check.name], partial(refuse_unless, check))


def component_piece(
    tensor: StoredTensor, component: Component, source: Source, target: torch.Tensor, unit: tuple[int, int]
) -> Piece:
    """The part of a stored component that a rank needs, in one piece: a matrix has a few MB."""
    ranges = ranges_of(source)
    part = component.stored_part(ranges)

    def store(found: torch.Tensor) -> None:
        device = target.device if target.is_cuda else CPU  # NPUs do not compute with all integers
        target.copy_(component.fit(found.to(device), ranges, unit))

    rows = part[0].stop - part[0].start if part else 1
    row_bytes = DTYPES[tensor.dtype].itemsize * torch.Size(tensor.shape[1:]).numel()
    return Piece(tensor.name, part, store, rows * row_bytes)


def whole_piece(tensor: StoredTensor, store: Callable[[torch.Tensor], None]) -> tuple[StoredTensor, Piece]:
    size = torch.Size(tensor.shape).numel() * DTYPES[tensor.dtype].itemsize
    return tensor, Piece(tensor.name, (), store, size)


def fill_shared(shared: Shared, filled: set[str], target: torch.Tensor, found: torch.Tensor) -> None:
    """Fills a tensor that all sources of a parameter share; ValueError if they differ. filled: fields that are."""
    values = shared.decode(found).to(target)
    if not shared.accepts(values):
        raise ValueError(one_line(f"{shared.name} {shared.refusal}"))
    if shared.field not in filled:
        target.copy_(values)
        filled.add(shared.field)
    elif not torch.equal(values, target):
        raise ValueError(one_line(f"{shared.name} differs from that of the modules that it is merged with"))


def refuse_unless(check: Check, found: torch.Tensor) -> None:
    """Raises ValueError if the values of a stored tensor are not supported."""
    if not check.accepts(found):
        raise ValueError(one_line(f"{check.name}: {check.refusal}"))


def dense_pieces(tensor: StoredTensor, source: Source, target: torch.Tensor) -> Iterator[Piece]:
    """Splits the slice of a tensor that fills `target` along dimension 0 into pieces of about MAPPED_BYTES."""
    first, *others = source.part or (slice(None),)
    start, stop, _ = first.indices(source.shape[0])
    columns_apart = source.shape[-1] // target.shape[-1]  # column shard: most pages of the whole rows are touched
    row_bytes = target[0].numel() * columns_apart * DTYPES[tensor.dtype].itemsize
    count = max(1, MAPPED_BYTES // row_bytes)
    for at in range(start, stop, count):
        run = slice(at, min(at + count, stop))
        region = target[run.start - start : run.stop - start]
        yield Piece(tensor.name, (run, *others), partial(copy_into, region), (run.stop - run.start) * row_bytes)


def copy_into(target: torch.Tensor, found: torch.Tensor) -> None:
    target.copy_(found)
