# SPDX-License-Identifier: Apache-2.0
"""Comparisons of the operations on quantised weights, for every variant of a family and number format."""

import math
from collections.abc import Callable, Iterator

import torch

from executor.doctor.findings import EPS, TOKENS, Context, Finding, first_line
from executor.doctor.inputs import DTYPE, Pair
from executor.loading.device import synchronize
from ops import GroupedRows, Int4Weight, Routing, Weight
from ops.npu.quantized import DEQUANTIZED, FAMILIES, FUSED
from ops.npu.quantized_probe import probe, random_weight
from ops.npu.weights import moved

ROUNDED_TO_INT8 = 0.03  # limit of the relative error: activations may be rounded to a neighbouring int8
GROUP_SIZE = 128  # of 4-bit weights, or what divides K
EXPERTS = 16  # on the rank, to limit time


def compare_quantized(context: Context) -> Iterator[Finding]:
    """Yields the findings on all families, without fused operations where the plain one does not work."""
    uses, bound = context.ops.uses, dict(context.ops.uses)
    works: dict[str, bool] = {}
    plain = {fused: family for family, fused in FUSED.items()}
    for family, variants in FAMILIES.items():
        if not works.get(plain.get(family, ""), True):
            continue
        for name, is_used in variants.items():
            if name == DEQUANTIZED:
                continue
            uses[family] = is_used
            is_int4 = family.endswith(Int4Weight.format_name)
            variant = f"{name}, zero points" if is_int4 else name
            problem = problem_of(context, family)
            works[family] = problem is None
            if problem is not None:  # models do not use it either
                case = context.shapes.name
                yield Finding(family, variant, case, None, ROUNDED_TO_INT8, problem, relied_on=False)
            else:
                yield from (linear if "linear" in family else experts)(context, family, variant)
    uses.clear()
    uses.update(bound)


def problem_of(context: Context, family: str) -> str | None:
    """Why the variant in use of a family does not work, as found when a model is loaded; None if it does."""
    try:
        probe(context.ops, family, DTYPE, str(context.inputs.device))
        synchronize(context.inputs.device)  # launch errors are asynchronous
    except (RuntimeError, AttributeError) as error:
        return first_line(error)
    return None


def weight_pair(context: Context, format_name: str, *shape: int) -> tuple[Weight, Weight]:
    """Random weight, for the reference and for the backend."""
    groups = shape[-1] // math.gcd(GROUP_SIZE, shape[-1])
    weight = random_weight(format_name, shape, groups, context.inputs.generator)
    return weight, context.ops.converted(moved(weight, context.inputs.device), DTYPE)


def linear(context: Context, family: str, variant: str) -> Iterator[Finding]:
    """Compares qkv_proj and o_proj, with the norm before them for the family of `norm_linear`."""
    operation, _, format_name = family.partition(" ")
    shapes, inputs = context.shapes, context.inputs
    heads = shapes.num_heads * shapes.head_dim
    for name, size in (("qkv", (shapes.qkv_width, shapes.hidden_size)), ("o", (shapes.hidden_size, heads))):
        right, weight = weight_pair(context, format_name, *size)
        norm = inputs.norm_weight(size[1])
        for tokens in TOKENS:
            hidden, residual = inputs.random(tokens, size[1]), inputs.random(tokens, size[1])

            def run(
                hidden: torch.Tensor = hidden,
                residual: torch.Tensor = residual,
                norm: torch.Tensor = norm,
                right: Weight = right,
                weight: Weight = weight,
            ) -> Pair:
                if operation == "linear":
                    return context.ops.linear(inputs.to_device(hidden), weight), context.reference.linear(hidden, right)
                before = inputs.to_device(hidden), inputs.to_device(residual), inputs.to_device(norm)
                actual = context.ops.norm_linear(*before, EPS, weight)
                return actual[0], context.reference.norm_linear(hidden, residual, norm, EPS, right)[0]

            yield context.compare(family, variant, f"{name}, {tokens} tokens", run, ROUNDED_TO_INT8)


def experts(context: Context, family: str, variant: str) -> Iterator[Finding]:
    """Compares experts that are all on this rank, or some of them, or one, and rows dispatched to them."""
    format_name, shapes = family.partition(" ")[2], context.shapes
    for local in (EXPERTS, 1):
        gate_up = weight_pair(context, format_name, local, 2 * shapes.width, shapes.hidden_size)
        down = weight_pair(context, format_name, local, shapes.hidden_size, shapes.width)
        for tokens in TOKENS:
            hidden = context.inputs.random(tokens, shapes.hidden_size)
            runs: dict[str, Routing | GroupedRows] = {"dispatched rows": dispatched(context, tokens, local)}
            runs[f"{local} of {2 * EXPERTS} experts"] = routed(context, tokens, 2 * EXPERTS).of_rank(3, local)
            if local == EXPERTS:
                runs["all experts"] = routed(context, tokens, EXPERTS)
            for case, routing in runs.items():
                run = comparison(context, hidden, routing, gate_up, down)
                yield context.compare(family, variant, f"{tokens} tokens, {case}", run, ROUNDED_TO_INT8)


def routed(context: Context, tokens: int, num_experts: int) -> Routing:
    generator, top_k = context.inputs.generator, min(context.shapes.top_k, num_experts)
    ids = torch.rand(tokens, num_experts, generator=generator).topk(top_k).indices
    return Routing(context.inputs.random(tokens, top_k).softmax(dim=-1).to(DTYPE).float(), ids)


def dispatched(context: Context, rows: int, local: int) -> GroupedRows:
    """Routing of rows of which the last third lies past the counts."""
    chosen = torch.randint(local, (rows - rows // 3,), generator=context.inputs.generator)
    return GroupedRows(chosen.bincount(minlength=local))


def comparison(
    context: Context,
    hidden: torch.Tensor,
    routing: Routing | GroupedRows,
    gate_up: tuple[Weight, Weight],
    down: tuple[Weight, Weight],
) -> Callable[[], Pair]:
    def run() -> Pair:
        to_device, total = context.inputs.to_device, None
        if isinstance(routing, GroupedRows):
            on_device: Routing | GroupedRows = GroupedRows(to_device(routing.tokens_per_expert))
            total = int(routing.tokens_per_expert.sum())
        else:
            weights, ids = to_device(routing.topk_weights), to_device(routing.topk_ids)
            on_device = routing._replace(topk_weights=weights, topk_ids=ids)
        actual = context.ops.experts(to_device(hidden), on_device, gate_up[1], down[1])
        return actual[:total], context.reference.experts(hidden, routing, gate_up[0], down[0])[:total]

    return run
