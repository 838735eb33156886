# SPDX-License-Identifier: Apache-2.0
"""All comparisons of the NPU backend: families of vendor calls take part with each of their variants."""

from collections.abc import Iterator

import torch

from executor.device import synchronize
from executor.doctor import experts, layers
from executor.doctor.findings import ROUNDED_OFTEN, Context, Finding, first_line
from executor.doctor.inputs import Shapes
from ops.npu import NpuOps
from ops.npu.variants import ATTENTION, CACHE_WRITE, COMBINE, GATING, REGROUP, ROTARY, TRIALS

FAMILIES = {  # its attribute of the backend, its variants, the operation that uses it, the comparisons of that
    "rotary": ("rotate", ROTARY, "attention", (layers.attention,)),
    "cache write": ("write_cache", CACHE_WRITE, "attention", (layers.attention,)),
    "attention": ("attend", ATTENTION, "attention", (layers.attention, layers.graph)),
    "gating": ("choose_experts", GATING, "route", (layers.route,)),
    "combine": ("combine", COMBINE, "experts", (experts.experts,)),
    "regroup": ("regroup_rows", REGROUP, "regroup", (experts.regroup,)),
}


def compare_all(ops: NpuOps, device: torch.device, shapes: Shapes) -> Iterator[Finding]:
    """Those of one shape, as they are made."""
    context = Context(ops, device, shapes)
    for comparison in (layers.elementwise, layers.linear, experts.sort_by_expert, experts.grouped_linear):
        yield from comparison(context)
    for what, (attribute, variants, operation, comparisons) in FAMILIES.items():
        bound = getattr(ops, attribute)
        for name, variant in variants.items():
            try:
                TRIALS[what](variant, str(device))
                synchronize(device)  # launches fail late
            except (RuntimeError, AttributeError) as error:
                yield Finding(operation, name, shapes.name, None, ROUNDED_OFTEN, first_line(error), relied_on=False)
                continue
            setattr(ops, attribute, variant)
            for comparison in comparisons:
                yield from comparison(context, name)
        setattr(ops, attribute, bound)


def compare_last(ops: NpuOps, device: torch.device, shapes: Shapes) -> Finding:
    """What no page promises: if it stops the device, nothing else is left to compare."""
    return layers.slot_to_skip(Context(ops, device, shapes))
