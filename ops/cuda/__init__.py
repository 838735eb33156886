# SPDX-License-Identifier: Apache-2.0
"""CUDA backend: Triton kernels for NVIDIA GPUs.

Steps of up to MAX_TOKENS tokens run one to four kernels per operation. The first call for each pair of weight and
number of tokens selects kernel or reference and allocates output buffers, which the next call with that pair
overwrites. Larger steps use elementwise kernels, torch's matmuls, attention kernels and torch's, and grouped
GEMM kernels for the experts.
"""

import logging
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
import triton
from torch.nn import functional as F

from ops import OPERATIONS, GroupedRows, RouterLogits, Routing, StepMetadata, reference_formats
from ops.cuda.attention import DecodeAttentionCall, attention_supports
from ops.cuda.expert_order import ExpertOrder
from ops.cuda.experts import BatchedExpertsCall, ExpertsCall, experts_support
from ops.cuda.extend_attention import ExtendAttentionCall
from ops.cuda.grouped import GroupedExpertsCall, SortedExpertsCall, grouped_experts_support
from ops.cuda.int4_calls import CudaInt4Weight
from ops.cuda.int4_ops import DTYPES, Int4Ops
from ops.cuda.launch import BoundKernel, fits, has_pdl
from ops.cuda.linear import LinearCall, NormLinearCall, RouteCall, gemv_supports
from ops.cuda.matmul import MatmulCall, NormMatmulCall, matmul_supports
from ops.cuda.moe import topk_softmax_kernel
from ops.cuda.norm import add_norm_constants, add_norm_kernel, silu_and_mul_kernel
from ops.cuda.prefill_attention import LONGEST, NormRotaryCacheCall, PrefillAttentionCall
from ops.cuda.tiles import GROUPED_ROWS, MAX_TOKENS
from ops.cuda.triton_internals import KNOWS_LAUNCHER
from ops.reference import ReferenceOps
from ops.weight import DenseWeight, Weight

logger = logging.getLogger(__name__)

LEAST_CAPABILITY = (8, 0)  # Ampere: earlier GPUs have too little shared memory for an attention tile
MAX_NORM_WIDTH = 16384
ELEMENTWISE_BLOCK = 1024


class CudaOps(Int4Ops):
    """Operations as Triton kernels; unsupported inputs fall back to the reference."""

    name = "cuda"
    runs_ahead = True
    dequantizes = ()
    embedding = ReferenceOps.embedding  # torch runs it as one kernel

    def __init__(self) -> None:
        super().__init__(grouped_mm=True)
        self.pdl = has_pdl()
        if not KNOWS_LAUNCHER:
            logger.warning("triton %s: kernels are launched by Triton's own, slower launcher", triton.__version__)
        # (operation, id(weight), tokens) -> bound call; `weights` keeps the weights alive, so that ids stay unique
        self.calls: dict[tuple[str, int, int], Callable[..., Any]] = {}
        self.weights: list[Any] = []
        self.elementwise: dict[tuple[Any, ...], BoundKernel] = {}
        self.orders: dict[int, ExpertOrder] = {}  # key: number of experts
        self.unsupported_int4: dict[str, None] = {}
        self.extend: dict[tuple[int, int, int], ExtendAttentionCall] = {}  # key: H, G, C

    def check_model(self, dtype: torch.dtype, head_dim: int) -> None:
        if not torch.cuda.is_available():
            return  # Triton interpreter
        capability = torch.cuda.get_device_capability()
        if capability < LEAST_CAPABILITY:
            found, least = (".".join(map(str, numbers)) for numbers in (capability, LEAST_CAPABILITY))
            raise ValueError(
                f"device: cuda: {torch.cuda.get_device_name()} has compute capability {found}, the kernels need "
                f"{least} or later; device: cpu runs anywhere"
            )

    def fallbacks(self, dtype: torch.dtype, formats: Collection[str] = ()) -> list[str]:
        """As in the interface; formats other than W4A16 use the reference."""
        if dtype not in DTYPES:
            return OPERATIONS
        left = [f"w4a16 ({reason})" for reason in self.unsupported_int4] if "w4a16" in formats else []
        return super().fallbacks(dtype) + reference_formats([name for name in formats if name != "w4a16"] + left)

    def add_norm(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None, norm_weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens, d = hidden_states.shape
        if num_tokens == 0 or not takes(hidden_states, residual) or d > MAX_NORM_WIDTH:
            return super().add_norm(hidden_states, residual, norm_weight, eps)
        constants = add_norm_constants(d, eps, residual is not None, self.pdl)
        kernel = self.elementwise_kernel(add_norm_kernel, hidden_states.dtype, **constants)
        normed, summed = torch.empty_like(hidden_states), torch.empty_like(hidden_states, dtype=torch.float32)
        first = hidden_states if residual is None else residual
        kernel.grid = (num_tokens, 1, 1)
        kernel(hidden_states, first, norm_weight, normed, summed)
        return normed, summed

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        num_tokens, f = gate_up.shape[0], gate_up.shape[1] // 2
        if num_tokens == 0 or not takes(gate_up):
            return super().silu_and_mul(gate_up)
        block = min(ELEMENTWISE_BLOCK, triton.next_power_of_2(f))
        kernel = self.elementwise_kernel(silu_and_mul_kernel, gate_up.dtype, F=f, BLOCK=block)
        output = gate_up.new_empty(num_tokens, f)
        kernel.grid = (num_tokens, triton.cdiv(f, block), 1)
        kernel(gate_up, output)
        return output

    def linear(self, hidden_states: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        if isinstance(weight, CudaInt4Weight):
            return self.linear_int4(hidden_states, weight, bias)
        if not isinstance(weight, DenseWeight) or not 0 < hidden_states.shape[0] <= MAX_TOKENS:
            return super().linear(hidden_states, weight, bias)
        key = ("linear", id(weight), hidden_states.shape[0])
        call = self.calls.get(key)
        if call is None:
            kernels_take = takes(hidden_states)
            if kernels_take and gemv_supports(hidden_states, weight.data):
                call = LinearCall(hidden_states, weight.data, bias, self.pdl)
            elif kernels_take and matmul_supports(hidden_states, weight.data):
                call = MatmulCall(hidden_states, weight.data, bias, self.pdl)
            else:
                call = partial(super().linear, weight=weight, bias=bias)
            self.bind(key, weight, call)
        return call(hidden_states)

    def norm_linear(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        norm_weight: torch.Tensor,
        eps: float,
        weight: Weight,
        bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(weight, CudaInt4Weight):
            return self.norm_linear_int4(hidden_states, residual, norm_weight, eps, weight, bias)
        num_tokens = hidden_states.shape[0]
        if not isinstance(weight, DenseWeight) or not 0 < num_tokens <= MAX_TOKENS:
            return super().norm_linear(hidden_states, residual, norm_weight, eps, weight, bias)
        key = ("norm_linear" if residual is None else "add_norm_linear", id(weight), num_tokens)
        call = self.calls.get(key)
        if call is None:
            kernels_take = takes(hidden_states, residual)
            arguments = (hidden_states, weight.data, bias, self.pdl, (norm_weight, eps), residual is not None)
            if kernels_take and gemv_supports(hidden_states, weight.data):
                call = NormLinearCall(*arguments)
            elif kernels_take and matmul_supports(hidden_states, weight.data):
                call = NormMatmulCall(*arguments)
            else:
                call = partial(super().norm_linear, norm_weight=norm_weight, eps=eps, weight=weight, bias=bias)
            self.bind(key, weight, call)
        return call(hidden_states, residual)

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
        norms = (q_norm_weight, k_norm_weight, eps)
        num_tokens = qkv.shape[0]
        if num_tokens == 0:
            return super().attention(qkv, *norms, cos_sin, key_cache, value_cache, step)
        kind = "decode_attention" if step.is_decode else "attention"
        key = (kind, id(q_norm_weight), num_tokens if step.is_decode else 0)  # the others take any number of tokens
        call = self.calls.get(key)
        if call is None:
            if not takes(qkv) or not attention_supports(qkv, cos_sin, key_cache):
                return super().attention(qkv, *norms, cos_sin, key_cache, value_cache, step)
            if step.is_decode:
                call = DecodeAttentionCall(qkv, *norms, key_cache, self.pdl)
            else:
                norm_rotary_cache = NormRotaryCacheCall(qkv, *norms, key_cache)
                heads = (norm_rotary_cache.num_heads, norm_rotary_cache.num_kv_heads, norm_rotary_cache.head_dim)
                if heads not in self.extend:
                    self.extend[heads] = ExtendAttentionCall(*heads[:2], key_cache, self.pdl)
                call = partial(self.run_attention, norm_rotary_cache, PrefillAttentionCall(*heads), self.extend[heads])
            self.bind(key, q_norm_weight, call)
        return call(qkv, cos_sin, key_cache, value_cache, step)

    def run_attention(
        self,
        norm_rotary_cache: NormRotaryCacheCall,
        short_attention: PrefillAttentionCall,
        extend_attention: ExtendAttentionCall,
        qkv: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        step: StepMetadata,
    ) -> torch.Tensor:
        query_key = norm_rotary_cache(qkv, cos_sin, key_cache, value_cache, step.slot_mapping)
        if not step.starts_fresh:
            return extend_attention(query_key, key_cache, value_cache, step)
        if max(step.query_lens_list) <= LONGEST:
            return short_attention(query_key, qkv, step.positions)
        num_heads, num_kv_heads = norm_rotary_cache.num_heads, norm_rotary_cache.num_kv_heads
        query, key = query_key.split([num_heads, num_kv_heads], dim=1)
        value = qkv.unflatten(1, (-1, norm_rotary_cache.head_dim))[:, num_heads + num_kv_heads :]
        return self.prefill_attention(query, key, value, step).flatten(1)

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
        num_tokens = hidden_states.shape[0]
        if not 0 < num_tokens <= MAX_TOKENS:
            return self.route_many(hidden_states, residual, norm_weight, eps, router_weight, top_k, renormalize)
        key = ("route" if residual is None else "add_route", id(router_weight), num_tokens)
        call = self.calls.get(key)
        if call is None:
            norm = (norm_weight, eps)
            if takes(hidden_states, residual) and gemv_supports(hidden_states, router_weight, is_router=True):
                has_residual = residual is not None
                call = RouteCall(hidden_states, router_weight, self.pdl, norm, has_residual, top_k, renormalize)
            else:
                call = partial(
                    super().route,
                    norm_weight=norm_weight,
                    eps=eps,
                    router_weight=router_weight,
                    top_k=top_k,
                    renormalize=renormalize,
                )
            self.bind(key, router_weight, call)
        return call(hidden_states, residual)

    def route_many(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        norm_weight: torch.Tensor,
        eps: float,
        router_weight: torch.Tensor,
        top_k: int,
        renormalize: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, Routing | RouterLogits]:
        """`route` for any number of tokens, with a softmax and top-k kernel of its own."""
        num_tokens, num_experts = hidden_states.shape[0], router_weight.shape[0]
        if num_tokens == 0 or not takes(hidden_states, residual):
            return super().route(hidden_states, residual, norm_weight, eps, router_weight, top_k, renormalize)
        normed, residual = self.add_norm(hidden_states, residual, norm_weight, eps)
        logits = F.linear(normed, router_weight)
        topk_weights = logits.new_empty(num_tokens, top_k, dtype=torch.float32)
        topk_ids = logits.new_empty(num_tokens, top_k, dtype=torch.int64)
        kernel = self.elementwise_kernel(
            topk_softmax_kernel,
            logits.dtype,
            warps=1,  # top-k is a chain of max reductions, each of which would need syncs between warps
            E=num_experts,
            BLOCK_E=triton.next_power_of_2(num_experts),
            TOP_K=top_k,
            RENORMALIZE=renormalize,
        )
        kernel.grid = (num_tokens, 1, 1)
        kernel(logits, topk_weights, topk_ids)
        return normed, residual, Routing(topk_weights, topk_ids)

    def experts(
        self, hidden_states: torch.Tensor, routing: Routing | RouterLogits | GroupedRows, gate_up: Weight, down: Weight
    ) -> torch.Tensor:
        num_tokens = hidden_states.shape[0]
        if isinstance(gate_up, CudaInt4Weight) and isinstance(down, CudaInt4Weight):
            return self.experts_int4(hidden_states, routing, gate_up, down)
        if not isinstance(gate_up, DenseWeight) or not isinstance(down, DenseWeight):
            return super().experts(hidden_states, routing, gate_up, down)
        if not isinstance(routing, RouterLogits) or not 0 < num_tokens <= MAX_TOKENS:
            return self.experts_sorted(hidden_states, routing, gate_up, down)
        key = ("experts", id(gate_up), num_tokens)
        call = self.calls.get(key)
        if call is None:
            if takes(hidden_states) and experts_support(hidden_states, routing, gate_up.data, down.data):
                kind = ExpertsCall if num_tokens == 1 else BatchedExpertsCall
                call = kind(hidden_states, routing, gate_up.data, down.data, self.pdl)
            else:
                call = partial(self.experts_sorted, gate_up=gate_up, down=down)
            self.bind(key, gate_up, call)
        return call(hidden_states, routing)

    def experts_sorted(
        self,
        hidden_states: torch.Tensor,
        routing: Routing | RouterLogits | GroupedRows,
        gate_up: DenseWeight,
        down: DenseWeight,
    ) -> torch.Tensor:
        """`experts` for any number of tokens: sort by expert, then grouped GEMMs."""
        if not isinstance(routing, GroupedRows):
            routing = routing.chosen().local(gate_up.data.shape[0])
        if hidden_states.shape[0] == 0 or not takes(hidden_states):
            return super().experts(hidden_states, routing, gate_up, down)
        top_k = None if isinstance(routing, GroupedRows) else routing.topk_ids.shape[1]
        key = ("experts_of_sorted" if top_k is None else "experts_sorted", id(gate_up), top_k or 1)
        call = self.calls.get(key)
        if call is None:
            call = self.sorted_experts_call(hidden_states, gate_up, down, top_k)
            self.bind(key, gate_up, call)
        return call(hidden_states, routing)

    def sorted_experts_call(
        self, hidden_states: torch.Tensor, gate_up: DenseWeight, down: DenseWeight, top_k: int | None
    ) -> Callable[..., Any]:
        """Returns the bound call of `experts_sorted` for these weights; top_k None: rows already in expert order."""
        if not grouped_experts_support(hidden_states, gate_up.data, down.data):
            return partial(super().experts, gate_up=gate_up, down=down)
        num_experts = gate_up.data.shape[0]
        order = self.orders.setdefault(num_experts, ExpertOrder(num_experts, GROUPED_ROWS))
        if top_k is None:
            return SortedExpertsCall(order, gate_up.data, down.data)
        return GroupedExpertsCall(order, gate_up.data, down.data, top_k)

    def bind(self, key: tuple[str, int, int], weight: Any, call: Callable[..., Any]) -> None:
        self.calls[key] = call
        self.weights.append(weight)

    def elementwise_kernel(self, kernel: Any, dtype: torch.dtype, warps: int = 4, **constants: Any) -> BoundKernel:
        """Returns a bound elementwise kernel, cached; the caller sets the grid."""
        key = (kernel, dtype, *constants.values())
        if key not in self.elementwise:
            self.elementwise[key] = BoundKernel(kernel, (1,), warps, constants.get("PDL", False), **constants)
        return self.elementwise[key]


def takes(hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> bool:
    """Returns whether the kernels support the dtype and layout of these activations."""
    right_type = hidden_states.dtype in DTYPES and (residual is None or residual.dtype is torch.float32)
    return right_type and fits(hidden_states, residual)
