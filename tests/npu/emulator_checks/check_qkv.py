# SPDX-License-Identifier: Apache-2.0
"""Fused norm, rotary embedding and cache write, and attention on its tiled cache, against formulas in float64."""

import pytest
import torch

from tests.npu.emulator.registry import set_tiled_cache

BF16, D = torch.bfloat16, 128
EPS = 1e-5


def bf16(*shape):
    return torch.randn(*shape).to(BF16)


def call(tokens=3, heads=4, kv_heads=2, blocks=2, block_size=32, slots=(5, -1, 40), **changed):
    """Calls the operation on random tensors; returns its inputs by name."""
    given = {
        "qkv": bf16(tokens, (heads + 2 * kv_heads) * D),
        "q_gamma": bf16(D),
        "k_gamma": bf16(D),
        "cos": bf16(tokens, D),
        "sin": bf16(tokens, D),
        "index": torch.tensor(slots),
        "q_out": bf16(tokens, heads * D),
        "k_cache": bf16(blocks, kv_heads * D // 16, block_size, 16),
        "v_cache": bf16(blocks, kv_heads * D // 16, block_size, 16),
        "qkv_size": [1, tokens, heads + 2 * kv_heads, D],
        "head_nums": [heads, kv_heads, kv_heads],
        "epsilon": EPS,
        "cache_mode": "PA_NZ",
    } | changed
    before = {name: given[name].clone() for name in ("k_cache", "v_cache")}
    torch.ops.npu.npu_qkv_rms_norm_rope_cache(**given)
    return given, before


def rotated(rows, gamma, cos, sin):
    rows = rows.double()
    normed = rows * (rows.square().mean(-1, keepdim=True) + EPS).rsqrt() * gamma.double()
    first, second = normed.chunk(2, -1)
    return normed * cos.double()[:, None] + torch.cat((-second, first), -1) * sin.double()[:, None]


def test_query_and_caches():
    given, before = call()
    heads = given["qkv"].view(3, 8, D)
    angles = given["cos"], given["sin"]
    query = rotated(heads[:, :4], given["q_gamma"], *angles).flatten(1)
    torch.testing.assert_close(given["q_out"].double(), query, rtol=2e-2, atol=2e-2)
    for name, rows in (("k_cache", rotated(heads[:, 4:6], given["k_gamma"], *angles)), ("v_cache", heads[:, 6:])):
        cache = given[name].clone()
        for row, block, offset in ((0, 0, 5), (2, 1, 8)):
            want = rows[row].reshape(-1, 16).double()  # tile by tile
            torch.testing.assert_close(cache[block, :, offset].double(), want, rtol=2e-2, atol=2e-2)
            cache[block, :, offset] = before[name][block, :, offset]
        assert torch.equal(cache, before[name])  # slot -1 is skipped


def paged_attention(cache_of):
    """Attention of two sequences over paged keys and values that `cache_of` lays out."""
    torch.manual_seed(1)
    keys, values = (cache_of(bf16(3, 128, 2, D)) for _ in range(2))
    return torch.ops.npu.npu_fused_infer_attention_score_v2(
        bf16(3, 4, D),
        keys,
        values,
        num_query_heads=4,
        num_key_value_heads=2,
        softmax_scale=D**-0.5,
        input_layout="TND",
        sparse_mode=3,
        atten_mask=torch.ones(2048, 2048, dtype=torch.int8).triu(1),
        actual_seq_qlen=[2, 3],
        actual_seq_kvlen=[130, 7],
        block_table=torch.tensor([[2, 0], [1, 1]], dtype=torch.int32),
        block_size=128,
    )[0]


def tiled(cache):
    return cache.unflatten(3, (-1, 16)).permute(0, 2, 3, 1, 4).contiguous()  # [L, G, D / 16, S, 16]


def test_attention_on_a_tiled_cache():
    set_tiled_cache(True)
    assert torch.equal(paged_attention(tiled), paged_attention(lambda cache: cache.flatten(2)))
    with pytest.raises(ValueError, match="no NZ cache"):
        paged_attention(lambda cache: tiled(cache).transpose(1, 2).contiguous())


def test_older_versions_refuse_a_tiled_cache():
    set_tiled_cache(False)
    with pytest.raises(RuntimeError, match="takes no NZ cache"):
        paged_attention(tiled)


REFUSED = {
    "mode": ({"cache_mode": "PA"}, "cache_mode"),
    "a batch for each token": ({"qkv_size": [3, 1, 8, D]}, "blocks"),
    "heads": ({"head_nums": [4, 2, 1]}, "value heads"),
    "sum of heads": ({"head_nums": [2, 2, 2]}, "disagree"),
    "ratio": ({"heads": 3}, "multiple"),
    "int32 slots": ({"index": torch.tensor([1, 2, 3], dtype=torch.int32)}, "index"),
    "slot twice": ({"slots": (5, 5, 1)}, "twice"),
    "past the cache": ({"slots": (64, 5, 1)}, "leaves"),
    "block size": ({"block_size": 16, "slots": (1, 2, 3)}, "block size"),
    "dtype": ({"cos": torch.ones(3, D)}, "dtypes"),
    "cos": ({"cos": bf16(3, 1, D)}, "cos"),
    "plain cache": ({"k_cache": bf16(2, 32, 2, D)}, "block size"),
    "cache of other heads": ({"k_cache": bf16(2, 8, 32, 16)}, "k_cache"),
    "int8 cache": ({"k_cache": torch.zeros(2, 8, 32, 32, dtype=torch.int8)}, "dtypes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    changed, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call(**changed)
