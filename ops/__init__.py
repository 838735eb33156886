# SPDX-License-Identifier: Apache-2.0
"""Interface of the fused operations of the model, implemented by one backend per device type.

Shapes: T tokens of a step, B sequences, D hidden size, H query heads, G kv heads, C head dim, E experts, K top-k,
F expert width, N output width, L cache blocks, S cache block size.
"""

import importlib.util
import logging
from collections.abc import Collection
from typing import Any

import torch

from ops.ascend import ExchangeSizes
from ops.profiler import Profiler
from ops.recorder import GraphRecorder
from ops.routing import GroupedRows, RouterLogits, Routing
from ops.step import StepMetadata
from ops.weight import DENSE, DenseWeight, Fp8Weight, Int4Weight, Int8StaticWeight, Int8Weight, TransposedWeight, Weight

__all__ = [
    "DenseWeight",
    "Fp8Weight",
    "GroupedRows",
    "Int4Weight",
    "Int8StaticWeight",
    "Int8Weight",
    "Ops",
    "RouterLogits",
    "Routing",
    "StepMetadata",
    "TransposedWeight",
    "Weight",
    "load_ops",
]

logger = logging.getLogger(__name__)


class Ops:
    """Backend interface: operations of a forward pass, each the largest part that some backend fuses.

    `residual` is the residual stream [T, D], in a dtype that the backend chooses. Operations that take it first add
    `hidden_states` to it and return the sum; before the first layer it is None.
    """

    name = "abstract"
    can_record = False  # whether decode steps can be captured: the device has graphs and the step has no host sync
    runs_ahead = False  # whether a step can be launched before the tokens of the previous one are read
    decode_without_host_sync = False  # whether decode steps must not contain a host sync
    dequantizes: tuple[type[Weight], ...] = ()  # weights that `prepare_weight` converts to unquantised ones

    def check_model(self, dtype: torch.dtype, head_dim: int) -> None:
        """Validates dtype and head_dim; raises ValueError naming the setting if the backend does not support it."""

    def fallbacks(self, dtype: torch.dtype, formats: Collection[str] = ()) -> list[str]:
        """Names the operations that use the reference, or a less preferred kernel, for a model of `dtype`.

        formats: number formats of the model's weights (`Weight.format_name`); for a quantised one, the operations that
        take weights are named as "linear w4a16".
        """
        return inherited_operations(self)

    def prepare_weight(self, weight: Weight, dtype: torch.dtype) -> Weight:
        """Converts a loaded weight to the layout of the backend's matmuls for a model of `dtype`; the memory of the
        original may be freed. TypeError for a format that the backend does not know."""
        return weight

    def cache_shape(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """Shape of the keys, and of the values, of a layer's cache; the first dimension is that of the blocks."""
        return num_blocks, block_size, num_kv_heads, head_dim

    def prepare_attention(
        self, cos_sin: tuple[torch.Tensor, torch.Tensor], step: StepMetadata, dtype: torch.dtype
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], StepMetadata]:
        """Converts the inputs of `attention` that all layers share, once per step: cos and sin [T, C] float32 and the
        step metadata, in the dtypes and layouts of the backend's kernels for a model of `dtype`."""
        return cos_sin, step

    def graph_recorder(self) -> GraphRecorder:
        """Returns the recorder that captures and replays decode steps as graphs; only used if `can_record`."""
        return GraphRecorder()

    def profiler(self) -> Profiler:
        """Returns the profiler of this device."""
        return Profiler()

    def plan_dispatch(self, sizes: ExchangeSizes) -> Any:
        """Plans expert-parallel dispatch and combine by a pair of fused operations; None if the backend has none.

        A plan has `set_environment()`, to be called before the process groups are initialised (raises ValueError for a
        wrong user setting), and `make(group)`, which returns `FusedPair`s (models/layers/expert_exchange.py), the
        preferred first, that use a process group of their own.
        """
        return None

    def embedding(self, token_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Embedding lookup in `weight` [V, D]: token_ids [T] int64 -> [T, D]."""
        raise NotImplementedError

    def add_norm(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None, norm_weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add and RMSNorm (Zhang and Sennrich 2019): [T, D] -> normed [T, D] in the model's dtype, residual [T, D]."""
        raise NotImplementedError

    def linear(self, hidden_states: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Linear layer: [T, K] x weight [N, K] transposed (+ bias [N]) -> [T, N]."""
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
        """`add_norm` followed by `linear`: [T, D] -> [T, N], residual [T, D]."""
        raise NotImplementedError

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """SwiGLU activation, SiLU(gate) * up with the gate in the first half: [T, 2F] -> [T, F]."""
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
        cos and sin (half-split rotary: the second half repeats the first) and the step come from `prepare_attention`;
        the caches (`cache_shape`; [L, S, G, C] by default) are written in place. Each token attends to the cached
        tokens of its sequence, to the new ones before it and to itself. Returns [T, H * C].
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

        Returns the normed hidden states [T, D], the residual [T, D] and the routing: top-k ids and weights, or the
        router logits if top-k is fused into `experts`.
        """
        raise NotImplementedError

    def experts(
        self,
        hidden_states: torch.Tensor,
        routing: Routing | RouterLogits | GroupedRows,
        gate_up: Weight,
        down: Weight,
    ) -> torch.Tensor:
        """Weighted sum of the MLPs of each token's top-k experts: [T, D], gate_up [E, 2F, D], down [E, D, F] -> [T, D].

        For `GroupedRows` each row goes through its expert without weighting; rows past the last expert's are undefined.
        Under expert parallelism E is the number of local experts.
        """
        raise NotImplementedError

    def sort_by_expert(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, num_experts: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Permutes tokens into expert order, one row per top-k choice: [T, D], ids [T, K] < num_experts -> [T * K, D].

        Also returns row_index [T * K], whose entry t * K + k is the row of choice k of token t, and tokens_per_expert
        [num_experts] int64.
        """
        raise NotImplementedError

    def weighted_sum(self, rows: torch.Tensor, row_index: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """Inverse of `sort_by_expert`, summed with weights [T, K]: rows [T * K, D], row_index [T * K] -> [T, D]."""
        raise NotImplementedError

    def regroup(
        self, rows: torch.Tensor, tokens_per_rank: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Reorders rows received by all-to-all from rank-major (by expert within each rank) to expert-major order.

        rows [R, D], tokens_per_rank [ranks, E] int64 -> rows [R, D], order [R] (integers; output row i is input row
        order[i]) and tokens_per_expert [E] int64.
        """
        raise NotImplementedError


# operations of a forward pass on one rank, for which a backend may have kernels
OPERATIONS = "embedding add_norm linear norm_linear silu_and_mul attention route experts".split()
WEIGHTED_OPERATIONS = "linear norm_linear experts".split()  # those that take a Weight


def inherited_operations(ops: Ops) -> list[str]:
    """Names the operations that a backend inherits from the reference."""
    return [name for name in OPERATIONS if name not in vars(type(ops))]


def reference_formats(formats: Collection[str]) -> list[str]:
    """Names each operation on each quantised format, for a backend without kernels for these."""
    return [f"{name} {fmt}" for fmt in formats if fmt != DENSE for name in WEIGHTED_OPERATIONS]


def npu_available() -> bool:
    """Returns whether torch_npu is installed and finds a device."""
    if importlib.util.find_spec("torch_npu") is None:
        return False
    import torch_npu

    return torch_npu.npu.is_available()


def load_ops(device_type: str) -> Ops:
    """Loads the backend of a device type ("cpu", "cuda", "npu"); operations that it lacks use the torch reference."""
    if device_type == "npu":
        from ops.npu import NpuOps

        return log_bindings(NpuOps())
    from ops.reference import ReferenceOps

    if device_type == "cuda" and importlib.util.find_spec("triton") is not None:
        from ops.cuda import CudaOps

        return log_bindings(CudaOps())
    return log_bindings(ReferenceOps(grouped_mm=device_type != "cpu"))


def log_bindings(ops: Ops) -> Ops:
    """Logs which operations have kernels of the backend; single calls may still fall back to the reference."""
    inherited = inherited_operations(ops)
    others = f", reference: {', '.join(inherited)}" if inherited else ""
    logger.info("ops: %s %d/%d%s", ops.name, len(OPERATIONS) - len(inherited), len(OPERATIONS), others)
    return ops
