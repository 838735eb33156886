# SPDX-License-Identifier: Apache-2.0
"""Backend for Ascend NPUs (Atlas A2 and A3) on torch_npu's fused operations, one call per operation where possible.

Calls follow each operation's page in op-plugin (docs/zh/custom_APIs/torch_npu) and its adapter (op_plugin/ops/opapi);
docs/npu.md lists how they are verified. torch_npu 2.8 to 2.14; where an installation lacks an operation,
`select_variant` falls back to the next best. Shape letters as in ops/__init__.py; R = T * K routed rows.
"""

import dataclasses
import logging
import math
from itertools import accumulate

import torch
import torch_npu
from torch import Tensor
from torch.nn import functional as F

from ops import Routing, StepMetadata
from ops.ascend import ExchangeSizes, choose_algorithms, product_of
from ops.npu.calls import npu
from ops.npu.communicators import super_nodes
from ops.npu.exchange import DISPATCH_AND_COMBINE, DispatchPlan
from ops.npu.experts import NpuExperts
from ops.npu.fused_qkv import QKV, TILE, FusedQkv, probe, tiled_shape
from ops.npu.profiler import NpuProfiler
from ops.npu.recorder import NpuGraphRecorder
from ops.npu.variants import (
    ATTENTION,
    CACHE_WRITE,
    COMBINE,
    GATING,
    HEAD_DIM,
    LENGTHS_ARGUMENT,
    LOCAL_EXPERTS,
    REGROUP,
    ROTARY,
)
from ops.npu.weights import cast_to_nz, is_tiled_exactly
from ops.reference import ReferenceOps
from ops.step import BLOCK_SIZE
from ops.weight import DenseWeight, TransposedWeight, Weight

logger = logging.getLogger(__name__)

STEP_FIELDS = [field.name for field in dataclasses.fields(StepMetadata)]
MAX_GRAPHS_A3 = 6  # with HCCL's default expansion there, on the AI CPU (page of HCCL_OP_EXPANSION_MODE)
REQUIRED = (
    "npu_rms_norm",
    "npu_add_rms_norm",
    "npu_swiglu",
    "npu_moe_init_routing_v2",
    "npu_grouped_matmul",
    "npu_format_cast",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NpuStep(StepMetadata):
    """Step metadata for fused attention: contiguous block_table, and the cumulative query lengths of the TND layout."""

    query_ends: list[int]  # [B], cumulative query lengths


class NpuOps(NpuExperts):
    """Operations on torch_npu. The residual stream has the model's dtype, as npu_add_rms_norm requires.

    `device`: where the variants are probed; any other than an NPU is for tests.
    """

    name = "npu"
    embedding = ReferenceOps.embedding  # a single torch operation
    norm_linear = NpuExperts.norm_linear
    experts = NpuExperts.experts
    decode_without_host_sync = True

    def __init__(self, device: str = "npu"):
        super().__init__(device)
        missing = [name for name in REQUIRED if not hasattr(npu, name)]
        if missing:
            raise ValueError(f"device: npu needs a newer torch_npu: {', '.join(missing)} is not in the installed one")
        if hasattr(torch, "npu"):  # not on meta tensors
            torch.npu.config.allow_internal_format = True  # else the cast to FRACTAL_NZ silently does nothing
        # 1 = masked; sparse_mode 3 (causal) requires this size for any sequence length
        self.causal_mask = torch.ones(2048, 2048, dtype=torch.int8).triu(1).to(device)
        self.product = product_of(torch_npu.npu.get_device_name())
        self.paged_views: dict[int, tuple[Tensor, Tensor]] = {}
        self.rotate = self.select_variant("rotary", ROTARY)
        self.write_cache = self.select_variant("cache write", CACHE_WRITE)
        self.attend = self.select_variant("attention", ATTENTION)
        self.gating = self.select_variant("gating", GATING)
        self.combine = self.select_variant("combine", COMBINE)
        self.combine_local = self.select_variant("local experts", LOCAL_EXPERTS)
        self.regroup_rows = self.select_variant("regroup", REGROUP)
        self.fused_qkv: FusedQkv | None = self.select_variant("qkv", QKV, self.probe_qkv)
        logger.info("ops: npu, %s", ", ".join(f"{what}: {name}" for what, name in self.bindings.items()))

    def probe_qkv(self, variant: FusedQkv | None, device: str) -> None:
        """Tries a variant of QKV, which stays bound; RuntimeError where attention then differs from the reference."""
        self.fused_qkv = variant
        if variant is None:
            return
        try:
            probe(self, HEAD_DIM, device)
        except (RuntimeError, AttributeError):
            raise
        except Exception as error:  # Triton's compilers have error classes of their own
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        finally:
            self.paged_views.clear()

    def plan_dispatch(self, sizes: ExchangeSizes) -> DispatchPlan | None:
        missing = [name for name in DISPATCH_AND_COMBINE if not hasattr(npu, name)]
        if self.product == "A3":
            sizes = dataclasses.replace(sizes, spans_super_nodes=len(set(super_nodes())) > 1)
        algorithms, why = choose_algorithms(self.product, sizes)
        if missing or not algorithms:
            logger.info("no dispatch and combine: %s", f"torch_npu lacks {missing[0]}" if missing else why)
            return None
        return DispatchPlan(algorithms, sizes)

    def check_model(self, dtype: torch.dtype, head_dim: int) -> None:
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"model_config.dtype: {str(dtype).removeprefix('torch.')} is not possible on device npu, whose fused "
                "attention takes bfloat16 and float16"
            )
        if head_dim != HEAD_DIM:
            raise ValueError(f"model_path: head_dim {head_dim} is not possible on device npu, only {HEAD_DIM}")

    def prepare_weight(self, weight: Weight, dtype: torch.dtype) -> Weight:
        """Transposes and casts to FRACTAL_NZ where no padding is needed: [N, K] -> [K, N], or [E, N, K] -> [E, K, N].

        For quantised weights see `NpuQuantized.prepare_weight`.
        """
        if not isinstance(weight, DenseWeight):
            weight = super().prepare_weight(weight, dtype)
        if not isinstance(weight, DenseWeight) or not is_tiled_exactly(weight.data.transpose(-1, -2)):
            return weight
        return TransposedWeight(cast_to_nz(weight.data.transpose(-1, -2).contiguous()))

    def prepare_attention(
        self, cos_sin: tuple[Tensor, Tensor], step: StepMetadata, dtype: torch.dtype
    ) -> tuple[tuple[Tensor, Tensor], NpuStep]:
        cos, sin = (part.to(dtype) for part in cos_sin)
        if self.fused_qkv is None:
            cos, sin = cos[:, None], sin[:, None]  # [T, 1, C]
        fields = {name: getattr(step, name) for name in STEP_FIELDS}
        fields["block_table"] = step.block_table.contiguous()
        return (cos, sin), NpuStep(**fields, query_ends=list(accumulate(step.query_lens_list)))

    def graph_recorder(self) -> NpuGraphRecorder:
        return NpuGraphRecorder(LENGTHS_ARGUMENT[self.attend], MAX_GRAPHS_A3 if self.product == "A3" else None)

    def profiler(self) -> NpuProfiler:
        return NpuProfiler()

    def add_norm(
        self, hidden_states: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        if hidden_states.shape[0] == 0:
            return hidden_states, hidden_states if residual is None else residual
        if residual is None:
            return npu.npu_rms_norm(hidden_states, norm_weight, eps)[0], hidden_states
        normed, _, residual = npu.npu_add_rms_norm(residual, hidden_states, norm_weight, eps)
        return normed, residual

    def linear(self, hidden_states: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, DenseWeight):
            return F.linear(hidden_states, weight.data, bias)
        if not isinstance(weight, TransposedWeight):
            return super().linear(hidden_states, weight, bias)
        if hidden_states.shape[0] == 0:
            return hidden_states.new_empty(0, weight.data.shape[1])
        if bias is None:
            return torch.mm(hidden_states, weight.data)
        return torch.addmm(bias, hidden_states, weight.data)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        if gate_up.shape[0] == 0:
            return gate_up[:, gate_up.shape[1] // 2 :]
        return npu.npu_swiglu(gate_up, -1)

    def attention(  # type: ignore[override] # takes the step that prepare_attention returns
        self,
        qkv: Tensor,
        q_norm_weight: Tensor,
        k_norm_weight: Tensor,
        eps: float,
        cos_sin: tuple[Tensor, Tensor],
        key_cache: Tensor,
        value_cache: Tensor,
        step: NpuStep,
    ) -> Tensor:
        num_tokens, width = qkv.shape
        num_kv_heads = math.prod(key_cache.shape[1:]) // (BLOCK_SIZE * HEAD_DIM)
        num_heads = width // HEAD_DIM - 2 * num_kv_heads
        if num_tokens == 0:
            return qkv[:, : num_heads * HEAD_DIM]
        packed = self.fused_qkv is None and step.starts_fresh and not step.is_decode
        if self.fused_qkv is not None:
            norms = (q_norm_weight, k_norm_weight, eps)
            query = self.fused_qkv.prepare(qkv, *norms, *cos_sin, key_cache, value_cache, step.slot_mapping)
        else:
            heads = qkv.view(num_tokens, num_heads + 2 * num_kv_heads, HEAD_DIM)
            # torch.split has a Python wrapper that costs more than this whole call
            query, key, value = torch.split_with_sizes(heads, (num_heads, num_kv_heads, num_kv_heads), 1)
            query = npu.npu_rms_norm(query, q_norm_weight, eps)[0]
            key = npu.npu_rms_norm(key, k_norm_weight, eps)[0]
            value = value.contiguous()
            query, key = self.rotate(query, key, *cos_sin)
            self.write_cache(key, value, key_cache, value_cache, step.slot_mapping)
        if packed:  # packed keys (TND): cumulative lengths, as for queries
            lengths, paged = step.query_ends, (None, 0)
        else:  # paged cache: the length of each sequence
            key, value = self.paged(key_cache), self.paged(value_cache)
            lengths, paged = step.seq_lens_list, (step.block_table, BLOCK_SIZE)
        output = self.attend(query, key, value, num_kv_heads, self.causal_mask, step.query_ends, lengths, *paged)
        return output.flatten(1)

    def paged(self, cache: Tensor) -> Tensor:
        """Returns the view of a cache that paged attention takes, created once per cache: [L, S, G * C], or of a tiled
        one [L, G, C / 16, S, 16]."""
        if id(cache) not in self.paged_views:
            tiled = self.fused_qkv is not None and self.fused_qkv.tiled
            view = cache.unflatten(1, (-1, HEAD_DIM // TILE)) if tiled else cache.flatten(2)
            self.paged_views[id(cache)] = cache, view  # a live cache's id is unique
        return self.paged_views[id(cache)][1]

    def cache_shape(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        return tiled_shape(*shape) if self.fused_qkv is not None and self.fused_qkv.tiled else shape

    def route(
        self,
        hidden_states: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        eps: float,
        router_weight: Tensor,
        top_k: int,
        renormalize: bool,
    ) -> tuple[Tensor, Tensor, Routing]:
        normed, residual = self.add_norm(hidden_states, residual, norm_weight, eps)
        if normed.shape[0] == 0:
            none = normed.new_empty(0, top_k)
            return normed, residual, Routing(none, none.int())
        logits = F.linear(normed, router_weight)
        return normed, residual, Routing(*self.gating(logits, top_k, renormalize))
