# SPDX-License-Identifier: Apache-2.0
"""The schemas of fused attention, both versions, with their .out and workspace forms (op-plugin docs).

Arguments of quantised caches, shared prefixes, MLA and sinks have no emulation.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from tests.npu.emulator.attention import Call, attend
from tests.npu.emulator.registry import kernel, require, require_same_dtype, require_shape

Pair = tuple[torch.Tensor, torch.Tensor]


def _call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: tuple[list[int] | None, list[int] | None],
    block_table: torch.Tensor | None,
    heads: tuple[int, int],
    scale: float,
    layout: str,
    modes: tuple[int, int],
    block_size: int,
    return_lse: bool,
    version: int,
) -> Call:
    require(modes[1] == 0 or query.dtype == torch.float16, f"inner_precise {modes[1]}: 0 for bf16")
    kv_heads = heads[1] or heads[0]  # 0 means as many kv heads as query heads
    qlen, kvlen = (None if given is None else [int(length) for length in given] for given in lengths)
    return Call(
        query=query,
        key=key,
        value=value,
        atten_mask=mask,
        qlen=qlen,
        kvlen=kvlen,
        block_table=block_table,
        heads=heads[0],
        kv_heads=kv_heads,
        scale=scale,
        layout=layout,
        sparse_mode=modes[0],
        block_size=block_size,
        return_lse=return_lse,
        version=version,
    )


@kernel("npu_fused_infer_attention_score")
def npu_fused_infer_attention_score(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    atten_mask: torch.Tensor | None,
    actual_seq_lengths: list[int] | None,
    actual_seq_lengths_kv: list[int] | None,
    block_table: torch.Tensor | None,
    num_heads: int,
    scale: float,
    input_layout: str,
    num_key_value_heads: int,
    sparse_mode: int,
    inner_precise: int,
    block_size: int,
    softmax_lse_flag: bool,
) -> Pair:
    """(softmax(scale * q k^T, masked) v, lse or an empty tensor)."""
    call = _call(
        query,
        key,
        value,
        atten_mask,
        (actual_seq_lengths, actual_seq_lengths_kv),
        block_table,
        (num_heads, num_key_value_heads),
        scale,
        input_layout,
        (sparse_mode, inner_precise),
        block_size,
        softmax_lse_flag,
        version=1,
    )
    return attend(call)


@kernel("npu_fused_infer_attention_score_v2")
def npu_fused_infer_attention_score_v2(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    atten_mask: torch.Tensor | None,
    actual_seq_qlen: list[int] | None,
    actual_seq_kvlen: list[int] | None,
    block_table: torch.Tensor | None,
    num_query_heads: int,
    num_key_value_heads: int,
    softmax_scale: float,
    input_layout: str,
    sparse_mode: int,
    block_size: int,
    inner_precise: int,
    return_softmax_lse: bool,
) -> Pair:
    """As the first version, under its second names."""
    call = _call(
        query,
        key,
        value,
        atten_mask,
        (actual_seq_qlen, actual_seq_kvlen),
        block_table,
        (num_query_heads, num_key_value_heads),
        softmax_scale,
        input_layout,
        (sparse_mode, inner_precise),
        block_size,
        return_softmax_lse,
        version=2,
    )
    return attend(call)


def _with_signature(function: Callable, attention: Callable, *more: str) -> Callable:
    """`function` declared with the parameters of `attention` and `more`."""
    parameters = [*inspect.signature(attention).parameters.values()]
    parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in more]
    function.__signature__ = inspect.Signature(parameters)
    return function


def _register_forms(name: str, attention: Callable) -> None:
    """The .out form, which writes (out, lse) into the given tensors, and the workspace query, which needs no bytes."""

    def into(out: list[torch.Tensor], workspace: torch.Tensor | None, **arguments: Any) -> Pair:
        results = attention(**arguments)
        require(len(out) == 2, f"out has {len(out)} tensors: attention and lse")
        for target, result in zip(out, results, strict=True):
            if result.numel():  # without the lse flag its place holds nothing
                require_shape("out", target, *result.shape)
                require_same_dtype(out=target, result=result)
                target.copy_(result)
        return out[0], out[1]

    kernel(f"{name}.out")(_with_signature(into, attention, "out", "workspace"))
    workspace = _with_signature(lambda **arguments: torch.empty(0, dtype=torch.uint8), attention)
    kernel(f"_{name}_get_max_workspace")(workspace)


_register_forms("npu_fused_infer_attention_score", npu_fused_infer_attention_score)
_register_forms("npu_fused_infer_attention_score_v2", npu_fused_infer_attention_score_v2)
