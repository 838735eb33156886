# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel for NPUs, in Triton's interpreter (on a GPU compiled for it), against the reference in float32."""

import importlib.util
import os
from types import ModuleType

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton", reason="the kernel needs triton")

from ops.reference import ReferenceOps  # noqa: E402
from ops.step import BLOCK_SIZE, Span, step_inputs  # noqa: E402
from tests.logits import relative_error  # noqa: E402
from tests.npu.schemas import BACKEND  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS, HEAD_DIM = 1e-3, 128


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    """The module without its package, which needs torch_npu."""
    spec = importlib.util.spec_from_file_location("qkv", BACKEND / "kernels/qkv.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)


@pytest.mark.parametrize("num_tokens", [1, 3, 50])  # one, few, more than a pass of the programs
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(32, 4), (2, 1), (12, 2), (1, 1)])
def test_queries_and_caches(kernels, num_heads, num_kv_heads, num_tokens):
    """The reference writes the same caches; its attention is replaced, so that it returns the query."""
    span = Span(BLOCK_SIZE - 2, num_tokens, [3, 1], prompt_len=1000)  # over the border of two blocks
    _, step = step_inputs([span], [[]], DEVICE)
    qkv = random(num_tokens, (num_heads + 2 * num_kv_heads) * HEAD_DIM)
    norms = random(HEAD_DIM), random(HEAD_DIM)
    angles = torch.rand(num_tokens, HEAD_DIM // 2, device=DEVICE).repeat(1, 2) * 6
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    before = random(4, BLOCK_SIZE, num_kv_heads, HEAD_DIM), random(4, BLOCK_SIZE, num_kv_heads, HEAD_DIM)
    caches, expected_caches = ([cache.clone() for cache in before] for _ in range(2))
    query = kernels.prepare_query(qkv, *norms, EPS, cos, sin, *caches, step.slot_mapping)

    reference = ReferenceOps()
    reference.extend_attention = lambda query, *_: query
    wide = (part.float() for part in (qkv, *norms))
    in_float = [cache.float() for cache in expected_caches]
    expected = reference.attention(*wide, EPS, (cos.float(), sin.float()), *in_float, step)
    assert query.shape == (num_tokens, num_heads, HEAD_DIM)
    assert relative_error(query.flatten(1).float(), expected) < 0.005
    for cache, right, was in zip(caches, in_float, before, strict=True):
        written = torch.zeros(4 * BLOCK_SIZE, dtype=torch.bool, device=DEVICE)
        written[step.slot_mapping] = True
        assert relative_error(cache.flatten(0, 1)[written].float(), right.flatten(0, 1)[written]) < 0.005
        assert torch.equal(cache.flatten(0, 1)[~written], was.flatten(0, 1)[~written])


def test_a_negative_slot_is_not_written(kernels):
    caches = [random(1, BLOCK_SIZE, 2, HEAD_DIM) for _ in range(2)]
    before = [cache.clone() for cache in caches]
    table = random(2, HEAD_DIM)
    slots = torch.tensor([-1, 5], device=DEVICE)
    kernels.prepare_query(random(2, 8 * HEAD_DIM), table[0], table[1], EPS, table, table, *caches, slots)
    for cache, was in zip(caches, before, strict=True):
        changed = (cache != was).flatten(0, 1).flatten(1).any(1)
        assert changed.nonzero().flatten().tolist() == [5]
