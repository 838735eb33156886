# SPDX-License-Identifier: Apache-2.0
"""The tensors of a checkpoint, checked against the model: names, shapes, dtypes and number formats (headers only)."""

import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from executor.loading.checkpoint import (
    StoredTensor,
    open_checked,
    read_headers,
    some,
    weight_files,
)
from executor.utils.reading import refusing
from executor.utils.text import one_line
from models.layers.parameter import ParameterSpec, Role, Source
from models.quantization.detect import format_of
from models.quantization.format import Field, Format, cut_words, fields_of
from models.quantization.scheme import Scheme
from models.qwen3_moe.sharding import group_of
from models.qwen3_moe.weights import EMBEDDING, HEAD, NOT_A_WEIGHT, name_in_model
from ops import DenseWeight, Int8StaticWeight, Weight

logger = logging.getLogger(__name__)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
}  # by safetensors' names
LOADABLE = ("F64", "F32", "BF16", "F16")  # unquantised
COMPARED_BYTES = 8 << 20


@dataclass(frozen=True)
class StoredModel:
    """A checkpoint's tensors by their names in the model, and the formats of its quantised weights by logical name."""

    tensors: dict[str, StoredTensor]
    formats: dict[str, Format]

    def sources(self, spec: ParameterSpec) -> tuple[Source, ...]:
        return stored_sources(spec, self.tensors)

    def is_quantized(self, spec: ParameterSpec) -> bool:
        return spec.sources[0].name in self.formats

    def weight_type(self, spec: ParameterSpec) -> type[Weight]:
        return self.formats[spec.sources[0].name].weight if self.is_quantized(spec) else DenseWeight

    def prepared_bytes(self, spec: ParameterSpec, dtype: torch.dtype, dequantized: tuple[type[Weight], ...]) -> int:
        """Bytes of a parameter for a backend that converts the weight types `dequantized` to unquantised ones."""
        if spec.role is not Role.MATRIX or self.weight_type(spec) in dequantized:
            return math.prod(spec.shape) * dtype.itemsize
        return sum(field.nbytes for field in self.fields(spec, dtype).values())

    def fields(self, spec: ParameterSpec, dtype: torch.dtype) -> dict[str, Field]:
        """Layout of a parameter's tensors in memory; dtype: of unquantised ones. ValueError for impossible splits."""
        if not self.is_quantized(spec):
            return {"data": Field(spec.shape, dtype, (1, 1))}
        missing = next((source.name for source in spec.sources if source.name not in self.formats), None)
        if missing is not None:
            raise ValueError(f"{spec.sources[0].name} is quantised and {missing} is not: they are merged into one")
        if cut := cut_words(spec, self.formats):
            raise split_error(*cut, self.formats[cut[0].name])
        return fields_of(spec, self.formats, lambda name: DTYPES[self.tensors[name].dtype])


def split_error(source: Source, axis: int, unit: int, found: Format) -> ValueError:
    """The error of a split that cuts packed values, with the sizes that do not."""
    size = source.shape[axis]
    legal = [str(parts) for parts in range(1, size // unit + 1) if size % parts == 0 and size // parts % unit == 0]
    return ValueError(
        f"parallel_config.{group_of(source.name)}_size: cuts {source.name} ({found.name}) into parts of its {size} "
        f"{('rows', 'columns')[axis]} that are not multiples of {unit}; possible: {', '.join(legal)}"
    )


def check_tensors(model_path: Path, whole_model: list[ParameterSpec], scheme: Scheme) -> StoredModel:
    """Checks the checkpoint's tensors against the model (headers only).

    Raises ValueError for tensors of `whole_model` (all ranks' parameters) that are missing or of wrong shape or dtype,
    for number formats that are not supported, for unexpected tensors, and for missing or damaged files.
    """
    needed = {source.name for spec in whole_model for source in (*spec.sources, *spec.stacked)}
    found = by_model_name(model_path, needed)
    skipped = [name for name in found if name not in needed and NOT_A_WEIGHT.fullmatch(name)]
    for name in skipped:
        del found[name]
    tied = found.pop(HEAD) if HEAD in found and HEAD not in needed else None
    if tied is not None and EMBEDDING not in found:  # lm_head serves as the embedding, as in transformers
        found[EMBEDDING], tied = tied, None
    sources = {source.name: source for spec in whole_model for source in stored_sources(spec, found)}
    with refusing(str(model_path)):
        formats = {name: fmt for name, source in sources.items() if (fmt := format_of(source, found, scheme))}
    doubled = [name for name, fmt in formats.items() if fmt.weight is Int8StaticWeight and bias_of(name) in sources]
    if doubled:
        raise ValueError(one_line(f"{model_path}: {bias_of(doubled[0])} beside static W8A8, whose quant_bias holds it"))
    skipped += check_shapes(model_path, found, sources, formats)
    if tied is not None:
        check_equal(tied, found[EMBEDDING])
        skipped.append(f"{HEAD} (equals the embedding)")
    if skipped:
        logger.info("%s", one_line(f"{model_path}: tensors that are not needed: {some(skipped, 8)}"))
    return StoredModel(found, formats)


def bias_of(weight_name: str) -> str:
    return f"{weight_name.removesuffix('.weight')}.bias"


def by_model_name(model_path: Path, needed: Collection[str]) -> dict[str, StoredTensor]:
    """Reads all headers; tensors by their names in the model, to which checkpoints may lack the prefix."""
    modules = {name.rpartition(".")[0] for name in needed}
    found: dict[str, StoredTensor] = {}
    for tensor in read_headers(weight_files(model_path)).values():
        name = name_in_model(tensor.name, modules)
        if name in found:
            raise ValueError(one_line(f"{tensor.file}: tensor {tensor.name} is in the checkpoint under two names"))
        found[name] = tensor
    return found


def stored_sources(spec: ParameterSpec, found: Collection[str]) -> tuple[Source, ...]:
    """Selects where the checkpoint stores a parameter: all experts stacked in one tensor, or one tensor per expert."""
    return spec.stacked if any(source.name in found for source in spec.stacked) else spec.sources


def check_shapes(
    model_path: Path, found: dict[str, StoredTensor], sources: dict[str, Source], formats: dict[str, Format]
) -> list[str]:
    """Raises ValueError that lists missing tensors, unexpected tensors, wrong shapes and wrong dtypes.

    Returns what may be ignored: biases that are zero, of modules without a bias.
    """
    shapes: dict[str, Sequence[tuple[int, ...]]] = {}
    dtypes: dict[str, tuple[str, ...]] = {}
    for name, source in sources.items():
        fmt = formats.get(name)
        shapes |= {name: (source.shape,)} if fmt is None else fmt.shapes(source.shape)
        dtypes |= {name: LOADABLE} if fmt is None else fmt.dtypes()
    unexpected = [name for name in found if name not in shapes]
    ignored = [name for name in unexpected if name.endswith(".bias") and is_zero(found[name])]
    problems = {
        "missing": [name for name in shapes if name not in found],
        "not expected": [found[name].name for name in unexpected if name not in ignored],
        "of wrong shape": [
            f"{name} is {list(found[name].shape)} instead of {' or '.join(str(list(shape)) for shape in allowed)}"
            for name, allowed in shapes.items()
            if name in found and found[name].shape not in allowed
        ],
        "of wrong dtype": [
            f"{name} is {found[name].dtype} instead of {', '.join(allowed)}"
            for name, allowed in dtypes.items()
            if name in found and found[name].dtype not in allowed
        ],
    }
    if any(problems.values()):
        text = "; ".join(f"{len(names)} {problem}: {some(names)}" for problem, names in problems.items() if names)
        raise ValueError(one_line(f"{model_path}: tensors do not fit the config: {text}"))
    for name in ignored:
        del found[name]
    return [f"{name} (zero)" for name in ignored]


def is_zero(tensor: StoredTensor) -> bool:
    with open_checked(tensor.file) as handle:
        return not handle.get_tensor(tensor.name).any()


def check_equal(tied: StoredTensor, embedding: StoredTensor) -> None:
    """Raises ValueError if the config ties lm_head to an embedding that differs; transformers would not tie them."""
    equal = tied.shape == embedding.shape and tied.dtype == embedding.dtype
    rows = 1 + (COMPARED_BYTES - 1) // (embedding.shape[1] * DTYPES[embedding.dtype].itemsize)
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
