# SPDX-License-Identifier: Apache-2.0
"""Comparisons of all operations except the experts: embedding, norms, linear layers, attention, routing."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from executor.doctor.findings import EPS, ROUNDED_OFTEN, ROUNDED_ONCE, TOKENS, Context, Finding
from executor.doctor.inputs import Pair
from ops import DenseWeight, Ops, StepMetadata, Weight
from ops.npu.fused_qkv import tile, untile
from ops.npu.variants import CACHE_WRITE
from ops.step import BLOCK_SIZE, Span, step_inputs

MANY_TOKENS = 2000  # gating may use another kernel from 1024 tokens on
DECODE_LENS = [2, 128, 129, 700, 1500]
ATTENTION_CASES = {  # cached and new tokens of each sequence
    "prefill": ([0, 0, 0], [300, 1, 128]),
    "extend": ([128, 699, 0, 33, 1500], [200, 1, 70, 3, 400]),  # chunks of prompts, beside a decode token and a prompt
    "decode": ([length - 1 for length in DECODE_LENS], [1] * len(DECODE_LENS)),
    "decode of one": ([200], [1]),
}


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
    for case, (cached, new) in ATTENTION_CASES.items():
        yield compare_attention(context, variant, case, context.inputs.step(cached, new))


def shared_blocks(context: Context, variant: str) -> Finding:
    """Compares attention of sequences that share the blocks of a prefix, so that together they have more blocks than
    the cache, which the vendor's page forbids."""
    spans = [Span(2 * BLOCK_SIZE + 5, 2, [1, 2, own], 2 * BLOCK_SIZE + 5) for own in (3, 4, 5)]
    _, step = step_inputs(spans, [[]] * len(spans), "cpu")
    return compare_attention(context, f"{variant}, shared blocks", "extend", step, relied_on=False)


def compare_attention(context: Context, variant: str, case: str, step: StepMetadata, relied_on: bool = True) -> Finding:
    tensors = attention_tensors(context, step)

    def run() -> Pair:
        moved = [context.inputs.to_device(tensor) for tensor in tensors]
        actual = attend(context, context.ops, *context.inputs.on_device(step), moved)
        return actual, attend(context, context.reference, context.inputs.cos_sin(step), step, tensors)

    case = f"{case}, {len(step.seq_lens_list)} sequences"
    return context.compare("attention", variant, case, run, ROUNDED_OFTEN, relied_on)


def attention_tensors(context: Context, step: StepMetadata) -> list[torch.Tensor]:
    """qkv, q and k norm weights, and KV caches of the step's blocks filled with random values."""
    random, shapes = context.inputs.random, context.shapes
    cache = (1 + int(step.block_table.max()), BLOCK_SIZE, shapes.num_kv_heads, shapes.head_dim)
    norms = [context.inputs.norm_weight(shapes.head_dim) for _ in range(2)]
    return [random(step.num_tokens, shapes.qkv_width), *norms, random(*cache), random(*cache)]


def attend(context: Context, ops: Ops, cos_sin: Pair, step: StepMetadata, tensors: list[torch.Tensor]) -> torch.Tensor:
    """Runs attention; returns its output and the updated caches as rows [*, head_dim]."""
    qkv, q_norm, k_norm, *caches = tensors
    tiled = ops.cache_shape(*caches[0].shape) != caches[0].shape
    if tiled:
        caches = [tile(cache) for cache in caches]
    key_cache, value_cache = caches
    cos_sin, step = ops.prepare_attention(cos_sin, step, qkv.dtype)
    output = ops.attention(qkv, q_norm, k_norm, EPS, cos_sin, key_cache, value_cache, step)
    if tiled:
        caches = [untile(cache, context.shapes.head_dim) for cache in caches]
    return torch.cat([part.reshape(-1, context.shapes.head_dim) for part in (output, *caches)])


def graph(context: Context, variant: str) -> Iterator[Finding]:
    """Compares decode attention in graph mode, captured with seq_lens 1 and replayed with the true ones, with eager."""
    step = context.inputs.step(*ATTENTION_CASES["decode"])
    tensors = attention_tensors(context, step)

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
