# SPDX-License-Identifier: Apache-2.0
"""Comparisons of the experts: whole, and by their parts."""

from collections.abc import Iterator

import torch

from executor.doctor.findings import ROUNDED_OFTEN, ROUNDED_ONCE, TOKENS, Context, Finding
from executor.doctor.inputs import DTYPE, Pair
from ops import GroupedRows, Routing


def experts(context: Context, variant: str) -> Iterator[Finding]:
    """All experts here, half of them elsewhere (the grouped products get more rows than they count), one alone."""
    random, to_device, shapes = context.inputs.random, context.inputs.to_device, context.shapes
    for local in (shapes.num_experts, shapes.num_experts // 2, 1):
        gate_up = context.inputs.weight(context.ops, local, 2 * shapes.width, shapes.hidden_size)
        down = context.inputs.weight(context.ops, local, shapes.hidden_size, shapes.width)
        for tokens in TOKENS:
            hidden = random(tokens, shapes.hidden_size)
            ids = context.inputs.topk_ids(tokens)
            weights = random(tokens, shapes.top_k).softmax(dim=-1).to(DTYPE).float()
            routing = Routing(weights, ids.clamp(max=local), has_elsewhere=local < shapes.num_experts)

            def run(hidden=hidden, routing=routing, gate_up=gate_up, down=down) -> Pair:
                parts = [to_device(part) for part in (routing.topk_weights, routing.topk_ids)]
                moved = Routing(*parts, routing.has_elsewhere)
                actual = context.ops.experts(to_device(hidden), moved, gate_up[1], down[1])
                return actual, context.reference.experts(hidden, routing, gate_up[0], down[0])

            case = f"{tokens} tokens, {local} of {shapes.num_experts} experts"
            yield context.compare("experts", variant, case, run, ROUNDED_OFTEN)


def regroup(context: Context, variant: str) -> Iterator[Finding]:
    """Rows of several ranks, some without any for an expert, put by expert; then each through its expert."""
    shapes, local = context.shapes, context.shapes.num_experts // 4
    gate_up = context.inputs.weight(context.ops, local, 2 * shapes.width, shapes.hidden_size)
    down = context.inputs.weight(context.ops, local, shapes.hidden_size, shapes.width)
    for rows in TOKENS:
        hidden = context.inputs.random(rows, shapes.hidden_size)
        cells = torch.randint(4 * local, (rows,), generator=context.inputs.generator)
        counts = cells.bincount(minlength=4 * local).view(4, local)

        def run(hidden=hidden, counts=counts) -> Pair:
            moved = context.inputs.to_device(hidden), counts.to(context.inputs.device)
            actual, expected = (
                ops.experts(grouped, GroupedRows(per_expert), gate_up[which], down[which])
                for which, ops, given in ((1, context.ops, moved), (0, context.reference, (hidden, counts)))
                for grouped, _, per_expert in [ops.regroup(*given)]
            )
            return actual, expected

        yield context.compare("regroup", variant, f"{rows} rows", run, ROUNDED_OFTEN)


def sort_by_expert(context: Context) -> Iterator[Finding]:
    """Each row of the sorted ones against the token its choice came from; the counts have to be right, too."""
    shapes = context.shapes
    for tokens in TOKENS:
        hidden = context.inputs.random(tokens, shapes.hidden_size)
        ids = context.inputs.topk_ids(tokens)

        def run(hidden=hidden, ids=ids) -> Pair:
            moved = context.inputs.to_device(hidden), context.inputs.to_device(ids)
            rows, row_index, counts = context.ops.sort_by_expert(*moved, shapes.num_experts)
            right = ids.flatten().bincount(minlength=shapes.num_experts)
            place = ids.flatten()[row_index.cpu().long().argsort()]
            if counts.tolist() != right.tolist() or place.tolist() != sorted(place.tolist()):
                raise ValueError("the rows are not by expert, or not counted right")
            return rows[row_index.long()], hidden.repeat_interleave(shapes.top_k, dim=0)

        yield context.compare("sort_by_expert", "npu_moe_init_routing_v2", f"{tokens} tokens", run, 0.0)


def grouped_linear(context: Context) -> Iterator[Finding]:
    """One product, of all experts and of one; a third of the rows are beyond what is counted, and not compared."""
    shapes = context.shapes
    for num_experts in (shapes.num_experts, 1):
        right, weight = context.inputs.weight(context.ops, num_experts, 2 * shapes.width, shapes.hidden_size)
        for tokens in TOKENS:
            rows = context.inputs.random(3 * tokens, shapes.hidden_size)
            chosen = torch.randint(num_experts, (2 * tokens,), generator=context.inputs.generator)
            counts = chosen.bincount(minlength=num_experts)

            def run(rows=rows, counts=counts, right=right, weight=weight) -> Pair:
                moved = context.inputs.to_device(rows), weight, context.inputs.to_device(counts)
                total = int(counts.sum())
                return context.ops.grouped_linear(*moved)[:total], context.reference.grouped_linear(
                    rows, right, counts
                )[:total]

            case = f"{3 * tokens} rows, {num_experts} experts"
            yield context.compare("grouped_linear", "npu_grouped_matmul", case, run, ROUNDED_ONCE)
