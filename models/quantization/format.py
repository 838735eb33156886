# SPDX-License-Identifier: Apache-2.0
"""Mapping between a logical weight [N, K] and the tensors that a checkpoint stores for it.

A format lists its stored tensors (components): which logical axis each stored axis is, how many logical elements one
index of it spans, and which tensor of the Weight it fills. Splits of a weight are given on the logical shape and mapped
onto each stored tensor here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce

import torch

from models.layers.parameter import ParameterSpec, Source
from ops import Weight
from ops.int4 import PER_WORD

SCALE_DTYPES = ("F32", "BF16", "F16")
Ranges = tuple[tuple[int, int], tuple[int, int]]  # start and stop along N and K


@dataclass(frozen=True, kw_only=True)
class Component:
    """A stored tensor of a logical weight [N, K], and the tensor of the Weight (its field) that it fills.

    `unit` is the number of rows and columns of one element of the field; None for scales and the like, which hold one
    value for a block of weights: their blocks are as large as the split of the weight allows (`block_size`).
    """

    name: str  # full name in the checkpoint
    field: str
    dtypes: tuple[str, ...]  # allowed, as safetensors names them
    axes: tuple[int, ...] = (0, 1)  # logical axis of each stored axis
    span: tuple[int, ...] = (1, 1)  # logical elements that one index of each stored axis covers
    packed: int | None = None  # logical axis along which `decode` unpacks a stored element, an int32 of eight values
    unit: tuple[int, int] | None = None
    dtype: torch.dtype | None = None  # of the field; None: as stored
    decode: Callable[[torch.Tensor], torch.Tensor] = lambda stored: stored  # -> [rows, columns] of the field
    added_once: bool = False  # to the sum over the columns: 0 where another rank has the first of them

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored tensor of a logical weight of `shape` [N, K]."""
        return tuple(-(-shape[axis] // span) for axis, span in zip(self.axes, self.span, strict=True))

    def stored_part(self, ranges: Ranges) -> tuple[slice, ...]:
        """Slice of the stored tensor that covers the logical ranges."""
        return tuple(
            slice(ranges[axis][0] // span, -(-ranges[axis][1] // span))
            for axis, span in zip(self.axes, self.span, strict=True)
        )

    def block(self, axis: int) -> int:
        """Rows (axis 0) or columns (1) that share one stored value; 0: all, as the tensor does not have the axis."""
        if axis not in self.axes:
            return 0
        span = self.span[self.axes.index(axis)]
        return span // PER_WORD if axis == self.packed else span

    def fit(self, part: torch.Tensor, ranges: Ranges, unit: tuple[int, int]) -> torch.Tensor:
        """Decodes a `stored_part` into the part of the field with elements of `unit`.

        The value of a block that the split cuts is repeated for smaller ones; values outside the ranges are dropped.
        """
        values = self.decode(part)
        for axis, span in zip(self.axes, self.span, strict=True):
            start, stop = ranges[axis]
            if unit[axis] <= self.block(axis):
                finer = self.block(axis) // unit[axis]
                values = values if finer == 1 else values.repeat_interleave(finer, axis)
                values = values.narrow(axis, start % span // unit[axis], (stop - start) // unit[axis])
        return torch.zeros_like(values) if self.added_once and ranges[1][0] > 0 else values


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A stored tensor that belongs to all of a weight and is not split; merged modules must agree on it."""

    name: str
    field: str
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  # allowed
    dtype: torch.dtype
    decode: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.flatten
    accepts: Callable[[torch.Tensor], bool] = lambda values: bool(values.isfinite().all())
    refusal: str = "is not finite"


@dataclass(frozen=True, kw_only=True)
class Check:
    """A stored tensor that fills nothing: the format is supported only if its values are as expected."""

    name: str
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    accepts: Callable[[torch.Tensor], bool]
    refusal: str  # what other values mean


Tensors = tuple[Component | Shared | Check, ...]


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one logical weight is stored."""

    name: str  # for messages
    weight: type[Weight]
    components: tuple[Component, ...]
    shared: tuple[Shared, ...] = ()
    checks: tuple[Check, ...] = ()

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Allowed shapes of each stored tensor of a logical weight of `shape`."""
        split = {component.name: (component.stored_shape(shape),) for component in self.components}
        return split | {one.name: one.shapes for group in (self.shared, self.checks) for one in group}

    def dtypes(self) -> dict[str, tuple[str, ...]]:
        groups: tuple[Tensors, ...] = (self.components, self.shared, self.checks)
        return {one.name: one.dtypes for group in groups for one in group}


def ranges_of(source: Source) -> Ranges:
    """Rows and columns of a logical weight [N, K] that a rank reads."""
    parts = (*source.part, slice(None), slice(None))
    return tuple(part.indices(size)[:2] for part, size in zip(parts, source.shape, strict=False))  # type: ignore[return-value]


def region_of(source: Source, ndim: int, unit: tuple[int, int]) -> tuple[int | slice, ...]:
    """Region of a field that a source fills; ndim: of the parameter, 2 or 3."""
    region = [*source.region, *(slice(None),) * (ndim - len(source.region))]
    for axis in (0, 1):
        at = region[ndim - 2 + axis]
        if isinstance(at, slice) and at.start is not None:
            region[ndim - 2 + axis] = slice(at.start // unit[axis], at.stop // unit[axis])
    return tuple(region)


@dataclass(frozen=True)
class Field:
    """A tensor of a parameter's Weight: its shape and dtype, and the logical rows and columns of one element."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    unit: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def fields_of(
    spec: ParameterSpec, formats: Mapping[str, Format], dtype_of: Callable[[str], torch.dtype]
) -> dict[str, Field]:
    """Lays out the Weight of a parameter; formats: of each of its sources, by name; dtype_of: of a stored tensor.

    Raises ValueError if the sources have different formats, or if a split cuts what cannot be split.
    """
    first, found = formats[spec.sources[0].name], {}
    for source in spec.sources:
        other = formats[source.name]
        if other.name != first.name:
            raise ValueError(
                f"{spec.sources[0].name} is {first.name} and {source.name} is {other.name}: the parts of {spec.name} "
                "must have one format"
            )
    for position, component in enumerate(first.components):
        parts = [formats[source.name].components[position] for source in spec.sources]
        unit = component.unit or (block_size(parts, 0, spec), block_size(parts, 1, spec))
        *experts, rows, columns = spec.shape
        shape = (*experts, rows // unit[0], columns // unit[1])
        found[component.field] = Field(shape, common_dtype([part.dtype or dtype_of(part.name) for part in parts]), unit)
    for tensor in first.shared:
        found[tensor.field] = Field((math.prod(tensor.shapes[0]),), tensor.dtype, (1, 1))
    return found


def common_dtype(dtypes: list[torch.dtype]) -> torch.dtype:
    """The dtype that holds the values of all."""
    return reduce(torch.promote_types, set(dtypes)) if len(set(dtypes)) > 1 else dtypes[0]


def block_size(components: list[Component], axis: int, spec: ParameterSpec) -> int:
    """Rows or columns of a block of a field: the largest that no source's part or region cuts.

    A cut block becomes smaller ones with the same value. components: of each source.
    """
    blocks = [component.block(axis) for component in components]
    return math.gcd(*blocks, *(at for source in spec.sources for at in borders(source, axis, spec)))


def borders(source: Source, axis: int, spec: ParameterSpec) -> tuple[int, ...]:
    """Rows or columns at which a source's part of the checkpoint and its region of the parameter begin and end."""
    ndim = len(spec.shape)
    region = (*source.region, *(slice(None),) * (ndim - len(source.region)))[ndim - 2 + axis]
    filled = (region.start, region.stop) if isinstance(region, slice) and region.start is not None else ()
    return (*ranges_of(source)[axis], *filled)


def cut_words(spec: ParameterSpec, formats: Mapping[str, Format]) -> tuple[Source, int, int] | None:
    """The first source whose split cuts what cannot be split: (source, axis, smallest part), None if there is none."""
    for source in spec.sources:
        for component in formats[source.name].components:
            for axis, unit in enumerate(component.unit or ()):
                if any(at % unit for at in borders(source, axis, spec)):
                    return source, axis, unit
    return None
