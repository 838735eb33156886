# SPDX-License-Identifier: Apache-2.0
"""Limits and HCCL buffer sizes of fused MoE dispatch and combine on Atlas products; does not need torch_npu.

Source: op-plugin's pages of npu_moe_distribute_dispatch_v2 and npu_moe_distribute_combine_v2
(docs/zh/custom_APIs/torch_npu), and CANN's of aclnnMoeDistributeDispatchV4. Both are fused with their all-to-all
communication. Every algorithm listed here takes x_active_mask; `hierarchy` of A2 does not, and is left out.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

MIB = 1 << 20
DEFAULT_BUFFER_MIB = 200  # HCCL buffer of a communicator if HCCL_BUFFSIZE is not set
BUFFER_MARGIN_MIB = 11  # that the vendor's inference recipes add to the formulas of the pages
MAX_EXPERTS = 512
PRODUCTS = {"Ascend910B": "A2", "Ascend910_93": "A3"}  # prefixes of device names


def product_of(device_name: str) -> str | None:
    """Returns the Atlas product of a device name ("Ascend910B3": A2, "Ascend910_9391": A3); None if unknown."""
    return next((product for begin, product in PRODUCTS.items() if device_name.startswith(begin)), None)


@dataclass(frozen=True, kw_only=True)
class ExchangeSizes:
    """Problem sizes that determine whether fused dispatch is supported and which algorithm it uses."""

    ranks: int
    tokens: int  # maximum per rank and step
    experts: int
    top_k: int
    hidden_size: int
    spans_super_nodes: bool = False  # whether the ranks are in several A3 super-nodes


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A communication algorithm of dispatch and combine, with its limits."""

    name: str  # comm_alg of dispatch
    combine_name: str  # comm_alg of combine
    ranks: Collection[int]
    hidden_sizes: range
    max_tokens: int
    max_top_k: int
    takes_scales: bool  # pass expert_scales to dispatch, and its expand_scales to combine
    shared_expert_num: int
    tp_world_size: int
    buffer_bytes: Callable[[ExchangeSizes], int]
    spans_super_nodes: bool = False  # for ranks in several super-nodes, and only for those
    max_local_experts: int = MAX_EXPERTS

    def refusal(self, sizes: ExchangeSizes) -> str | None:
        """Describes the limit that these sizes exceed; None if they are supported."""
        hidden = self.hidden_sizes
        local_experts = sizes.experts // sizes.ranks
        limits = (
            (
                self.spans_super_nodes == sizes.spans_super_nodes,
                "is for several super-nodes" if self.spans_super_nodes else "does not span super-nodes",
            ),
            (sizes.ranks in self.ranks, f"does not take {sizes.ranks} ranks"),
            (sizes.experts % sizes.ranks == 0, f"cannot share {sizes.experts} experts among {sizes.ranks} ranks"),
            (sizes.experts <= MAX_EXPERTS, f"takes at most {MAX_EXPERTS} experts, not {sizes.experts}"),
            (
                local_experts <= self.max_local_experts,
                f"takes at most {self.max_local_experts} experts a rank, not {local_experts}",
            ),
            (sizes.top_k <= self.max_top_k, f"takes at most {self.max_top_k} experts a token, not {sizes.top_k}"),
            (
                sizes.hidden_size in hidden,
                f"takes hidden sizes of {hidden[0]} to {hidden[-1]} in steps of {hidden.step}, not {sizes.hidden_size}",
            ),
            (sizes.tokens <= self.max_tokens, f"takes at most {self.max_tokens} tokens a rank, not {sizes.tokens}"),
        )
        return next((f"{self.name} {text}" for fits, text in limits if not fits), None)

    def buffer_mib(self, sizes: ExchangeSizes) -> int:
        return -(-self.buffer_bytes(sizes) // MIB)


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def a2_fullmesh_bytes(sizes: ExchangeSizes) -> int:
    rows = sizes.tokens * sizes.ranks * min(sizes.experts // sizes.ranks, sizes.top_k)
    return 2 * (rows * 2 * sizes.hidden_size + 2 * MIB)


def a3_bytes(sizes: ExchangeSizes, received_row: int) -> int:
    """HCCL buffer size in bytes; received_row: bytes of a received row with metadata and alignment."""
    received = sizes.experts * sizes.tokens * received_row  # each local expert may receive all tokens of all ranks
    return 2 * (received + sizes.top_k * sizes.tokens * round_up(2 * sizes.hidden_size, 512))


def a3_fullmesh_v1_bytes(sizes: ExchangeSizes) -> int:
    return a3_bytes(sizes, round_up(round_up(2 * sizes.hidden_size, 32) + 64, 512))


def a3_fullmesh_v2_bytes(sizes: ExchangeSizes) -> int:
    return a3_bytes(sizes, -(-(round_up(2 * sizes.hidden_size, 32) + 64) // 480) * 512)


def a3_hierarchy_bytes(sizes: ExchangeSizes) -> int:
    token = 2 * sizes.hidden_size + 16 * round_up(sizes.top_k, 8)
    return sizes.experts * sizes.tokens * token + 404 * MIB


ALGORITHMS = {  # in order of preference
    "A2": (
        Algorithm(
            name="fullmesh",
            combine_name="fullmesh",
            ranks=(*range(2, 9), 16, 32, 64, 128, 256),
            hidden_sizes=range(32, 7169, 32),
            max_tokens=256,
            max_top_k=16,
            takes_scales=True,
            shared_expert_num=1,  # unused argument: shared-expert ranks are 0
            tp_world_size=0,
            buffer_bytes=a2_fullmesh_bytes,
        ),
    ),
    "A3": (
        Algorithm(
            name="fullmesh_v2",
            combine_name="",  # comm_alg of combine accepts only "hierarchy" here
            ranks=range(2, 769),
            hidden_sizes=range(1024, 8193),
            max_tokens=256,
            max_top_k=12,
            takes_scales=False,
            shared_expert_num=0,
            tp_world_size=1,  # no tensor parallelism; 0 too, but fullmesh_v2 and hierarchy take only 1
            buffer_bytes=a3_fullmesh_v2_bytes,
        ),
        Algorithm(
            name="fullmesh_v1",
            combine_name="",
            ranks=range(2, 769),
            hidden_sizes=range(1024, 8193),
            max_tokens=512,
            max_top_k=16,
            takes_scales=False,
            shared_expert_num=0,
            tp_world_size=1,
            buffer_bytes=a3_fullmesh_v1_bytes,
        ),
        Algorithm(
            name="hierarchy",  # within a server first, then between servers
            combine_name="hierarchy",
            ranks=range(16, 257, 16),
            hidden_sizes=range(1024, 7169, 32),
            max_tokens=256,
            max_top_k=16,
            takes_scales=True,
            shared_expert_num=0,
            tp_world_size=1,
            buffer_bytes=a3_hierarchy_bytes,
            spans_super_nodes=True,
            max_local_experts=24,
        ),
    ),
}


def choose_algorithms(product: str | None, sizes: ExchangeSizes) -> tuple[tuple[Algorithm, ...], str]:
    """Selects the product's algorithms that support these sizes, in order of preference; explains it in one line."""
    if product is None:
        return (), "unknown product"
    refusals = {algorithm: algorithm.refusal(sizes) for algorithm in ALGORITHMS[product]}
    chosen = tuple(algorithm for algorithm, refusal in refusals.items() if refusal is None)
    reasons = [algorithm.name for algorithm in chosen] or filter(None, refusals.values())
    return chosen, f"{product} {', '.join(reasons)}"


def buffer_setting(algorithms: Sequence[Algorithm], sizes: ExchangeSizes, given: str | None) -> str:
    """Returns HCCL_BUFFSIZE (MB), enough for any of the algorithms: `given` by the user if that is large enough.

    Else with a margin, and at least HCCL's default. Raises ValueError if `given` is too small or not a number.
    """
    algorithm = max(algorithms, key=lambda algorithm: algorithm.buffer_mib(sizes))
    need = algorithm.buffer_mib(sizes)
    if given is None:
        return str(max(need + BUFFER_MARGIN_MIB, DEFAULT_BUFFER_MIB))
    if not given.isdecimal() or int(given) < need:
        raise ValueError(
            f"HCCL_BUFFSIZE: {given} MB given, but dispatch and combine ({algorithm.name}, {sizes.ranks} ranks, "
            f"{sizes.tokens} tokens on each) need {need} MB; raise it, or leave it unset"
        )
    return given
