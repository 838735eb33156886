# SPDX-License-Identifier: Apache-2.0
"""What dispatch and combine of the Atlas products allow, and the HCCL buffer they need; needs no torch_npu.

Source: op-plugin's pages of npu_moe_distribute_dispatch_v2 and npu_moe_distribute_combine_v2
(docs/zh/custom_APIs/torch_npu). They let each rank send its tokens straight to the ranks of their experts.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

MIB = 1 << 20
DEFAULT_BUFFER_MIB = 200  # of a communicator, where HCCL_BUFFSIZE is not set
MAX_EXPERTS = 512
PRODUCTS = {"Ascend910B": "A2", "Ascend910_93": "A3"}  # how the names of their devices begin


def product_of(device_name: str) -> str | None:
    """The Atlas product that a device belongs to ("Ascend910B3": A2, "Ascend910_9391": A3), None if unknown."""
    return next((product for begin, product in PRODUCTS.items() if device_name.startswith(begin)), None)


@dataclass(frozen=True, kw_only=True)
class ExchangeSizes:
    """What decides whether and how tokens can be dispatched."""

    ranks: int
    tokens: int  # the most that any rank has in a step
    experts: int
    top_k: int
    hidden_size: int


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """One way in which dispatch and combine may communicate, with its limits."""

    name: str  # comm_alg of dispatch
    combine_name: str  # comm_alg of combine
    ranks: Collection[int]
    hidden_sizes: range
    max_tokens: int
    max_top_k: int
    takes_scales: bool  # expert_scales in dispatch, whose expand_scales then go into combine
    shared_expert_num: int
    buffer_bytes: Callable[[ExchangeSizes], int]

    def refusal(self, sizes: ExchangeSizes) -> str | None:
        """Which limit keeps these sizes out, None if they fit."""
        hidden = self.hidden_sizes
        limits = (
            (sizes.ranks in self.ranks, f"does not take {sizes.ranks} ranks"),
            (sizes.experts % sizes.ranks == 0, f"cannot share {sizes.experts} experts among {sizes.ranks} ranks"),
            (sizes.experts <= MAX_EXPERTS, f"takes at most {MAX_EXPERTS} experts, not {sizes.experts}"),
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


def a2_hierarchy_bytes(sizes: ExchangeSizes) -> int:
    token = 2 * sizes.hidden_size + 16 * round_up(sizes.top_k, 8)
    return (sizes.experts + sizes.ranks // 4) * round_up(sizes.tokens * token, 512) + 8 * MIB


def a3_bytes(sizes: ExchangeSizes, received_row: int) -> int:
    """received_row: bytes of a row where it arrives, its routing data and gaps included."""
    received = sizes.experts * sizes.tokens * received_row  # every local expert has room for all ranks' tokens
    return 2 * (received + sizes.top_k * sizes.tokens * round_up(2 * sizes.hidden_size, 512))


def a3_fullmesh_v1_bytes(sizes: ExchangeSizes) -> int:
    return a3_bytes(sizes, round_up(round_up(2 * sizes.hidden_size, 32) + 64, 512))


def a3_fullmesh_v2_bytes(sizes: ExchangeSizes) -> int:
    return a3_bytes(sizes, -(-(round_up(2 * sizes.hidden_size, 32) + 64) // 480) * 512)


ALGORITHMS = {  # the best first
    "A2": (
        Algorithm(
            name="hierarchy",  # within a node first, then between nodes of 8
            combine_name="hierarchy",
            ranks=(16, 32, 64),
            hidden_sizes=range(32, 10241, 32),
            max_tokens=512,
            max_top_k=16,
            takes_scales=True,
            shared_expert_num=1,  # the default; there is none, as no rank is given to it
            buffer_bytes=a2_hierarchy_bytes,
        ),
        Algorithm(
            name="fullmesh",
            combine_name="fullmesh",
            ranks=(*range(2, 9), 16, 32, 64, 128, 256),
            hidden_sizes=range(32, 7169, 32),
            max_tokens=256,
            max_top_k=16,
            takes_scales=True,
            shared_expert_num=1,
            buffer_bytes=a2_fullmesh_bytes,
        ),
    ),
    "A3": (
        Algorithm(
            name="fullmesh_v2",
            combine_name="",  # knows no other but hierarchy
            ranks=range(2, 769),
            hidden_sizes=range(1024, 8193),
            max_tokens=256,
            max_top_k=12,
            takes_scales=False,
            shared_expert_num=0,
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
            buffer_bytes=a3_fullmesh_v1_bytes,
        ),
    ),
}


def choose_algorithm(product: str | None, sizes: ExchangeSizes) -> tuple[Algorithm | None, str]:
    """The first algorithm of the product that takes these sizes, or None; and a line that says which, or why none."""
    if product is None:
        return None, "unknown product"
    refusals = []
    for algorithm in ALGORITHMS[product]:
        refusal = algorithm.refusal(sizes)
        if refusal is None:
            return algorithm, f"{product} {algorithm.name}"
        refusals.append(refusal)
    return None, f"{product} {', '.join(refusals)}"


def buffer_setting(algorithm: Algorithm, sizes: ExchangeSizes, given: str | None) -> str:
    """HCCL_BUFFSIZE (MB) for these sizes: `given` by the user if that is enough, else at least HCCL's default.

    Raises ValueError where the user's is too small or no number.
    """
    need = algorithm.buffer_mib(sizes)
    if given is None:
        return str(max(need, DEFAULT_BUFFER_MIB))
    if not given.isdecimal() or int(given) < need:
        raise ValueError(
            f"HCCL_BUFFSIZE: {given} MB given, but dispatch and combine ({algorithm.name}, {sizes.ranks} ranks, "
            f"{sizes.tokens} tokens on each) need {need} MB; raise it, or leave it unset"
        )
    return given
