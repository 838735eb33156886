# SPDX-License-Identifier: Apache-2.0
"""What devices do: one interface of fused operations, bound once per process to the backend of its device.

Shapes: T tokens of a step, B sequences, D hidden size, H query heads, G kv heads, C head dim, E experts, K top-k,
F expert width, N output width, L cache blocks, S cache block size.
"""

import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

import torch

from ops.ascend import ExchangeSizes
from ops.comm import Group
from ops.profiler import Profiler
from ops.recorder import GraphRecorder
from ops.routing import GroupedRows, RouterLogits, Routing
from ops.weight import DenseWeight, TransposedWeight, Weight

__all__ = [
    "DenseWeight",
    "GroupedRows",
    "Ops",
    "RouterLogits",
    "Routing",
    "StepMetadata",
    "TransposedWeight",
    "Weight",
    "load_ops",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepMetadata:
    """Where the tokens of one step stand. Sequences are packed one after the other along T.

    Tensors live on the device; the two lists repeat on the host what some kernels want as plain integers. Before each
    replay of a captured decode step the tensors are rewritten; what the step made of the lists, the replay renews.
    """

    is_prefill: bool
    positions: torch.Tensor  # [T] int64, of each token in its sequence
    slot_mapping: torch.Tensor  # [T] int64, cache slot of each token: block * S + offset
    block_table: torch.Tensor  # [B, max_blocks] int64, cache blocks of each sequence; unused entries are 0
    seq_lens: torch.Tensor  # [B] int64, tokens of each sequence including those of this step
    query_lens_list: list[int]  # [B], tokens of each sequence in this step
    seq_lens_list: list[int]  # [B], the same as seq_lens
    dp_num_tokens: list[int]  # tokens of this step in every group of attention ranks, this one's among them
    sequence_parallel: bool = False  # whether, outside attention, the ranks of a group share its tokens out

    @property
    def num_tokens(self) -> int:
        return self.positions.shape[0]

    @property
    def max_dp_tokens(self) -> int:
        return max(self.dp_num_tokens)


class Ops:
    """The operations a model is built of: each is the largest piece of a layer that some backend runs as one kernel.

    `residual` is the running sum of the layers' outputs. Operations that take it add `hidden_states` first and return
    the sum; None stands for a residual that has not begun. Its dtype is the backend's choice.
    """

    name = "abstract"
    can_record = False  # whether a decode step never waits for the device, on a device that has graphs
    decode_reads_nothing = False  # whether decode steps must not wait for the device to tell the host a number

    def check_model(self, dtype: torch.dtype, head_dim: int) -> None:
        """ValueError naming the setting if the backend cannot run a model of this dtype and head size."""

    def fallbacks(self, dtype: torch.dtype) -> list[str]:
        """What this backend has no operation of its own for, with a model of `dtype`, and what it had to replace."""
        return inherited_operations(self)

    def prepare_weight(self, weight: Weight) -> Weight:
        """A loaded weight in the form that the backend's matrix products want; the given one may be freed."""
        return weight

    def prepare_attention(
        self, cos_sin: tuple[torch.Tensor, torch.Tensor], step: StepMetadata, dtype: torch.dtype
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], StepMetadata]:
        """What `attention` of every layer takes, made once a step: cos and sin [T, C] float32 and the step, in the
        form the backend's kernels want for a model of `dtype`."""
        return cos_sin, step

    def graph_recorder(self) -> GraphRecorder:
        """Records decode steps where `can_record`."""
        return GraphRecorder()

    def profiler(self) -> Profiler:
        """Traces what the device does."""
        return Profiler()

    def plan_dispatch(self, sizes: ExchangeSizes) -> Any:
        """How a fused pair of operations can bring tokens to their experts, or None.

        A plan has `set_environment()`, to be called before the ranks meet (ValueError for what the user has to change),
        and `make(group)`, which gives a `FusedPair` (models/layers/expert_exchange.py) over a group of its own.
        """
        return None

    def refuses_linear_all_reduce(self, ranks: int) -> str | None:
        """Why `linear_all_reduce` over so many ranks is not one operation here, None if it is."""
        return "only possible on device npu"

    def linear_all_reduce(self, hidden_states: torch.Tensor, weight: Weight, group: Group) -> torch.Tensor:
        """`linear`, summed over a group's ranks, each of which has its columns: [T, K] -> [T, N]."""
        return group.all_reduce(self.linear(hidden_states, weight))

    def prefetch(self, weight: Weight) -> None:
        """Begins to fetch a weight into the cache, beside what is computed meanwhile."""

    def embedding(self, token_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Rows of `weight` [V, D] for `token_ids` [T] int64 -> [T, D]."""
        raise NotImplementedError

    def add_norm(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None, norm_weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add and RMSNorm (Zhang and Sennrich 2019): [T, D] -> normed [T, D] in the model's dtype, residual [T, D]."""
        raise NotImplementedError

    def linear(self, hidden_states: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[T, K] x weight [N, K] (+ bias [N]) -> [T, N]."""
        raise NotImplementedError

    def norm_linear(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        norm_weight: torch.Tensor,
        eps: float,
        weight: Weight,
        bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`add_norm`, then `linear`: [T, D] -> [T, N], residual [T, D]."""
        raise NotImplementedError

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """SiLU of the first half times the second: [T, 2F] -> [T, F]."""
        raise NotImplementedError

    def attention(
        self,
        qkv: torch.Tensor,
        q_norm_weight: torch.Tensor,
        k_norm_weight: torch.Tensor,
        eps: float,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        step: StepMetadata,
    ) -> torch.Tensor:
        """Per-head RMSNorm of q and k, rotary embedding, cache write, causal attention over the paged cache.

        qkv [T, (H + 2G) * C] holds all query heads, then all key heads, then all value heads; the norm weights are [C];
        cos and sin, whose first half is repeated, and the step are what `prepare_attention` returned; the caches are
        [L, S, G, C] and written in place. A prefill step starts its sequences (no token of theirs is cached yet).
        Returns [T, H * C].
        """
        raise NotImplementedError

    def route(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        norm_weight: torch.Tensor,
        eps: float,
        router_weight: torch.Tensor,
        top_k: int,
        renormalize: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, Routing | RouterLogits]:
        """`add_norm`, router [E, D], softmax over all experts, top-k; weights sum to 1 if `renormalize`.

        Returns the normed hidden states [T, D], the residual [T, D] and the routing, chosen or still to be.
        """
        raise NotImplementedError

    def experts(
        self,
        hidden_states: torch.Tensor,
        routing: Routing | RouterLogits | GroupedRows,
        gate_up: Weight,
        down: Weight,
    ) -> torch.Tensor:
        """Weighted sum of the chosen experts' MLPs: [T, D], gate_up [E, 2F, D], down [E, D, F] -> [T, D].

        Of grouped rows, each row's MLP alone; the output of rows of no expert is undefined. Under expert parallelism E
        counts the experts of this rank.
        """
        raise NotImplementedError

    def sort_by_expert(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, num_experts: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A row for every choice, by expert: [T, D], ids [T, K] below num_experts -> rows [T * K, D].

        Also returns row_index [T * K], the row of choice k of token t at t * K + k, and tokens_per_expert
        [num_experts] int64.
        """
        raise NotImplementedError

    def weighted_sum(self, rows: torch.Tensor, row_index: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """Sum of each token's rows: [T * K, D], row_index as from `sort_by_expert`, weights [T, K] -> [T, D]."""
        raise NotImplementedError

    def regroup(
        self, rows: torch.Tensor, tokens_per_rank: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows received from several ranks, each rank's by expert, put by expert, each expert's by rank.

        rows [R, D], tokens_per_rank [ranks, E] int64 -> rows [R, D], order [R] of integers (row i was row order[i]) and
        tokens_per_expert [E] int64.
        """
        raise NotImplementedError


# those of a layer on one rank
OPERATIONS = "embedding add_norm linear norm_linear silu_and_mul attention route experts".split()


def inherited_operations(ops: Ops) -> list[str]:
    """Operations that a backend does not define: the reference's."""
    return [name for name in OPERATIONS if name not in vars(type(ops))]


def npu_available() -> bool:
    """Whether torch_npu is installed and sees a device."""
    if importlib.util.find_spec("torch_npu") is None:
        return False
    import torch_npu

    return torch_npu.npu.is_available()


def load_ops(device_type: str) -> Ops:
    """The operations of a device type ("cpu", "cuda", "npu"); what its backend lacks is the plain torch reference."""
    if device_type == "npu":
        from ops.npu import NpuOps

        return log_bindings(NpuOps())
    from ops.reference import ReferenceOps

    if device_type == "cuda" and importlib.util.find_spec("triton") is not None:
        from ops.cuda import CudaOps

        return log_bindings(CudaOps())
    return log_bindings(ReferenceOps(grouped_mm=device_type != "cpu"))


def log_bindings(ops: Ops) -> Ops:
    """Says once which operations are the backend's own; single calls it cannot take still go to the reference."""
    inherited = inherited_operations(ops)
    others = f", reference: {', '.join(inherited)}" if inherited else ""
    logger.info("ops: %s %d/%d%s", ops.name, len(OPERATIONS) - len(inherited), len(OPERATIONS), others)
    return ops
