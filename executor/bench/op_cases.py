# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases of every operation at a model's shapes, with bytes moved and FLOPs.

Shapes are those of one rank under tensor parallelism; experts are not sharded. Shape letters as in ops/__init__.py.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import Qwen3MoeConfig

from executor.config import ParallelSettings
from models.layers.padding import share_of
from models.quantization.rounding import rounding_of
from models.quantization.scheme import Scheme
from ops import DenseWeight, Ops, RouterLogits, Routing, StepMetadata, Weight
from ops.step import BLOCK_SIZE, Span, blocks_for, step_inputs

COLD_BYTES = {"cpu": 2**26, "cuda": 2**28, "npu": 2**29}  # larger than the last-level cache
LAYER = "model.layers.0"
MAX_SETS = {"cpu": 4, "cuda": 512, "npu": 512}


@dataclass(frozen=True, kw_only=True)
class OpCase:
    """One operation at one size. Its calls use different weights, which together exceed the cache."""

    name: str
    calls: Sequence[Callable[[], object]]
    moved_bytes: int  # read and written by one call
    flops: int  # of one call
    distinct_bytes: int | None = None  # moved by all calls together; None: no two calls share any

    def is_cold(self, device_type: str) -> bool:
        """Returns whether the calls together move more than the cache holds, so that reads come from memory."""
        distinct_bytes = len(self.calls) * self.moved_bytes if self.distinct_bytes is None else self.distinct_bytes
        return distinct_bytes >= COLD_BYTES[device_type]


class OpCases:
    """Builds the cases of a step of `sequences` sequences with `new_tokens` each after `cached_tokens` in the cache.

    One new token each is a decode step; without cached tokens it is a prefill.
    """

    def __init__(
        self,
        ops: Ops,
        config: Qwen3MoeConfig,
        parallel: ParallelSettings,
        dtype: torch.dtype,
        device: torch.device,
        sequences: int,
        new_tokens: int,
        cached_tokens: int,
        scheme: Scheme,
    ):
        self.scheme = scheme  # number formats of the weights
        self.ops = ops
        self.config = config
        self.parallel = parallel
        self.dtype = dtype
        self.device = device
        self.sequences = sequences
        self.new_tokens = new_tokens
        self.cached_tokens = cached_tokens
        self.tokens = sequences * new_tokens
        self.hidden = config.hidden_size
        self.q_size = config.num_attention_heads // parallel.attn_tp_size * config.head_dim
        self.kv_heads = max(1, config.num_key_value_heads // parallel.attn_tp_size)
        self.norm_weight = torch.ones(self.hidden, dtype=dtype, device=device)
        residual = self.ops.add_norm(self.activations(self.hidden), None, self.norm_weight, config.rms_norm_eps)[1]
        self.residual_bytes = residual.nbytes
        self.row_bytes = self.tokens * dtype.itemsize  # bytes of [T, 1] activations

    def all(self) -> Iterator[OpCase]:
        """Yields the cases lazily, so that only one holds its weights at a time."""
        config = self.config
        qkv = self.q_size + 2 * self.kv_heads * config.head_dim
        yield self.embedding()
        yield self.add_norm()
        yield self.norm_linear("norm_linear (qkv)", f"{LAYER}.self_attn.q_proj", qkv)
        yield self.attention()
        yield self.linear()
        yield self.route()
        yield self.experts()
        yield self.silu_and_mul()
        if self.new_tokens == 1:  # other steps compute it for the last token of a sequence only
            vocab_size = config.vocab_size // self.parallel.lmhead_tp_size
            yield self.norm_linear("norm_linear (lm_head)", "lm_head", vocab_size)

    def sets(self, set_bytes: int) -> range:
        count = share_of(COLD_BYTES[self.device.type], set_bytes)
        return range(min(count, MAX_SETS[self.device.type]))

    def random(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(0, 0.02)

    def activations(self, width: int) -> torch.Tensor:
        return torch.randn(self.tokens, width, dtype=self.dtype, device=self.device)

    def weight(self, module: str, *shape: int) -> Weight:
        """A random weight in the number format of `module`, in the backend's layout."""
        round_weight, value = rounding_of(module, self.scheme), self.random(*shape)
        return self.ops.prepare_weight(DenseWeight(value) if round_weight is None else round_weight(value), self.dtype)

    def weights(self, module: str, *shape: int) -> list[Weight]:
        first = self.weight(module, *shape)
        return [first, *(self.weight(module, *shape) for _ in self.sets(first.nbytes)[1:])]

    def norm_inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
        """Inputs of add_norm: hidden_states, residual in the backend's dtype, norm weight, epsilon."""
        eps = self.config.rms_norm_eps
        residual = self.ops.add_norm(self.activations(self.hidden), None, self.norm_weight, eps)[1]
        return self.activations(self.hidden), residual, self.norm_weight, eps

    def norm_bytes(self) -> int:
        """Bytes of hidden_states read and residual read and written."""
        return self.row_bytes * self.hidden + 2 * self.residual_bytes

    def embedding(self) -> OpCase:
        """Embedding lookups in a random permutation of the table, which reuses its rows as rarely as possible."""
        vocab, row_bytes = self.config.vocab_size, self.hidden * self.dtype.itemsize
        table, order = self.random(vocab, self.hidden), torch.randperm(vocab, device=self.device)
        calls = []
        for number in self.sets(self.tokens * row_bytes):
            first = number * self.tokens
            token_ids = order[torch.arange(first, first + self.tokens, device=self.device) % vocab]
            calls.append(lambda token_ids=token_ids: self.ops.embedding(token_ids, table))
        return OpCase(
            name="embedding",
            calls=calls,
            moved_bytes=(min(self.tokens, vocab) + self.tokens) * row_bytes,
            flops=0,
            distinct_bytes=min(len(calls) * self.tokens, vocab) * row_bytes,
        )

    def add_norm(self) -> OpCase:
        moved_bytes = self.norm_bytes() + self.row_bytes * self.hidden
        inputs = [self.norm_inputs() for _ in self.sets(moved_bytes)]
        calls = [lambda one=one: self.ops.add_norm(*one) for one in inputs]
        return OpCase(name="add_norm", calls=calls, moved_bytes=moved_bytes, flops=0)

    def norm_linear(self, name: str, module: str, width: int) -> OpCase:
        inputs = self.norm_inputs()
        weights = self.weights(module, width, self.hidden)
        calls = [lambda weight=weight: self.ops.norm_linear(*inputs, weight) for weight in weights]
        moved_bytes = weights[0].nbytes + self.norm_bytes() + self.row_bytes * width
        return OpCase(name=name, calls=calls, moved_bytes=moved_bytes, flops=2 * self.tokens * width * self.hidden)

    def linear(self) -> OpCase:
        """Output projection of attention (o_proj)."""
        inputs = self.activations(self.q_size)
        weights = self.weights(f"{LAYER}.self_attn.o_proj", self.hidden, self.q_size)
        calls = [lambda weight=weight: self.ops.linear(inputs, weight) for weight in weights]
        moved_bytes = weights[0].nbytes + self.row_bytes * (self.q_size + self.hidden)
        flops = 2 * self.tokens * self.hidden * self.q_size
        return OpCase(name="linear (o_proj)", calls=calls, moved_bytes=moved_bytes, flops=flops)

    def attention(self) -> OpCase:
        head_dim, eps = self.config.head_dim, self.config.rms_norm_eps
        qkv_size = self.q_size + 2 * self.kv_heads * head_dim
        length = self.cached_tokens + self.new_tokens
        token_bytes = 2 * self.kv_heads * head_dim * self.dtype.itemsize  # of key and value
        angles = torch.randn(self.tokens, head_dim // 2, device=self.device).repeat(1, 2)
        cos_sin, step = self.ops.prepare_attention((angles.cos(), angles.sin()), self.step(), self.dtype)
        shape = (self.sequences * blocks_for(length) + 1, BLOCK_SIZE, self.kv_heads, head_dim)
        calls = []
        for _ in self.sets(self.sequences * length * token_bytes):
            q_norm, k_norm = (torch.ones(head_dim, dtype=self.dtype, device=self.device) for _ in range(2))
            caches = (self.random(*shape), self.random(*shape))
            arguments = (self.activations(qkv_size), q_norm, k_norm, eps, cos_sin, *caches, step)
            calls.append(lambda arguments=arguments: self.ops.attention(*arguments))
        moved_bytes = self.row_bytes * (qkv_size + self.q_size) + self.sequences * length * token_bytes
        attended = self.tokens * self.cached_tokens + self.sequences * self.new_tokens * (self.new_tokens + 1) // 2
        return OpCase(name="attention", calls=calls, moved_bytes=moved_bytes, flops=4 * self.q_size * attended)

    def step(self) -> StepMetadata:
        """StepMetadata of sequences with contiguous cache blocks."""
        length = self.cached_tokens + self.new_tokens
        spans = []
        for row in range(self.sequences):
            first = 1 + row * blocks_for(length)
            spans.append(
                Span(self.cached_tokens, self.new_tokens, list(range(first, first + blocks_for(length))), length)
            )
        return step_inputs(spans, [[]] * self.sequences, self.device, is_decode=self.new_tokens == 1)[1]

    def router(
        self, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor, Routing | RouterLogits]]:
        config = self.config
        weight = self.random(config.num_experts, self.hidden)
        return lambda: self.ops.route(*inputs, weight, config.num_experts_per_tok, config.norm_topk_prob)

    def route(self) -> OpCase:
        weight_bytes = self.config.num_experts * self.hidden * self.dtype.itemsize
        calls = [self.router(self.norm_inputs()) for _ in self.sets(weight_bytes)]
        moved_bytes = weight_bytes + self.norm_bytes() + self.row_bytes * self.hidden
        flops = 2 * self.tokens * self.hidden * self.config.num_experts
        return OpCase(name="route", calls=calls, moved_bytes=moved_bytes, flops=flops)

    def experts(self) -> OpCase:
        config = self.config
        width = config.moe_intermediate_size // self.parallel.moe_tp_size
        experts = config.num_experts

        def pair() -> tuple[Weight, Weight]:
            gate_up = self.weight(f"{LAYER}.mlp.experts.0.gate_proj", experts, 2 * width, self.hidden)
            return gate_up, self.weight(f"{LAYER}.mlp.experts.0.down_proj", experts, self.hidden, width)

        pairs = [pair()]
        expert_bytes = sum(weight.nbytes for weight in pairs[0]) / experts
        pairs += [pair() for _ in self.sets(round(config.num_experts_per_tok * expert_bytes))[1:]]
        calls, chosen = [], []
        for weights in pairs:
            normed, _, routing = self.router(self.norm_inputs())()
            chosen.append(routing.chosen().topk_ids.unique().numel())
            arguments = (normed.clone(), routing, *weights)
            calls.append(lambda arguments=arguments: self.ops.experts(*arguments))
        weight_bytes = sum(chosen) / len(chosen) * expert_bytes
        return OpCase(
            name=f"experts ({sum(chosen) / len(chosen):.1f} read)",
            calls=calls,
            moved_bytes=round(weight_bytes) + 2 * self.row_bytes * self.hidden,
            flops=2 * self.tokens * config.num_experts_per_tok * 3 * width * self.hidden,
        )

    def silu_and_mul(self) -> OpCase:
        """SwiGLU activation of a dense MLP."""
        width = share_of(self.config.intermediate_size, self.parallel.attn_tp_size)
        moved_bytes = 3 * self.row_bytes * width
        inputs = [self.activations(2 * width) for _ in self.sets(moved_bytes)]
        calls = [lambda gate_up=gate_up: self.ops.silu_and_mul(gate_up) for gate_up in inputs]
        return OpCase(name="silu_and_mul", calls=calls, moved_bytes=moved_bytes, flops=0)
