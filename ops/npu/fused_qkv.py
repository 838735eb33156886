# SPDX-License-Identifier: Apache-2.0
"""All between the merged q, k, v and attention in one launch: RMSNorm of q and k, rotary embedding, cache write.

Shape letters as in ops/__init__.py. The vendor's operation writes caches of the tiled layout [L, G * C / 16, S, 16],
which few versions of fused attention read: whether this one does is found with numbers, as a wrong reading is no error.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ops import Ops, StepMetadata
from ops.npu.calls import npu
from ops.reference import ReferenceOps
from ops.step import BLOCK_SIZE, Span, step_inputs

TILE = 16  # columns of a tile of 16-bit numbers
HEADS, KV_HEADS, EPS = 4, 2, 1e-6  # of the probe
TOLERANCE = 0.05  # relative, for rounding to bfloat16


@dataclass(frozen=True)
class FusedQkv:
    """A variant. `prepare` maps qkv [T, (H + 2G) * C], the norm weights, eps, cos and sin [T, C], both caches and slots
    [T] to the query [T, H, C], and writes the caches, which are tiled if `tiled`."""

    prepare: Callable[..., Tensor]
    tiled: bool


def prepare_by_vendor(
    qkv: Tensor,
    q_norm_weight: Tensor,
    k_norm_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    head_dim = q_norm_weight.shape[0]
    num_tokens, width = qkv.shape
    all_heads, num_kv_heads = width // head_dim, key_cache.shape[1] * TILE // head_dim
    num_heads = all_heads - 2 * num_kv_heads
    query = qkv.new_empty(num_tokens, num_heads * head_dim)
    npu.npu_qkv_rms_norm_rope_cache(
        qkv,
        q_norm_weight,
        k_norm_weight,
        cos,
        sin,
        slots,
        query,
        key_cache,
        value_cache,
        qkv_size=[1, num_tokens, all_heads, head_dim],  # one batch: each takes a block at least
        head_nums=[num_heads, num_kv_heads, num_kv_heads],
        epsilon=eps,
        cache_mode="PA_NZ",
    )
    return query.view(num_tokens, num_heads, head_dim)


def prepare_by_triton(qkv: Tensor, *arguments: float | Tensor) -> Tensor:
    return triton_kernel()(qkv, *arguments)


@cache
def triton_kernel() -> Callable[..., Tensor]:
    """The function of ops/npu/kernels/qkv.py, which imports Triton; RuntimeError where that has no Ascend backend."""
    triton = importlib.util.find_spec("triton")
    folders = triton.submodule_search_locations if triton is not None else None
    if not any((Path(folder) / "backends" / "ascend").is_dir() for folder in folders or ()):
        raise RuntimeError("no Triton with an Ascend backend is installed")
    from ops.npu.kernels.qkv import prepare_query

    return prepare_query


QKV = {  # None: a call for each part
    "npu_qkv_rms_norm_rope_cache": FusedQkv(prepare_by_vendor, tiled=True),
    "Triton": FusedQkv(prepare_by_triton, tiled=False),
    "npu_rms_norm": None,
}


def tiled_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
    return num_blocks, num_kv_heads * head_dim // TILE, block_size, TILE


def tile(cache: Tensor) -> Tensor:
    """Copies a cache [L, S, G, C] to the tiled layout [L, G * C / 16, S, 16]."""
    return cache.flatten(2).unflatten(2, (-1, TILE)).transpose(1, 2).contiguous()


def untile(cache: Tensor, head_dim: int) -> Tensor:
    """Inverse of `tile`."""
    return cache.transpose(1, 2).flatten(2).unflatten(2, (-1, head_dim)).contiguous()


def probe(ops: Ops, head_dim: int, device: str) -> None:
    """Runs attention on a prompt over a block's border and another, then one decode step of both.

    RuntimeError where the output is not that of the reference in float32. On meta tensors only the calls are checked.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (4, BLOCK_SIZE, KV_HEADS, head_dim)
    width = (HEADS + 2 * KV_HEADS) * head_dim
    norms = [1 + torch.randn(head_dim, generator=generator) / 8 for _ in range(2)]
    expected_caches = [torch.zeros(shape) for _ in range(2)]
    caches = [torch.zeros(ops.cache_shape(*shape), dtype=torch.bfloat16, device=device) for _ in range(2)]
    for spans in steps():
        _, step = step_inputs(spans, [[]] * len(spans), "cpu")
        _, on_device = step_inputs(spans, [[]] * len(spans), device)
        qkv = torch.randn(step.num_tokens, width, generator=generator)
        actual = run(ops, qkv, norms, caches, on_device, torch.bfloat16)
        if device == "meta":
            continue
        expected = run(ReferenceOps(), qkv, norms, expected_caches, step, torch.float32)
        error = (actual.cpu().float() - expected).norm() / expected.norm()
        if not error < TOLERANCE:
            raise RuntimeError(f"attention differs from the reference by {error:.2f}")


def steps() -> Iterator[list[Span]]:
    yield [Span(0, BLOCK_SIZE + 3, [3, 1], BLOCK_SIZE + 3), Span(0, 5, [2], 5)]
    yield [Span(BLOCK_SIZE + 3, 1, [3, 1], BLOCK_SIZE + 3), Span(5, 1, [2], 5)]


def run(
    ops: Ops, qkv: Tensor, norms: list[Tensor], caches: list[Tensor], step: StepMetadata, dtype: torch.dtype
) -> Tensor:
    """Output of attention [T, H * C] on the device of the caches."""
    device, head_dim = caches[0].device, norms[0].shape[0]
    angles = step.positions[:, None] * 10 ** -torch.linspace(0, 4, head_dim // 2, device=device).repeat(2)
    cos_sin, step = ops.prepare_attention((angles.cos(), angles.sin()), step, dtype)
    qkv, q_norm, k_norm = (part.to(device, dtype) for part in (qkv, *norms))
    key_cache, value_cache = caches
    return ops.attention(qkv, q_norm, k_norm, EPS, cos_sin, key_cache, value_cache, step)
