# SPDX-License-Identifier: Apache-2.0
"""Operations of the CUDA backend on 4-bit weights: kernels in decode steps, dequantised in memory for larger ones."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from ops import GroupedRows, RouterLogits, Routing
from ops.cuda.int4_calls import (
    CudaInt4Weight,
    Int4BatchedExpertsCall,
    Int4ExpertsCall,
    Int4LinearCall,
    Int4NormLinearCall,
    Int4NormThenLinearCall,
    dequantized,
    int4_takes,
    reordered,
    why_not,
)
from ops.cuda.tiles import MAX_TOKENS
from ops.reference import ReferenceOps
from ops.weight import DenseWeight, Int4Weight, Weight

DTYPES = (torch.bfloat16, torch.float16)


class Int4Ops(ReferenceOps):
    """Operations on CudaInt4Weight; bound calls are kept by the backend, by operation, weight and number of tokens."""

    pdl: bool
    unsupported_int4: dict[str, None]  # reasons for which weights were left to the reference
    calls: dict[tuple[str, int, int], Callable[..., Any]]
    bind: Callable[[tuple[str, int, int], Any, Callable[..., Any]], None]

    def prepare_weight(self, weight: Weight, dtype: torch.dtype) -> Weight:
        """Repacks 4-bit weights whose groups the kernels support."""
        if isinstance(weight, Int4Weight) and dtype in DTYPES:
            reason = why_not(weight)
            if reason is None:
                return reordered(weight)
            self.unsupported_int4[reason] = None
            return weight
        return super().prepare_weight(weight, dtype)

    def linear_int4(
        self, hidden_states: torch.Tensor, weight: CudaInt4Weight, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if hidden_states.shape[0] == 0:
            return hidden_states.new_empty(0, weight.shape[0])
        if hidden_states.shape[0] > MAX_TOKENS or not int4_takes(hidden_states):
            return F.linear(hidden_states, dequantized(weight, hidden_states.dtype), bias)
        key = ("linear", id(weight), hidden_states.shape[0])
        call = self.calls.get(key)
        if call is None:
            call = Int4LinearCall(hidden_states, weight, bias, self.pdl)
            self.bind(key, weight, call)
        return call(hidden_states)

    def norm_linear_int4(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        norm_weight: torch.Tensor,
        eps: float,
        weight: CudaInt4Weight,
        bias: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens = hidden_states.shape[0]
        if not 0 < num_tokens <= MAX_TOKENS or not int4_takes(hidden_states, residual):
            return super().norm_linear(hidden_states, residual, norm_weight, eps, weight, bias)
        key = ("norm_linear" if residual is None else "add_norm_linear", id(weight), num_tokens)
        call = self.calls.get(key)
        if call is None:
            kind = Int4NormLinearCall if num_tokens == 1 else Int4NormThenLinearCall
            call = kind(hidden_states, weight, bias, self.pdl, (norm_weight, eps), residual is not None)
            self.bind(key, weight, call)
        return call(hidden_states, residual)

    def experts_int4(
        self,
        hidden_states: torch.Tensor,
        routing: Routing | RouterLogits | GroupedRows,
        gate_up: CudaInt4Weight,
        down: CudaInt4Weight,
    ) -> torch.Tensor:
        num_tokens = hidden_states.shape[0]
        if num_tokens == 0:
            return hidden_states.new_empty(0, down.shape[1])
        is_decode = isinstance(routing, RouterLogits) and routing.logits.dtype is torch.float32
        if not is_decode or num_tokens > MAX_TOKENS or not int4_takes(hidden_states):
            dense = [DenseWeight(dequantized(weight, hidden_states.dtype)) for weight in (gate_up, down)]
            return ReferenceOps.experts(self, hidden_states, routing, *dense)
        assert isinstance(routing, RouterLogits)
        key = ("experts", id(gate_up), num_tokens)
        call = self.calls.get(key)
        if call is None:
            kind = Int4ExpertsCall if num_tokens == 1 else Int4BatchedExpertsCall
            call = kind(hidden_states, routing, gate_up, down, self.pdl)
            self.bind(key, gate_up, call)
        return call(hidden_states, routing)
