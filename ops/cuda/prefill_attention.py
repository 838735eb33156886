# SPDX-License-Identifier: Apache-2.0
"""Causal attention of short packed prompts to themselves, all of them in one kernel."""

import torch
import triton
import triton.language as tl

from ops.cuda.launch import BoundKernel

LONGEST = 1024  # tokens of a prompt; beyond, torch's attention is faster than this kernel is quick to start
BLOCK = 64
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # finite: a row may see nothing of its first keys


@triton.jit(do_not_specialize=["num_tokens"])
def prefill_attention_kernel(
    query_key,  # [T, H + G, C]
    qkv,  # [T, (H + 2G) * C], of which the values are read
    positions,  # [T] int64, of each token in its prompt
    output,  # [T, H * C]
    num_tokens,
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (ceil(T / BLOCK), H): flash attention (Dao et al. 2022) of BLOCK tokens, which may be of several prompts."""
    first_row = tl.program_id(0) * BLOCK
    head = tl.program_id(1)
    kv_head = head // (H // G)
    i = tl.arange(0, BLOCK)
    c = tl.arange(0, C)
    rows = first_row + i
    in_rows = rows < num_tokens
    starts = rows - tl.load(positions + rows, mask=in_rows, other=0).to(tl.int32)  # of each row's prompt
    first_start = first_row - tl.load(positions + first_row).to(tl.int32)
    query_rows = query_key + (rows * (H + G) + head).to(tl.int64) * C
    query = tl.load(query_rows[:, None] + c[None, :], mask=in_rows[:, None], other=0.0)
    scale = LOG2_E / tl.sqrt(C * 1.0)
    maximum = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    accumulated = tl.zeros([BLOCK, C], tl.float32)
    for first_column in range(first_start, tl.minimum(first_row + BLOCK, num_tokens), BLOCK):
        columns = first_column + i
        in_columns = (columns < num_tokens)[:, None]
        key_rows = query_key + (columns * (H + G) + H + kv_head).to(tl.int64) * C
        key = tl.load(key_rows[:, None] + c[None, :], mask=in_columns, other=0.0)
        value_rows = qkv + (columns * (H + 2 * G) + H + G + kv_head).to(tl.int64) * C
        value = tl.load(value_rows[:, None] + c[None, :], mask=in_columns, other=0.0)
        seen = (columns[None, :] <= rows[:, None]) & (columns[None, :] >= starts[:, None])
        scores = tl.where(seen, tl.dot(query, tl.trans(key)) * scale, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_maximum[:, None])
        decay = tl.exp2(maximum - new_maximum)
        total = total * decay + tl.sum(weights, axis=1)
        accumulated = tl.dot(weights.to(value.dtype), value, accumulated * decay[:, None])
        maximum = new_maximum
    target = output + (rows * H + head).to(tl.int64)[:, None] * C + c[None, :]
    tl.store(target, (accumulated / total[:, None]).to(output.dtype.element_ty), mask=in_rows[:, None])


class PrefillAttentionCall:
    """The kernel for any number of prompts, bound to a number of heads."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int):
        self.num_heads = num_heads
        self.width = num_heads * head_dim
        sizes = {"H": num_heads, "G": num_kv_heads, "C": head_dim, "BLOCK": BLOCK}
        self.kernel = BoundKernel(prefill_attention_kernel, (1,), 4, **sizes)

    def __call__(self, query_key: torch.Tensor, qkv: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """queries and keys [T, H + G, C], qkv [T, (H + 2G) * C], positions [T] int64 -> [T, H * C]."""
        num_tokens = qkv.shape[0]
        output = qkv.new_empty(num_tokens, self.width)
        self.kernel.grid = (triton.cdiv(num_tokens, BLOCK), self.num_heads, 1)
        self.kernel(query_key, qkv, positions, output, num_tokens)
        return output
