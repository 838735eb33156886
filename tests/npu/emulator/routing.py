# SPDX-License-Identifier: Apache-2.0
"""Gating, sorting of tokens by expert, and combine (op-plugin docs: npu_moe_gating_top_k_softmax, ...).

T tokens, H hidden, E experts, K experts per token, R = T * K.
"""

import torch

from tests.npu.emulator.quant import quantise_rows
from tests.npu.emulator.registry import (
    FLOATS,
    kernel,
    poison,
    require,
    require_dtype,
    require_same_dtype,
    require_shape,
)

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _top_k(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row in descending order; ties by ascending index."""
    ordered, indices = values.sort(dim=-1, descending=True, stable=True)
    return ordered[..., :k], indices[..., :k].to(torch.int32)


def _check_logits(x: torch.Tensor, finished: torch.Tensor | None, k: int) -> None:
    require_dtype("x", x, FLOATS)
    require(x.dim() in (2, 3), f"x {list(x.shape)}: two or three dimensions")
    require(0 < k <= min(1024, x.shape[-1]), f"k {k} of {x.shape[-1]} experts: 1 to 1024")
    if finished is not None:
        require_dtype("finished", finished, (torch.bool,))
        require_shape("finished", finished, *x.shape[:-1])


def _mark_finished(experts: torch.Tensor, finished: torch.Tensor | None, num_experts: int) -> torch.Tensor:
    return experts if finished is None else experts.masked_fill(finished.unsqueeze(-1), num_experts)


@kernel("npu_moe_gating_top_k_softmax")
def npu_moe_gating_top_k_softmax(x: torch.Tensor, finished: torch.Tensor | None, k: int) -> Triple:
    """(weights in x's dtype, not renormalised; expert ids int32; row ids j * T + t int32)."""
    _check_logits(x, finished, k)
    weights, experts = _top_k(x.float().softmax(-1), k)
    tokens = experts.numel() // k
    rows = torch.arange(tokens * k, dtype=torch.int32).view(k, tokens).t().reshape(experts.shape).contiguous()
    return weights.to(x.dtype), _mark_finished(experts, finished, x.shape[-1]), rows


@kernel("npu_moe_gating_top_k_softmax_v2")
def npu_moe_gating_top_k_softmax_v2(
    x: torch.Tensor, k: int, finished: torch.Tensor | None, renorm: int | None, output_softmax: bool | None
) -> Triple:
    """(weights, expert ids, full softmax fp32 or empty); renorm=1 takes the softmax over the k chosen logits."""
    _check_logits(x, finished, k)
    require(renorm in (0, 1), f"renorm {renorm}: 0 or 1")
    softmax = x.float().softmax(-1)
    if renorm == 1:
        weights, experts = _top_k(x.float(), k)
        weights = weights.softmax(-1)
    else:
        weights, experts = _top_k(softmax, k)
    full = softmax if renorm == 0 and output_softmax else torch.empty(0)
    return weights.to(x.dtype), _mark_finished(experts, finished, x.shape[-1]), full


def _check_init(x: torch.Tensor, experts: torch.Tensor, num_experts: int, bounds: list[int], modes: dict) -> None:
    require_dtype("x", x, (*FLOATS, torch.int8))
    require_dtype("expert_idx", experts, (torch.int32,))
    require(x.dim() == 2 and experts.dim() == 2, f"x {list(x.shape)}, expert_idx {list(experts.shape)}: both 2-D")
    require(len(x) == len(experts), f"{len(x)} rows of x, {len(experts)} of expert_idx")
    require(0 < num_experts <= (5120 if modes["tokens_num_type"] == 2 else 10240), f"expert_num {num_experts}")
    # left empty, the real default is frozen at the first expert_num that the process passes
    require(len(bounds) == 2, "active_expert_range is not given: its default is the process's first expert_num")
    require(0 <= bounds[0] < bounds[1] <= num_experts, f"active_expert_range {bounds} of {num_experts} experts")
    in_range = bool(((experts >= 0) & (experts < num_experts)).all())
    require(in_range, f"expert_idx leaves [0, {num_experts})")
    require(modes["drop_pad_mode"] == 0, f"drop_pad_mode {modes['drop_pad_mode']}: only 0")
    require(modes["tokens_num_type"] in (1, 2), f"expert_tokens_num_type {modes['tokens_num_type']}: 1 or 2")
    require(modes["tokens_num_flag"], "expert_tokens_num_flag: only True")
    require(modes["row_idx_type"] in (0, 1), f"row_idx_type {modes['row_idx_type']}: 0 or 1")
    require(modes["quant_mode"] in (-1, 1), f"quant_mode {modes['quant_mode']}: -1 or 1")
    require(modes["quant_mode"] == -1 or x.dtype != torch.int8, "quant_mode 1: x is int8 already")
    rows = experts.numel()
    if modes["active_num"] not in (-1, 0) and modes["active_num"] < rows:
        raise NotImplementedError(f"active_num {modes['active_num']} drops some of the {rows} rows")


def _expert_counts(counts: torch.Tensor, first: int, num_experts: int, kind: int) -> torch.Tensor:
    if kind == 1:
        return counts
    pairs = poison((num_experts, 2), torch.int64)
    used = counts.nonzero().flatten()
    pairs[: len(used)] = torch.stack((used + first, counts[used]), 1)
    pairs[len(used) : len(used) + 1] = 0
    return pairs


@kernel("npu_moe_init_routing_v2")
def npu_moe_init_routing_v2(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    scale: torch.Tensor | None,
    active_num: int,
    expert_num: int,
    drop_pad_mode: int,
    expert_tokens_num_type: int,
    expert_tokens_num_flag: bool,
    quant_mode: int,
    active_expert_range: list[int],
    row_idx_type: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(expanded_x [R, H], expanded_row_idx int32 [R], expert counts int64, expanded_scale fp32 [R]).

    The first n rows hold the tokens of the active experts, by expert and in token order; rows from n on are undefined.
    row_idx_type 0: the row of (t, k) at t * K + k, -1 for inactive experts. 1: t * K + k of each row, undefined from n.
    """
    modes = {
        "drop_pad_mode": drop_pad_mode,
        "tokens_num_type": expert_tokens_num_type,
        "tokens_num_flag": expert_tokens_num_flag,
        "quant_mode": quant_mode,
        "row_idx_type": row_idx_type,
        "active_num": active_num,
    }
    _check_init(x, expert_idx, expert_num, active_expert_range, modes)
    first, last = active_expert_range
    flat, rows, k = expert_idx.flatten().long(), expert_idx.numel(), expert_idx.shape[1]
    active = (flat >= first) & (flat < last)
    order = torch.where(active, flat, expert_num).argsort(stable=True)
    valid = int(active.sum())
    chosen = order[:valid]
    values, scales = x[chosen // k], poison((rows,), torch.float32)
    if quant_mode == 1:
        wide = values.float()
        if scale is not None:
            require_dtype("scale", scale, (torch.float32,))
            fits = scale.dim() == 2 and scale.shape[1] == x.shape[1] and len(scale) in (1, last - first)
            require(fits, f"scale {list(scale.shape)}, not [{last - first}, {x.shape[1]}]")
            wide = wide * (scale if len(scale) == 1 else scale[flat[chosen] - first])
        values, scales[:valid] = quantise_rows(wide)
    elif scale is not None:
        require_dtype("scale", scale, (torch.float32,))
        require_shape("scale", scale, len(x))
        scales[:valid] = scale[chosen // k]
    expanded = poison((rows, x.shape[1]), values.dtype)
    expanded[:valid] = values
    index = poison((rows,), torch.int32)
    if row_idx_type == 0:
        index.fill_(-1)
        index[chosen] = torch.arange(valid, dtype=torch.int32)
    else:
        index[:valid] = chosen.to(torch.int32)
    counts = torch.bincount(flat[chosen] - first, minlength=last - first)
    return expanded, index, _expert_counts(counts, first, expert_num, expert_tokens_num_type), scales


@kernel("npu_moe_finalize_routing")
def npu_moe_finalize_routing(
    expanded_permuted_rows: torch.Tensor,
    skip1: torch.Tensor | None,
    skip2: torch.Tensor | None,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None,
    expanded_src_to_dst_row: torch.Tensor,
    export_for_source_row: torch.Tensor | None,
    drop_pad_mode: int | None,
    k: int | None = 1,
) -> torch.Tensor:
    """out[t] = skip1[t] + skip2[t] + sum_k scales[t, k] * (rows[index(t, k)] + bias[expert(t, k)]), fp32, rounded once.

    index(t, k) is at k * T + t for drop_pad_mode 0 and 1, at t * K + k for 2 and 3; rows are [R, H] for 0 and 2,
    [E, C, H] for 1 and 3, where index -1 marks a dropped token.
    """
    rows, index = expanded_permuted_rows, expanded_src_to_dst_row
    require_dtype("expanded_permuted_rows", rows, FLOATS)
    require_dtype("expanded_src_to_dst_row", index, (torch.int32,))
    require(drop_pad_mode in (0, 1, 2, 3), f"drop_pad_mode {drop_pad_mode}: 0 to 3")
    drops = drop_pad_mode in (1, 3)
    require(not drops or scales is None or rows.shape[0] >= scales.shape[1], f"rows {list(rows.shape)}: E under K")
    require(rows.dim() == (3 if drops else 2), f"rows {list(rows.shape)} for drop_pad_mode {drop_pad_mode}")
    require(index.dim() == 1, f"expanded_src_to_dst_row {list(index.shape)}: one dimension")
    if scales is not None:
        require_same_dtype(expanded_permuted_rows=rows, scales=scales)
        require(scales.dim() == 2, f"scales {list(scales.shape)}: two dimensions")
        k = scales.shape[1]
    tokens = len(index) // k
    require(tokens * k == len(index), f"{len(index)} indices are no multiple of k {k}")
    if scales is not None:
        require_shape("scales", scales, tokens, k)
    require(drops or len(rows) == len(index), f"{len(rows)} rows for {len(index)} indices")
    flat = rows.flatten(0, -2).float()
    lowest = -1 if drops else 0
    in_range = bool(((index >= lowest) & (index < len(flat))).all())
    require(in_range, f"expanded_src_to_dst_row leaves [{lowest}, {len(flat)})")
    places = (index.view(k, tokens).t() if drop_pad_mode in (0, 1) else index.view(tokens, k)).long()
    terms = torch.where((places < 0)[..., None], 0, flat[places.clamp(min=0)])  # [T, K, H]
    if bias is not None:
        require(export_for_source_row is not None, "bias needs export_for_source_row")
        require_same_dtype(expanded_permuted_rows=rows, bias=bias)
        require_dtype("export_for_source_row", export_for_source_row, (torch.int32,))
        require_shape("export_for_source_row", export_for_source_row, tokens, k)
        terms = terms + bias.float()[export_for_source_row.long()]
    out = (terms if scales is None else terms * scales.float()[..., None]).sum(1)
    require(skip1 is not None or skip2 is None, "skip2 without skip1")
    for name, skip in (("skip1", skip1), ("skip2", skip2)):
        if skip is not None:
            require_same_dtype(expanded_permuted_rows=rows, skip=skip)
            require_shape(name, skip, tokens, rows.shape[-1])
            out = out + skip.float()
    return out.to(rows.dtype)
