# SPDX-License-Identifier: Apache-2.0
"""Comparisons of all operations except the experts: embedding, norms, linear layers, attention, routing."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from executor.doctor.findings import EPS, ROUNDED_OFTEN, ROUNDED_ONCE, TOKENS, Context, Finding
from executor.doctor.inputs import Pair
from executor.engine.kv_cache import BLOCK_SIZE, blocks_for
from ops import DenseWeight, Ops, StepMetadata, Weight
from ops.npu.variants import CACHE_WRITE

MANY_TOKENS = 2000  # gating may use another kernel from 1024 tokens on
PREFILL_LENS, DECODE_LENS = [300, 1, 128], [1, 128, 129, 700, 1500]


def elementwise(context: Context) -> Iterator[Finding]:
    """Compares embedding, activation and norms."""
    random, to_device, shapes = context.inputs.random, context.inputs.to_device, context.shapes
    table, norm = random(1000, shapes.hidden_size), context.inputs.norm_weight(shapes.hidden_size)
    for tokens in TOKENS:
        hidden, residual = random(tokens, shapes.hidden_size), random(tokens, shapes.hidden_size)
        for operation, variant, arguments in (
            ("embedding", "embedding", (torch.arange(tokens), table)),
            ("silu_and_mul", "npu_swiglu", (random(tokens, 2 * shapes.width),)),
            ("add_norm", "npu_rms_norm", (hidden, None, norm, EPS)),
            ("add_norm", "npu_add_rms_norm", (hidden, residual, norm, EPS)),
        ):

            def run(operation: str = operation, arguments: tuple[Any, ...] = arguments) -> Pair:
                moved = [to_device(value) if torch.is_tensor(value) else value for value in arguments]
                actual, expected = (
                    getattr(ops, operation)(*given)
                    for ops, given in ((context.ops, moved), (context.reference, arguments))
                )
                return (torch.cat(actual), torch.cat(expected)) if operation == "add_norm" else (actual, expected)

            yield context.compare(operation, variant, f"{tokens} tokens", run, ROUNDED_ONCE)


def linear(context: Context) -> Iterator[Finding]:
    """Compares qkv_proj, o_proj and lm_head."""
    shapes = context.shapes
    heads = shapes.num_heads * shapes.head_dim
    for name, size in (
        ("qkv", (shapes.qkv_width, shapes.hidden_size)),
        ("o", (shapes.hidden_size, heads)),
        ("head", (shapes.vocab_size, shapes.hidden_size)),
    ):
        right, weight = context.inputs.weight(context.ops, *size)
        variant = "mm, plain weight" if isinstance(weight, DenseWeight) else "mm, FRACTAL_NZ weight"
        for tokens in TOKENS:
            hidden = context.inputs.random(tokens, size[1])

            def run(hidden: torch.Tensor = hidden, right: Weight = right, weight: Weight = weight) -> Pair:
                actual = context.ops.linear(context.inputs.to_device(hidden), weight)
                return actual, context.reference.linear(hidden, right)

            yield context.compare("linear", variant, f"{name}, {tokens} tokens", run, ROUNDED_ONCE)


def attention(context: Context, variant: str) -> Iterator[Finding]:
    """Compares the attention output and the KV cache after the step."""
    for case, lens in (("prefill", PREFILL_LENS), ("decode", DECODE_LENS), ("decode", [1])):
        step, tensors = context.inputs.step(lens, case == "prefill"), attention_tensors(context, lens, sum(lens))
        if case == "decode":
            tensors[0] = tensors[0][: len(lens)]

        def run(step: StepMetadata = step, tensors: list[torch.Tensor] = tensors) -> Pair:
            moved = [context.inputs.to_device(tensor) for tensor in tensors]
            actual = attend(context, context.ops, *context.inputs.on_device(step), moved)
            return actual, attend(context, context.reference, context.inputs.cos_sin(step), step, tensors)

        yield context.compare("attention", variant, f"{case}, {len(lens)} sequences", run, ROUNDED_OFTEN)


def attention_tensors(context: Context, lens: list[int], tokens: int) -> list[torch.Tensor]:
    """qkv, q and k norm weights, and KV caches filled with random values."""
    random, shapes = context.inputs.random, context.shapes
    num_blocks = 1 + sum(map(blocks_for, lens))
    cache = (num_blocks, BLOCK_SIZE, shapes.num_kv_heads, shapes.head_dim)
    norms = [context.inputs.norm_weight(shapes.head_dim) for _ in range(2)]
    return [random(tokens, shapes.qkv_width), *norms, random(*cache), random(*cache)]


def attend(context: Context, ops: Ops, cos_sin: Pair, step: StepMetadata, tensors: list[torch.Tensor]) -> torch.Tensor:
    """Runs attention; returns its output and the updated caches as rows [*, head_dim]."""
    qkv, q_norm, k_norm, key_cache, value_cache = tensors
    cos_sin, step = ops.prepare_attention(cos_sin, step, qkv.dtype)
    output = ops.attention(qkv, q_norm, k_norm, EPS, cos_sin, key_cache, value_cache, step)
    return torch.cat([part.reshape(-1, context.shapes.head_dim) for part in (output, key_cache, value_cache)])


def graph(context: Context, variant: str) -> Iterator[Finding]:
    """Compares decode attention in graph mode, captured with seq_lens 1 and replayed with the true ones, with eager."""
    step = context.inputs.step(DECODE_LENS, is_prefill=False)
    tensors = attention_tensors(context, DECODE_LENS, len(DECODE_LENS))

    def run() -> Pair:
        launched, recorded = ([context.inputs.to_device(tensor) for tensor in tensors] for _ in range(2))
        cos_sin, moved = context.inputs.on_device(step)
        expected = attend(context, context.ops, cos_sin, moved, launched).cpu().float()
        before = dataclasses.replace(moved, seq_lens_list=[1] * len(DECODE_LENS))
        recorder = context.ops.graph_recorder()
        actual, replay = recorder.record(lambda: attend(context, context.ops, cos_sin, before, recorded))
        replay(DECODE_LENS)
        return actual, expected

    case = f"decode, {len(DECODE_LENS)} sequences"
    yield context.compare("attention", f"{variant}, graph", case, run, ROUNDED_ONCE)


def skipped_slot(context: Context) -> Finding:
    """Compares a cache write with slot -1 to one that skips it. Padding rows use a reserved padding block instead.

    The caches are slices of larger ones, which makes a write before their first slot visible.
    """
    shapes = context.shapes
    cache, token = (3, BLOCK_SIZE, shapes.num_kv_heads, shapes.head_dim), (2, shapes.num_kv_heads, shapes.head_dim)
    tensors = [context.inputs.random(*size) for size in (token, token, cache, cache)]

    def run() -> Pair:
        keys, values, *caches = (context.inputs.to_device(tensor) for tensor in tensors)
        slots = torch.tensor([-1, 5], device=keys.device)
        CACHE_WRITE["npu_scatter_pa_kv_cache"](keys, values, caches[0][1:], caches[1][1:], slots)
        for new, cache in zip(tensors[:2], tensors[2:], strict=True):
            cache[1:].flatten(0, 1)[5] = new[1]
        return torch.stack(caches), torch.stack(tensors[2:])

    variant = "npu_scatter_pa_kv_cache, slot -1"
    return context.compare("attention", variant, "2 tokens", run, 0.0, relied_on=False)


def route(context: Context, variant: str) -> Iterator[Finding]:
    """Compares the top-k weights, and the weight of each selected id.

    The ids themselves may differ where two experts tie within rounding.
    """
    random, to_device, shapes = context.inputs.random, context.inputs.to_device, context.shapes
    norm = context.inputs.norm_weight(shapes.hidden_size)
    router = random(shapes.num_experts, shapes.hidden_size, std=shapes.hidden_size**-0.5)
    for tokens in (*TOKENS, MANY_TOKENS):
        hidden, residual = random(tokens, shapes.hidden_size), random(tokens, shapes.hidden_size)

        def run(hidden: torch.Tensor = hidden, residual: torch.Tensor = residual) -> Pair:
            given = (to_device(hidden), to_device(residual), to_device(norm), EPS, to_device(router))
            routing = context.ops.route(*given, top_k=shapes.top_k, renormalize=True)[2].chosen()
            weights, ids = routing.topk_weights.cpu().float(), routing.topk_ids.cpu().long()
            normed = context.reference.add_norm(hidden, residual, norm, EPS)[0]
            shares = (normed @ router.t()).softmax(dim=-1)
            right = torch.cat([shares.gather(1, ids), shares.topk(shapes.top_k).values])
            actual = torch.cat([weights, weights.sort(descending=True).values])
            return actual, right / right.sum(dim=-1, keepdim=True)

        yield context.compare("route", variant, f"{tokens} tokens", run, ROUNDED_OFTEN)
