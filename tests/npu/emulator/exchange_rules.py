# SPDX-License-Identifier: Apache-2.0
"""Constraints of A2 and A3 on dispatch and combine, and the HCCL buffer size they need.

Sources: the pages of the two operations in op-plugin, and of aclnnMoeDistributeDispatchV4 and CombineV4 in CANN.
"""

import os
from typing import NamedTuple

from tests.npu.emulator.registry import product, require

MIB = 1 << 20
DEFAULT_BUFFER_MIB = 200
ALGORITHMS = {"A2": ("", "fullmesh", "hierarchy"), "A3": ("", "fullmesh_v1", "fullmesh_v2", "hierarchy")}
A2_RANKS = {"hierarchy": (16, 32, 64), "fullmesh": (2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 256)}


class Exchange(NamedTuple):
    """The sizes of a dispatch or combine; `tokens` is BS, `shared` (shared_expert_num, shared_expert_rank_num)."""

    ranks: int
    rank: int
    experts: int
    tokens: int
    hidden: int
    k: int
    global_bs: int
    algorithm: str
    quant_mode: int
    shared: tuple[int, int]
    tp_world_size: int

    @property
    def experts_per_rank(self) -> int:
        return self.experts // self.ranks

    @property
    def batch(self) -> int:
        """The tokens of all ranks: global_bs, or BS on each."""
        return self.global_bs or self.tokens * self.ranks

    @property
    def capacity(self) -> int:
        return self.batch * min(self.experts_per_rank, self.k)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def buffer_bytes(exchange: Exchange) -> int:
    """The least HCCL buffer of the group, by the formulas of the operation's page."""
    tokens = exchange.batch // exchange.ranks
    row = 2 * exchange.hidden
    if product() == "A3" and exchange.algorithm == "hierarchy":
        return exchange.experts * tokens * (row + 16 * _round_up(exchange.k, 8)) + 404 * MIB
    if product() == "A3":
        token = _round_up(row, 32) + 64
        token = -(-token // 480) * 512 if exchange.algorithm == "fullmesh_v2" else _round_up(token, 512)
        received = exchange.experts_per_rank * tokens * exchange.ranks * token
        return 2 * (received + (exchange.k + exchange.shared[0]) * tokens * _round_up(row, 512))
    if exchange.algorithm == "hierarchy":
        token = _round_up(tokens * (row + 16 * _round_up(exchange.k, 8)), 512)
        return (exchange.experts + exchange.ranks // 4) * token + 8 * MIB
    return 2 * (exchange.capacity * row + 2 * MIB)


def _check_a2(exchange: Exchange, hierarchy: bool) -> None:
    allowed = A2_RANKS["hierarchy" if hierarchy else "fullmesh"]
    require(exchange.ranks in allowed, f"A2: ep_world_size {exchange.ranks}, allowed are {allowed}")
    limit = 10240 if hierarchy else 7168
    fits = 0 < exchange.hidden <= limit and exchange.hidden % 32 == 0
    require(fits, f"A2: hidden size {exchange.hidden}: a multiple of 32, at most {limit}")
    require(exchange.k <= 16, f"A2: K {exchange.k}: at most 16")
    require(exchange.tp_world_size == 0, f"A2: tp_world_size {exchange.tp_world_size}: 0")
    require(exchange.shared == (1, 0), f"A2: shared experts {exchange.shared}: the default (1, 0)")
    limit = 512 if hierarchy else 256
    require(exchange.batch // exchange.ranks <= limit, f"A2: more than {limit} tokens on a rank")


def _check_a3(exchange: Exchange, hierarchy: bool) -> None:
    ranks_fit = 2 <= exchange.ranks <= 768
    if hierarchy:
        ranks_fit = 16 <= exchange.ranks <= 256 and exchange.ranks % 16 == 0
        require(exchange.experts_per_rank <= 24, f"A3: {exchange.experts_per_rank} experts a rank, at most 24")
        require(exchange.hidden <= 7168 and exchange.hidden % 32 == 0, f"A3: hidden size {exchange.hidden}")
    require(ranks_fit, f"A3: ep_world_size {exchange.ranks} with comm_alg '{exchange.algorithm}'")
    require(1024 <= exchange.hidden <= 8192, f"A3: hidden size {exchange.hidden}: 1024 to 8192")
    of_tp = (1,) if exchange.algorithm in ("fullmesh_v2", "hierarchy") else (0, 1)
    require(exchange.tp_world_size in of_tp, f"A3: tp_world_size {exchange.tp_world_size}: {of_tp}")
    limit = 12 if exchange.algorithm == "fullmesh_v2" else 16
    require(exchange.k <= limit, f"A3: K {exchange.k}: at most {limit}")
    require(exchange.shared in ((0, 0), (1, 0)), f"A3: shared experts {exchange.shared}: the emulator has none")
    limit = 256 if exchange.algorithm in ("fullmesh_v2", "hierarchy") else 512
    require(exchange.batch // exchange.ranks <= limit, f"A3: more than {limit} tokens on a rank")


def check(exchange: Exchange, combine: bool) -> None:
    """ValueError where the product's documentation forbids the exchange, or HCCL_BUFFSIZE is too small for it."""
    algorithms = ("", "hierarchy") if combine and product() == "A3" else ALGORITHMS[product()]
    require(exchange.algorithm in algorithms, f"comm_alg '{exchange.algorithm}': {product()} allows {algorithms}")
    require(exchange.tokens > 0, "no tokens: every rank sends at least one")
    require(0 <= exchange.rank < exchange.ranks, f"ep_rank_id {exchange.rank} of {exchange.ranks}")
    require(0 < exchange.experts <= 512, f"moe_expert_num {exchange.experts}: 1 to 512")
    divides = exchange.experts % exchange.ranks == 0
    require(divides, f"moe_expert_num {exchange.experts} is no multiple of ep_world_size {exchange.ranks}")
    require(0 < exchange.k <= exchange.experts, f"K {exchange.k} of {exchange.experts} experts")
    require(exchange.quant_mode in (0, 2), f"quant_mode {exchange.quant_mode}: 0 or 2")
    if exchange.global_bs:
        fits = exchange.global_bs % exchange.ranks == 0 and exchange.tokens <= exchange.global_bs // exchange.ranks
        require(fits, f"global_bs {exchange.global_bs} is not ranks {exchange.ranks} x the most tokens of a rank")
    hierarchy = exchange.algorithm == "hierarchy"
    (_check_a2 if product() == "A2" else _check_a3)(exchange, hierarchy)
    have, need = int(os.environ.get("HCCL_BUFFSIZE", DEFAULT_BUFFER_MIB)) * MIB, buffer_bytes(exchange)
    require(have >= need, f"the HCCL buffer has {have // MIB} MiB, this exchange needs {need / MIB:.1f}")


def check_ranks(exchanges: list[Exchange], masked: bool, super_nodes: set[str]) -> None:
    """ValueError where the ranks' calls of a dispatch do not fit each other. super_nodes: those of the ranks."""
    first = exchanges[0]
    for rank, exchange in enumerate(exchanges):
        differing = [name for name in first._fields if getattr(first, name) != getattr(exchange, name)]
        differing = [name for name in differing if name not in ("rank", "tokens")]
        require(not differing, f"ranks 0 and {rank} differ in {differing}")
    spans = product() == "A3" and first.algorithm == "hierarchy"
    require(spans or len(super_nodes) == 1, f"comm_alg '{first.algorithm}': the ranks are in several super-nodes")
    tokens = [exchange.tokens for exchange in exchanges]
    if len(set(tokens)) > 1:
        require(first.global_bs > 0, f"ranks have {tokens} tokens: global_bs must be given")
        require(not masked, f"ranks have {tokens} tokens: x_active_mask needs equal ones")
        varies = product() == "A2" or first.algorithm in ("", "fullmesh_v1")
        require(varies, f"ranks have {tokens} tokens: A3 {first.algorithm} needs equal ones")
