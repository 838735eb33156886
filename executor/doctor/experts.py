# SPDX-License-Identifier: Apache-2.0
"""Comparisons of the MoE experts: end to end, and of each operation in them."""

from collections.abc import Iterator

import torch

from executor.doctor.findings import ROUNDED_OFTEN, ROUNDED_ONCE, TOKENS, Context, Finding
from executor.doctor.inputs import DTYPE, Pair, WeightPair
from ops import GroupedRows, Routing, Weight


def experts(context: Context, variant: str) -> Iterator[Finding]:
    """Compares the experts with all, half or one of them on this rank; rows of remote experts lie past the counts."""
    random, to_device, shapes = context.inputs.random, context.inputs.to_device, context.shapes
    for local in (shapes.num_experts, shapes.num_experts // 2, 1):
        gate_up = context.inputs.weight(context.ops, local, 2 * shapes.width, shapes.hidden_size)
        down = context.inputs.weight(context.ops, local, shapes.hidden_size, shapes.width)
        for tokens in TOKENS:
            hidden = random(tokens, shapes.hidden_size)
            ids = context.inputs.topk_ids(tokens)
            weights = random(tokens, shapes.top_k).softmax(dim=-1).to(DTYPE).float()
            routing = Routing(weights, ids)
            if local < shapes.num_experts:  # on a rank in the middle
                routing = routing.of_rank((shapes.num_experts - local) // 2, local)

            def run(
                hidden: torch.Tensor = hidden,
                routing: Routing = routing,
                gate_up: WeightPair = gate_up,
                down: WeightPair = down,
            ) -> Pair:
                on_device = to_device(routing.topk_weights), to_device(routing.topk_ids)
                moved = routing._replace(topk_weights=on_device[0], topk_ids=on_device[1])
                actual = context.ops.experts(to_device(hidden), moved, gate_up[1], down[1])
                return actual, context.reference.experts(hidden, routing, gate_up[0], down[0])

            case = f"{tokens} tokens, {local} of {shapes.num_experts} experts"
            yield context.compare("experts", variant, case, run, ROUNDED_OFTEN)


def regroup(context: Context, variant: str) -> Iterator[Finding]:
    """Compares rows dispatched by 4 ranks, regrouped by expert and run through the experts; some groups are empty."""
    shapes, local = context.shapes, context.shapes.num_experts // 4
    gate_up = context.inputs.weight(context.ops, local, 2 * shapes.width, shapes.hidden_size)
    down = context.inputs.weight(context.ops, local, shapes.hidden_size, shapes.width)
    for rows in TOKENS:
        hidden = context.inputs.random(rows, shapes.hidden_size)
        cells = torch.randint(4 * local, (rows,), generator=context.inputs.generator)
        counts = cells.bincount(minlength=4 * local).view(4, local)

        def run(hidden: torch.Tensor = hidden, counts: torch.Tensor = counts) -> Pair:
            moved = context.inputs.to_device(hidden), counts.to(context.inputs.device)
            actual, expected = (
                ops.experts(grouped, GroupedRows(per_expert), gate_up[which], down[which])
                for which, ops, given in ((1, context.ops, moved), (0, context.reference, (hidden, counts)))
                for grouped, _, per_expert in [ops.regroup(*given)]
            )
            return actual, expected

        yield context.compare("regroup", variant, f"{rows} rows", run, ROUNDED_OFTEN)


def sort_by_expert(context: Context) -> Iterator[Finding]:
    """Compares each sorted row with its token, and checks the order of the experts and the counts."""
    shapes = context.shapes
    for tokens in TOKENS:
        hidden = context.inputs.random(tokens, shapes.hidden_size)
        ids = context.inputs.topk_ids(tokens)

        def run(hidden: torch.Tensor = hidden, ids: torch.Tensor = ids) -> Pair:
            moved = context.inputs.to_device(hidden), context.inputs.to_device(ids)
            rows, row_index, counts = context.ops.sort_by_expert(*moved, shapes.num_experts)
            expected_counts = ids.flatten().bincount(minlength=shapes.num_experts)
            sorted_ids = ids.flatten()[row_index.cpu().long().argsort()]
            if counts.tolist() != expected_counts.tolist() or sorted_ids.tolist() != sorted(sorted_ids.tolist()):
                raise ValueError("the rows are not sorted by expert, or the counts are wrong")
            return rows[row_index.long()], hidden.repeat_interleave(shapes.top_k, dim=0)

        yield context.compare("sort_by_expert", "npu_moe_init_routing_v2", f"{tokens} tokens", run, 0.0)


def grouped_linear(context: Context) -> Iterator[Finding]:
    """Compares the grouped matmul of all experts and of one; the third of the rows past the counts is ignored."""
    shapes = context.shapes
    for num_experts in (shapes.num_experts, 1):
        right, weight = context.inputs.weight(context.ops, num_experts, 2 * shapes.width, shapes.hidden_size)
        for tokens in TOKENS:
            rows = context.inputs.random(3 * tokens, shapes.hidden_size)
            chosen = torch.randint(num_experts, (2 * tokens,), generator=context.inputs.generator)
            counts = chosen.bincount(minlength=num_experts)

            def run(
                rows: torch.Tensor = rows,
                counts: torch.Tensor = counts,
                right: Weight = right,
                weight: Weight = weight,
            ) -> Pair:
                moved = context.inputs.to_device(rows), weight, context.inputs.to_device(counts)
                total = int(counts.sum())
                return context.ops.grouped_linear(*moved)[:total], context.reference.grouped_linear(
                    rows, right, counts
                )[:total]

            case = f"{3 * tokens} rows, {num_experts} experts"
            yield context.compare("grouped_linear", "npu_grouped_matmul", case, run, ROUNDED_ONCE)
