# SPDX-License-Identifier: Apache-2.0
"""Checks for every length that the splits computed by the decode attention kernels fit the launched grid."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
triton = pytest.importorskip("triton", reason="the kernels need triton")

import triton.language as tl  # noqa: E402

from ops.cuda.attention import DecodeAttentionCall, splitting  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 128
MAX_LENGTH = 1 << 17
LENGTHS_OF_PROGRAM = tl.constexpr(1024)


@triton.jit
def splitting_kernel(
    seq_lens,  # [L] int64
    found,  # [3, L] int64
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    MAX_ROUNDS: tl.constexpr,
):
    i = tl.program_id(0) * LENGTHS_OF_PROGRAM + tl.arange(0, LENGTHS_OF_PROGRAM)
    count = tl.num_programs(0) * LENGTHS_OF_PROGRAM
    num_cached, per_split, newest = splitting(seq_lens, i, BLOCK, SPLITS, MAX_SPLITS, MAX_ROUNDS)
    tl.store(found + i, num_cached)
    tl.store(found + count + i, per_split)
    tl.store(found + 2 * count + i, newest)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 8, 16, 17])
def test_every_length_has_its_splits_in_the_grid(batch_size):
    """For the narrowest block table that holds a sequence; a wider one launches at least as many programs.

    The splits cover all tokens, and no split is empty.
    """
    num_heads, num_kv_heads, head_dim = 8, 1, 32
    qkv = torch.empty(batch_size, (num_heads + 2 * num_kv_heads) * head_dim, dtype=torch.float16, device=DEVICE)
    cache, norm = qkv.new_empty(1, BLOCK, num_kv_heads, head_dim), qkv.new_empty(head_dim)
    call = DecodeAttentionCall(qkv, norm, norm, 1e-6, cache, False)
    seq_lens = torch.arange(1, MAX_LENGTH + 1, device=DEVICE)
    found = torch.empty(3, MAX_LENGTH, dtype=torch.int64, device=DEVICE)
    sizes = {name: call.kernel.constants[name] for name in ("BLOCK", "SPLITS", "MAX_SPLITS", "MAX_ROUNDS")}
    assert all(call.combine.constants[name] == size for name, size in sizes.items())
    splitting_kernel[(MAX_LENGTH // LENGTHS_OF_PROGRAM.value,)](seq_lens, found, **sizes)
    num_cached, per_split, newest = found.cpu()

    launched = torch.tensor([call.splits_of(blocks * BLOCK) for blocks in range(1, MAX_LENGTH // BLOCK + 1)])
    assert (launched.diff() >= 0).all() and launched[-1] == call.max_splits
    assert (newest < launched.repeat_interleave(BLOCK)).all()
    assert ((newest == 0) == (num_cached <= BLOCK)).all()
    shares_a_split = newest * per_split < num_cached  # the new token shares a split with cached ones
    is_last = newest == call.max_splits - 1
    assert (is_last | (newest == 0) | ~shares_a_split).all() and (is_last & shares_a_split).any()
    assert ((newest + 1) * per_split >= num_cached).all()
    assert ((newest - 1) * per_split < num_cached).all()
