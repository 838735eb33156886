# SPDX-License-Identifier: Apache-2.0
"""Comparisons of what stands around the experts: embedding, norms, products, attention, routing."""

import dataclasses
from collections.abc import Iterator

import torch

from executor.doctor.findings import EPS, ROUNDED_OFTEN, ROUNDED_ONCE, TOKENS, Context, Finding
from executor.doctor.inputs import Pair
from executor.kv_cache import BLOCK_SIZE, blocks_for
from ops import DenseWeight, Ops, StepMetadata
from ops.npu.variants import CACHE_WRITE

MANY_TOKENS = 2000  # gating kernels may change at 1024
PREFILL_LENS, DECODE_LENS = [300, 1, 128], [1, 128, 129, 700, 1500]


def elementwise(context: Context) -> Iterator[Finding]:
    """Embedding, activation, norms."""
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

            def run(operation=operation, arguments=arguments) -> Pair:
                moved = [to_device(value) if torch.is_tensor(value) else value for value in arguments]
                actual, expected = (
                    getattr(ops, operation)(*given)
                    for ops, given in ((context.ops, moved), (context.reference, arguments))
                )
                return (torch.cat(actual), torch.cat(expected)) if operation == "add_norm" else (actual, expected)

            yield context.compare(operation, variant, f"{tokens} tokens", run, ROUNDED_ONCE)


def linear(context: Context) -> Iterator[Finding]:
    """The products of a layer and the head's."""
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

            def run(hidden=hidden, right=right, weight=weight) -> Pair:
                actual = context.ops.linear(context.inputs.to_device(hidden), weight)
                return actual, context.reference.linear(hidden, right)

            yield context.compare("linear", variant, f"{name}, {tokens} tokens", run, ROUNDED_ONCE)


def attention(context: Context, variant: str) -> Iterator[Finding]:
    """The output, and what the cache holds afterwards."""
    for case, lens in (("prefill", PREFILL_LENS), ("decode", DECODE_LENS), ("decode", [1])):
        step, tensors = context.inputs.step(lens, case == "prefill"), attention_tensors(context, lens, sum(lens))
        if case == "decode":
            tensors[0] = tensors[0][: len(lens)]

        def run(step=step, tensors=tensors) -> Pair:
            moved = [context.inputs.to_device(tensor) for tensor in tensors]
            actual = attend(context, context.ops, *context.inputs.on_device(step), moved)
            return actual, attend(context, context.reference, context.inputs.cos_sin(step), step, tensors)

        yield context.compare("attention", variant, f"{case}, {len(lens)} sequences", run, ROUNDED_OFTEN)


def attention_tensors(context: Context, lens: list[int], tokens: int) -> list[torch.Tensor]:
    """qkv, the norms' weights, the caches as if every slot had been written."""
    random, shapes = context.inputs.random, context.shapes
    num_blocks = 1 + sum(map(blocks_for, lens))
    cache = (num_blocks, BLOCK_SIZE, shapes.num_kv_heads, shapes.head_dim)
    norms = [context.inputs.norm_weight(shapes.head_dim) for _ in range(2)]
    return [random(tokens, shapes.qkv_width), *norms, random(*cache), random(*cache)]


def attend(context: Context, ops: Ops, cos_sin: Pair, step: StepMetadata, tensors: list[torch.Tensor]) -> torch.Tensor:
    """Output and caches, which are written in place, as rows of a head each."""
    qkv, q_norm, k_norm, *caches = tensors
    cos_sin, step = ops.prepare_attention(cos_sin, step, qkv.dtype)
    output = ops.attention(qkv, q_norm, k_norm, EPS, cos_sin, *caches, step)
    return torch.cat([part.reshape(-1, context.shapes.head_dim) for part in (output, *caches)])


def graph(context: Context, variant: str) -> Iterator[Finding]:
    """A decode step's attention recorded with lengths of 1 and replayed with others, against the same launched."""
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


def slot_to_skip(context: Context) -> Finding:
    """Whether a slot of -1 is skipped, which would suit padding rows; they write to a block of nobody's instead.

    The caches are parts of larger ones, in which a write before their first slot is seen.
    """
    shapes = context.shapes
    cache, token = (3, BLOCK_SIZE, shapes.num_kv_heads, shapes.head_dim), (2, shapes.num_kv_heads, shapes.head_dim)
    tensors = [context.inputs.random(*size) for size in (token, token, cache, cache)]

    def run() -> Pair:
        keys, values, *caches = (context.inputs.to_device(tensor) for tensor in tensors)
        slots = torch.tensor([-1, 5], device=keys.device)
        CACHE_WRITE["npu_scatter_pa_kv_cache"](keys, values, *(cache[1:] for cache in caches), slots)
        for new, cache in zip(tensors[:2], tensors[2:], strict=True):
            cache[1:].flatten(0, 1)[5] = new[1]
        return torch.stack(caches), torch.stack(tensors[2:])

    variant = "npu_scatter_pa_kv_cache, slot -1"
    return context.compare("attention", variant, "2 tokens", run, 0.0, relied_on=False)


def route(context: Context, variant: str) -> Iterator[Finding]:
    """The weights against those of the best experts, and against those that the chosen ids should have.

    The ids themselves may differ where two experts are equal but for rounding.
    """
    random, to_device, shapes = context.inputs.random, context.inputs.to_device, context.shapes
    norm = context.inputs.norm_weight(shapes.hidden_size)
    router = random(shapes.num_experts, shapes.hidden_size, std=shapes.hidden_size**-0.5)
    for tokens in (*TOKENS, MANY_TOKENS):
        hidden, residual = random(tokens, shapes.hidden_size), random(tokens, shapes.hidden_size)

        def run(hidden=hidden, residual=residual) -> Pair:
            moved = [to_device(value) for value in (hidden, residual, norm)]
            routing = context.ops.route(*moved, EPS, to_device(router), shapes.top_k, True)[2].chosen()
            weights, ids = routing.topk_weights.cpu().float(), routing.topk_ids.cpu().long()
            normed = context.reference.add_norm(hidden, residual, norm, EPS)[0]
            shares = (normed @ router.t()).softmax(dim=-1)
            right = torch.cat([shares.gather(1, ids), shares.topk(shapes.top_k).values])
            actual = torch.cat([weights, weights.sort(descending=True).values])
            return actual, right / right.sum(dim=-1, keepdim=True)

        yield context.compare("route", variant, f"{tokens} tokens", run, ROUNDED_OFTEN)
