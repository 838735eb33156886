# SPDX-License-Identifier: Apache-2.0
"""Comparisons of the NPU backend with the reference, for every variant of each family of vendor calls."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from executor.doctor import experts, layers
from executor.doctor.findings import ROUNDED_OFTEN, Context, Finding, first_line
from executor.doctor.inputs import Shapes
from executor.doctor.quantized import compare_quantized
from executor.loading.device import synchronize
from ops.npu import NpuOps
from ops.npu.fused_qkv import QKV
from ops.npu.variants import ATTENTION, CACHE_WRITE, COMBINE, GATING, LOCAL_EXPERTS, PROBES, REGROUP, ROTARY

Comparison = Callable[[Context, str], Iterator[Finding]]  # with one variant of a family

# family -> (attribute of NpuOps, variants, operation that uses them, comparisons of that operation)
FAMILIES: dict[str, tuple[str, dict[str, Any], str, tuple[Comparison, ...]]] = {
    "qkv": ("fused_qkv", QKV, "attention", (layers.attention,)),
    "rotary": ("rotate", ROTARY, "attention", (layers.attention,)),
    "cache write": ("write_cache", CACHE_WRITE, "attention", (layers.attention,)),
    "attention": ("attend", ATTENTION, "attention", (layers.attention,)),
    "gating": ("gating", GATING, "route", (layers.route,)),
    "combine": ("combine", COMBINE, "experts", (experts.experts,)),
    "local experts": ("combine_local", LOCAL_EXPERTS, "experts", (experts.experts,)),
    "regroup": ("regroup_rows", REGROUP, "regroup", (experts.regroup,)),
}
UNFUSED = ("rotary", "cache write")  # families that a fused operation replaces
CAPTURED = ("qkv", "attention")  # families whose variants are compared in graph mode too


def compare_all(ops: NpuOps, device: torch.device, shapes: Shapes) -> Iterator[Finding]:
    """Yields the findings of all comparisons at one shape; graph mode last: a failed capture may break later calls."""
    context = Context(ops, device, shapes)
    for compare in (layers.elementwise, layers.linear, experts.sort_by_expert, experts.grouped_linear):
        yield from compare(context)
    usable: dict[str, list[str]] = {}
    for what, (_, variants, operation, comparisons) in FAMILIES.items():
        usable[what] = []
        for name, variant in variants.items():
            with using(ops, what, variant):
                try:
                    if what == "qkv":
                        ops.probe_qkv(variant, str(device))
                    else:
                        PROBES[what](variant, str(device))
                    synchronize(device)  # launch errors are asynchronous
                except (RuntimeError, AttributeError) as error:
                    yield Finding(operation, name, shapes.name, None, ROUNDED_OFTEN, first_line(error), relied_on=False)
                    continue
                usable[what].append(name)
                for comparison in comparisons:
                    yield from comparison(context, name)
    yield from compare_quantized(context)
    for what in CAPTURED:
        for name in usable[what]:
            with using(ops, what, FAMILIES[what][1][name]):
                yield from layers.graph(context, name)


@contextlib.contextmanager
def using(ops: NpuOps, what: str, variant: Any) -> Iterator[None]:
    """Binds a variant of a family, and nothing that would replace it, for the duration."""
    attribute = FAMILIES[what][0]
    bound, fused = getattr(ops, attribute), ops.fused_qkv
    if what in UNFUSED:
        ops.fused_qkv = None
    setattr(ops, attribute, variant)
    try:
        yield
    finally:
        setattr(ops, attribute, bound)
        ops.fused_qkv = fused


def compare_undocumented(ops: NpuOps, device: torch.device, shapes: Shapes) -> Iterator[Finding]:
    """Yields the findings on behaviour that the vendor does not document; to be run last: it may crash the device."""
    context = Context(ops, device, shapes)
    yield layers.shared_blocks(context, ops.bindings["attention"])
    yield layers.skipped_slot(context)
