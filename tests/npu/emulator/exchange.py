# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine of the experts' tokens (op-plugin docs: npu_moe_distribute_dispatch_v2 and _combine_v2).

BS tokens of this rank, H hidden, K experts per token, EL experts of a rank, A rows of receive capacity.
"""

import os
from typing import NamedTuple

import torch
import torch.distributed as dist

from tests.npu.emulator.communicators import gather, group_of
from tests.npu.emulator.exchange_rules import Exchange, check, check_ranks
from tests.npu.emulator.registry import (
    HALVES,
    kernel,
    poison,
    product,
    require,
    require_dtype,
    require_shape,
)

ROW_INTS = 128  # int32 numbers of routing data a received row has room for


class Sent(NamedTuple):
    """One rank's share of a dispatch."""

    exchange: Exchange
    x: torch.Tensor
    expert_ids: torch.Tensor
    expert_scales: torch.Tensor | None
    active: int  # tokens that are not padding
    super_node: str


_dispatched: dict[str, Sent] = {}  # each communicator's last dispatch


def _active(mask: torch.Tensor | None, exchange: Exchange) -> int:
    if mask is None:
        return exchange.tokens
    hierarchy_of_a2 = product() == "A2" and exchange.algorithm == "hierarchy"
    require(not hierarchy_of_a2, "x_active_mask: not with comm_alg hierarchy on A2")
    require_dtype("x_active_mask", mask, (torch.bool,))
    require_shape("x_active_mask", mask, exchange.tokens)
    count = int(mask.sum())
    require(bool(mask[:count].all()), "x_active_mask: the active tokens come first")
    return count


def _require_scales(scales: torch.Tensor | None, exchange: Exchange, name: str, *shape: int) -> None:
    if product() == "A2" or exchange.algorithm == "hierarchy":
        require(scales is not None, f"{product()} {exchange.algorithm}: {name} must be given")
        require_dtype(name, scales, (torch.float32,))
        require_shape(name, scales, *shape)
    else:
        require(scales is None, f"A3: {name} only with comm_alg hierarchy")


def _receive(shares: list[Sent], rank: int, per_rank: int) -> list[list[tuple[int, int, int, int]]]:
    """This rank's rows as (expert, source rank, token, k), a list per (expert, rank) pair, in that order."""
    cells = []
    for expert in range(rank * per_rank, (rank + 1) * per_rank):
        for source, share in enumerate(shares):
            found = (share.expert_ids[: share.active] == expert).nonzero().tolist()
            cells.append([(expert, source, token, k) for token, k in found])
    return cells


@kernel("npu_moe_distribute_dispatch_v2")
def npu_moe_distribute_dispatch_v2(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    x_active_mask: torch.Tensor | None,
    expert_scales: torch.Tensor | None,
    group_tp: str,
    tp_world_size: int,
    tp_rank_id: int,
    shared_expert_num: int,
    shared_expert_rank_num: int,
    quant_mode: int,
    global_bs: int,
    expert_token_nums_type: int,
    comm_alg: str,
) -> tuple[torch.Tensor, ...]:
    """Sends each token to its experts' ranks.

    Returns expand_x [A, H], dynamic_scales, assist_info_for_combine, expert_token_nums int64 [EL], ep_recv_counts,
    tp_recv_counts, expand_scales. A = (global_bs or BS * ranks) * min(EL, K) is a capacity: rows past the sum of
    expert_token_nums are undefined. quant_mode 2 sends int8 rows with a scale of row maximum / 127.
    """
    require_dtype("x", x, HALVES)
    require(x.dim() == 2 and expert_ids.dim() == 2, f"x {list(x.shape)}, expert_ids {list(expert_ids.shape)}: 2-D")
    require_dtype("expert_ids", expert_ids, (torch.int32,))
    require(len(expert_ids) == len(x), f"{len(x)} tokens, {len(expert_ids)} rows of expert_ids")
    require(tp_rank_id == 0 and group_tp == "", "no tensor parallelism: tp_rank_id 0, group_tp ''")
    require(expert_token_nums_type in (0, 1), f"expert_token_nums_type {expert_token_nums_type}: 0 or 1")
    tokens, k = expert_ids.shape
    exchange = Exchange(
        ranks=ep_world_size,
        rank=ep_rank_id,
        experts=moe_expert_num,
        tokens=tokens,
        hidden=x.shape[1],
        k=k,
        global_bs=global_bs,
        algorithm=comm_alg,
        quant_mode=quant_mode,
        shared=(shared_expert_num, shared_expert_rank_num),
        tp_world_size=tp_world_size,
    )
    check(exchange, combine=False)
    ordered = expert_ids.sort(-1).values
    require(bool((ordered[:, 1:] != ordered[:, :-1]).all()), "expert_ids has an expert twice in a row")
    in_range = bool(((expert_ids >= 0) & (expert_ids < moe_expert_num)).all())
    require(in_range, f"expert_ids leaves [0, {moe_expert_num})")
    _require_scales(expert_scales, exchange, "expert_scales", tokens, k)
    active = _active(x_active_mask, exchange)
    group = group_of(group_ep)
    _require_member(group, exchange)
    mine = Sent(exchange, x, expert_ids, expert_scales, active, os.environ.get("HCCL_LOGIC_SUPERPOD_ID", ""))
    shares = gather(group, mine)
    super_nodes = {share.super_node for share in shares}
    check_ranks([share.exchange for share in shares], x_active_mask is not None, super_nodes)
    before = _dispatched.get(group_ep, mine).exchange.global_bs
    require(before == global_bs, f"global_bs {global_bs} after {before}: it is the same in all calls on a communicator")
    _dispatched[group_ep] = mine

    cells = _receive(shares, ep_rank_id, exchange.experts_per_rank)
    rows = [row for cell in cells for row in cell]
    values = x[:0] if not rows else torch.stack([shares[source].x[token] for _, source, token, _ in rows])
    scales = poison((exchange.capacity,), torch.float32)
    if quant_mode == 2:
        wide = values.float()
        scales[: len(rows)] = wide.abs().amax(-1) / 127
        values = (wide / scales[: len(rows), None]).nan_to_num(0).round().to(torch.int8)
    expand_x = poison((exchange.capacity, x.shape[1]), values.dtype)
    expand_x[: len(rows)] = values
    assist = poison((max(tokens * k, exchange.capacity * ROW_INTS),), torch.int32)
    if rows:
        assist[: len(rows) * 3] = torch.tensor([row[1:] for row in rows], dtype=torch.int32).flatten()
    sizes = torch.tensor([len(cell) for cell in cells])
    counts = sizes.view(exchange.experts_per_rank, -1).sum(1)
    spare = exchange.batch * 2 * k * (ep_world_size // 8) if product() == "A2" and expert_scales is not None else 0
    received = torch.cat((sizes.cumsum(0).to(torch.int32), poison((spare,), torch.int32)))
    expand_scales = torch.empty(0)
    if expert_scales is not None:
        expand_scales = poison((exchange.capacity,), torch.float32)
        weights = [shares[source].expert_scales[token, column] for _, source, token, column in rows]
        expand_scales[: len(rows)] = torch.tensor(weights)
    nums = counts.cumsum(0) if expert_token_nums_type == 0 else counts
    return expand_x, scales, assist, nums, received, poison((tp_world_size,), torch.int32), expand_scales


def _require_member(group: dist.ProcessGroup, exchange: Exchange) -> None:
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    fits = (exchange.ranks, exchange.rank) == (size, rank)
    require(fits, f"ep_world_size {exchange.ranks}, ep_rank_id {exchange.rank}: the group has {size}, this is {rank}")


@kernel("npu_moe_distribute_combine_v2")
def npu_moe_distribute_combine_v2(
    expand_x: torch.Tensor,
    expert_ids: torch.Tensor,
    assist_info_for_combine: torch.Tensor,
    ep_send_counts: torch.Tensor,
    expert_scales: torch.Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    tp_send_counts: torch.Tensor | None,
    x_active_mask: torch.Tensor | None,
    expand_scales: torch.Tensor | None,
    group_tp: str,
    tp_world_size: int,
    tp_rank_id: int,
    shared_expert_num: int,
    shared_expert_rank_num: int,
    global_bs: int,
    comm_alg: str,
) -> torch.Tensor:
    """out[t] = sum_k expert_scales[t, k] * y(t, k) [BS, H] in fp32, rounded once; padding tokens are undefined."""
    require_dtype("expand_x", expand_x, HALVES)
    require_dtype("expert_ids", expert_ids, (torch.int32,))
    require_dtype("expert_scales", expert_scales, (torch.float32,))
    require(expert_ids.dim() == 2 and expand_x.dim() == 2, "expand_x and expert_ids have two dimensions")
    require_shape("expert_scales", expert_scales, *expert_ids.shape)
    require(tp_rank_id == 0 and group_tp == "", "no tensor parallelism: tp_rank_id 0, group_tp ''")
    tokens, k = expert_ids.shape
    exchange = Exchange(
        ranks=ep_world_size,
        rank=ep_rank_id,
        experts=moe_expert_num,
        tokens=tokens,
        hidden=expand_x.shape[1],
        k=k,
        global_bs=global_bs,
        algorithm=comm_alg,
        quant_mode=0,
        shared=(shared_expert_num, shared_expert_rank_num),
        tp_world_size=tp_world_size,
    )
    check(exchange, combine=True)
    sent = _dispatched.get(group_ep)
    require(sent is not None, f"no dispatch came before this combine on '{group_ep}'")
    same = sent.exchange._replace(algorithm=comm_alg, quant_mode=0)
    require(same == exchange, f"combine {exchange} does not match dispatch {same}")
    require_shape("expand_x", expand_x, exchange.capacity, exchange.hidden)
    is_hierarchy = "hierarchy" in (comm_alg, sent.exchange.algorithm)
    require(not is_hierarchy or comm_alg == sent.exchange.algorithm, f"combine '{comm_alg}', dispatch {sent.exchange}")
    _require_scales(expand_scales, exchange, "expand_scales", exchange.capacity)
    group = group_of(group_ep)
    _require_member(group, exchange)

    cells = exchange.experts_per_rank * ep_world_size
    require_dtype("ep_send_counts", ep_send_counts, (torch.int32,))
    require(len(ep_send_counts) >= cells, f"ep_send_counts {list(ep_send_counts.shape)}: {cells} counts")
    valid = int(ep_send_counts[cells - 1])
    require(0 <= valid <= exchange.capacity, f"ep_send_counts ends at {valid}: not what dispatch returned")
    assist = assist_info_for_combine[: valid * 3].view(-1, 3)
    active = _active(x_active_mask, exchange)
    require(active == sent.active, f"x_active_mask has {active} tokens, that of dispatch {sent.active}")
    total = torch.zeros(tokens, exchange.hidden)
    seen = torch.zeros(tokens, k, dtype=torch.int64)
    for source, (values, routes) in enumerate(gather(group, (expand_x[:valid], assist))):
        for value, (rank, token, column) in zip(values.float(), routes.tolist(), strict=True):
            if rank != ep_rank_id:
                continue
            fits = 0 <= token < active and 0 <= column < k
            require(fits, f"rank {source} returns token {token}: assist_info is not what dispatch returned")
            expert = int(expert_ids[token, column])
            fits = expert // exchange.experts_per_rank == source
            require(fits, f"rank {source} returns expert {expert}: expert_ids are not those of dispatch")
            total[token] += expert_scales[token, column] * value
            seen[token, column] += 1
    require(bool((seen[:active] == 1).all()), "a token did not come back from each expert once")
    total[active:] = torch.nan
    return total.to(expand_x.dtype)
