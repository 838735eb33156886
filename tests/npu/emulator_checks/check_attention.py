# SPDX-License-Identifier: Apache-2.0
"""Cache writes and fused attention against softmax(scale * q k^T + mask) v in float64."""

import pytest
import torch

BF16 = torch.bfloat16
N, G, D = 8, 2, 128
SCALE = D**-0.5
MASK = torch.ones(2048, 2048, dtype=torch.int8).triu(1)


def bf16(*shape):
    return torch.randn(*shape).to(BF16)


def reference(q, k, v, align=None):
    """q [S, N, D], k and v [Skv, G, D]; align: None, "start" or "end" of the keys for a causal mask."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for head in range(q.shape[1]):
        kv_head = head // (q.shape[1] // k.shape[1])
        for row in range(len(q)):
            seen = {None: len(k), "start": row + 1, "end": row + 1 + len(k) - len(q)}[align]
            scores = k[:seen, kv_head].double() @ q[row, head].double() * SCALE
            out[row, head] = scores.softmax(0) @ v[:seen, kv_head].double()
    return out


def close(have, want):
    torch.testing.assert_close(have.double(), want.double(), rtol=2e-2, atol=1e-2)


def cumulative(lengths):
    return torch.tensor(lengths).cumsum(0).tolist()


def v1(q, k, v, **settings):
    settings = {"num_heads": N, "num_key_value_heads": G, "scale": SCALE} | settings
    return torch.ops.npu.npu_fused_infer_attention_score(q, k, v, **settings)


def v2(q, k, v, **settings):
    settings = {"num_query_heads": N, "num_key_value_heads": G, "softmax_scale": SCALE} | settings
    return torch.ops.npu.npu_fused_infer_attention_score_v2(q, k, v, **settings)


CAUSAL = {"input_layout": "TND", "sparse_mode": 3, "atten_mask": MASK}


def test_tnd_causal_requests():
    lengths = [5, 1, 9]
    q, k, v = bf16(15, N, D), bf16(15, G, D), bf16(15, G, D)
    ends = cumulative(lengths)
    out, lse = v2(q, k, v, **CAUSAL, actual_seq_qlen=ends, actual_seq_kvlen=ends)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    close(out, torch.cat([reference(*part, align="end") for part in parts]))
    assert out.is_contiguous() and lse.numel() == 0
    same, lse = v1(q, k, v, **CAUSAL, actual_seq_lengths=ends, actual_seq_lengths_kv=ends, softmax_lse_flag=True)
    assert torch.equal(out, same) and lse.shape == (15, N, 1)
    outs = [torch.empty_like(out), torch.empty(0)]
    settings = dict(CAUSAL, num_query_heads=N, num_key_value_heads=G, softmax_scale=SCALE)
    workspace = torch.ops.npu._npu_fused_infer_attention_score_v2_get_max_workspace(q, k, v, **settings)
    torch.ops.npu.npu_fused_infer_attention_score_v2.out(
        q, k, v, **settings, actual_seq_qlen=ends, actual_seq_kvlen=ends, workspace=workspace, out=outs
    )
    assert torch.equal(outs[0], out)


def paged(lengths, block_size=128, blocks=9):
    """Caches full of NaN but for each request's tokens, in shuffled blocks: (cache, cache, table, [k], [v])."""
    key, value = (torch.full((blocks, block_size, G, D), torch.nan, dtype=BF16) for _ in range(2))
    free = torch.randperm(blocks).tolist()
    table = torch.full((len(lengths), 3), 99, dtype=torch.int32)  # what lies past the length is never read
    keys, values = [], []
    for request, length in enumerate(lengths):
        for place in range(-(-length // block_size)):
            table[request, place] = free.pop()
        positions = torch.arange(length)
        slots = table[request].long()[positions // block_size] * block_size + positions % block_size
        k, v = bf16(length, G, D), bf16(length, G, D)
        torch.ops.npu.npu_scatter_pa_kv_cache(k, v, key, value, slots.to(torch.int32), cache_mode="Norm")
        keys.append(k)
        values.append(v)
    return key, value, table, keys, values


def test_tnd_paged_with_shuffled_blocks():
    kv_lengths, q_lengths = [300, 128, 1, 200], [3, 1, 1, 130]
    key, value, table, keys, values = paged(kv_lengths)
    q = bf16(sum(q_lengths), N, D)
    view = (9, 128, G * D)
    settings = {"block_table": table, "block_size": 128}
    lengths = {"actual_seq_qlen": cumulative(q_lengths), "actual_seq_kvlen": kv_lengths}
    out, _ = v2(q, key.view(view), value.view(view), **CAUSAL, **settings, **lengths)
    parts = zip(q.split(q_lengths), keys, values, strict=True)
    close(out, torch.cat([reference(*part, align="end") for part in parts]))
    by_head = [cache.transpose(1, 2).contiguous() for cache in (key, value)]
    lengths = {"actual_seq_lengths": cumulative(q_lengths), "actual_seq_lengths_kv": kv_lengths}
    assert torch.equal(v1(q, *by_head, **CAUSAL, **settings, **lengths)[0], out)


def test_bsnd_paged_decode_needs_no_mask():
    key, value, table, keys, values = paged([129, 64])
    q = bf16(2, 1, N, D)
    caches = key.view(9, 128, -1), value.view(9, 128, -1)
    out, _ = v1(q, *caches, input_layout="BSND", block_table=table, block_size=128, actual_seq_lengths_kv=[129, 64])
    close(out, torch.stack([reference(*part) for part in zip(q, keys, values, strict=True)]))


@pytest.mark.parametrize("layout", ["BSH", "BSND", "BNSD", "BNSD_BSND"])
@pytest.mark.parametrize("mode, align", [(0, None), (2, "start"), (3, "end")])
def test_dense_layouts(layout, mode, align):
    q, k, v = bf16(2, 4, N, D), bf16(2, 6, G, D), bf16(2, 6, G, D)
    want = torch.stack([reference(*part, align=align) for part in zip(q, k, v, strict=True)])
    given = [tensor.transpose(1, 2).contiguous() if "BNSD" in layout else tensor for tensor in (q, k, v)]
    given = [tensor.flatten(2) for tensor in given] if layout == "BSH" else given
    out, _ = v2(*given, input_layout=layout, sparse_mode=mode, atten_mask=MASK if mode else None)
    if layout == "BNSD":
        out = out.transpose(1, 2)
    close(out.unflatten(2, (N, D)) if layout == "BSH" else out, want)


def test_full_mask_lengths_and_undefined_rows():
    q, k, v = bf16(2, 4, N, D), bf16(2, 6, G, D), bf16(2, 6, G, D)
    mask = torch.zeros(2, 1, 4, 6, dtype=torch.bool)
    mask[1, :, :, 1] = True
    out, _ = v2(q, k, v, input_layout="BSND", atten_mask=mask, actual_seq_qlen=[4, 2], actual_seq_kvlen=[5, 6])
    kept = [0, 2, 3, 4, 5]
    close(out[0], reference(q[0], k[0, :5], v[0, :5]))
    close(out[1, :2], reference(q[1, :2], k[1][kept], v[1][kept]))
    assert out[1, 2:].isnan().all()
    mask[:] = True
    assert v2(q, k, v, input_layout="BSND", atten_mask=mask)[0].isnan().all()


def test_pa_nz_cache_and_nd_update():
    k, v = bf16(3, G, D), bf16(3, G, D)
    nz = [torch.zeros(2, G * D // 16, 16, 16, dtype=BF16) for _ in range(2)]
    torch.ops.npu.npu_scatter_pa_kv_cache(k, v, *nz, torch.tensor([5, 31, 0]))
    assert torch.equal(nz[0][1, :, 15].reshape(G, D), k[1]) and torch.equal(nz[1][0, :, 5].reshape(G, D), v[0])
    flat = torch.zeros(32, G, D, dtype=BF16)
    out = torch.ops.npu.npu_scatter_nd_update_(flat, torch.tensor([[7], [3], [31]], dtype=torch.int32), k)
    assert out.data_ptr() == flat.data_ptr() and torch.equal(flat[[7, 3, 31]], k) and flat.any(-1).sum() == 3 * G


def scatter(slots, mode="Norm", dtype=BF16, strided=False, cache=(2, 16, G, D)):
    rows = torch.ones(G, 2, D, dtype=BF16).transpose(0, 1) if strided else bf16(2, G, D)
    caches = [torch.zeros(cache, dtype=dtype) for _ in range(2)]
    torch.ops.npu.npu_scatter_pa_kv_cache(rows, rows, *caches, torch.tensor(slots), cache_mode=mode)


def update(indices, columns=D):
    cache = torch.zeros(8, D)
    torch.ops.npu.npu_scatter_nd_update_(cache, torch.tensor(indices), torch.ones(len(indices), columns))


def tnd(q=(4, N, D), k=(4, G, D), q_ends=(2, 4), kv_ends=(2, 4), dtype=BF16, **settings):
    tensors = [torch.ones(shape, dtype=dtype) for shape in (q, k, k)]
    lengths = {"actual_seq_qlen": q_ends and list(q_ends), "actual_seq_kvlen": kv_ends and list(kv_ends)}
    v2(*tensors, **(CAUSAL | lengths | settings))


def pages(
    q=(2, N, D),
    cache=(4, 128, G * D),
    table=((0, 1), (2, 3)),
    q_ends=(1, 2),
    kv=(130, 5),
    size=128,
    kind=torch.int32,
    columns=None,
):
    tnd(q, cache, q_ends, kv, block_table=torch.tensor(table, dtype=kind)[:, :columns], block_size=size)


CHUNKS = {"q": (4, N, D), "q_ends": (2, 4)}


def bsnd(q=(2, 4, N, D), k=(2, 4, G, D), layout="BSND", **settings):
    tensors = [torch.ones(shape, dtype=BF16) for shape in (q, k, k)]
    v2(*tensors, input_layout=layout, **settings)


DECODE = {"layout": "BSND", "k": (4, 120, G * D), "block_table": torch.zeros(2, 1, dtype=torch.int32)}
REFUSED = {
    "three dimensions": (lambda: bsnd(q=(8, N, D)), "dimensions"),
    "BSND query heads": (lambda: bsnd(q=(2, 4, N + 1, D)), "heads"),
    "BSND too wide": (lambda: bsnd(q=(2, 4, 128, 512), k=(2, 4, 128, 512), num_query_heads=128), "65535"),
    "65 heads to one": (lambda: tnd((4, 65, D), (4, 1, D), num_query_heads=65, num_key_value_heads=1), "at most 64"),
    "257 heads": (lambda: tnd((4, 257, D), (4, 257, D), num_query_heads=257, num_key_value_heads=257), "256"),
    "left-top mode in TND": (lambda: tnd(sparse_mode=2), "TND"),
    "BNSD_BSND of one": (lambda: bsnd((2, N, 1, D), (2, G, 4, D), "BNSD_BSND"), "more than one"),
    "4097 requests": (lambda: tnd(q_ends=(0,) * 4096 + (4,), kv_ends=(0,) * 4096 + (4,)), "4096"),
    "too few lengths": (lambda: bsnd((3, 4, N, D), (3, 4, G, D), actual_seq_kvlen=[4, 4]), "lengths"),
    "a length past the keys": (lambda: bsnd(actual_seq_kvlen=[5, 4]), "leave"),
    "decode: block size": (lambda: bsnd((2, 1, N, D), **DECODE, block_size=120, actual_seq_kvlen=[3, 3]), "block_size"),
    "chunk: block size": (lambda: bsnd(**DECODE, block_size=64, actual_seq_kvlen=[9, 9]), "128 to 512"),
    "pa: -1": (lambda: scatter([0, -1]), "slot_mapping leaves"),
    "pa: past the cache": (lambda: scatter([0, 32]), "slot_mapping leaves"),
    "pa: twice": (lambda: scatter([3, 3]), "twice"),
    "pa: forgotten Norm": (lambda: scatter([0, 1], mode="PA_NZ"), "Norm"),
    "pa: mode": (lambda: scatter([0, 1], mode="ND"), "cache_mode"),
    "pa: dtype": (lambda: scatter([0, 1], dtype=torch.float16), "dtypes"),
    "pa: strided": (lambda: scatter([0, 1], strided=True), "contiguous"),
    "pa: heads": (lambda: scatter([0, 1], cache=(2, 16, G + 1, D)), "not ND"),
    "pa: slots": (lambda: scatter([0, 1, 2]), "slot_mapping"),
    "nd: negative": (lambda: update([[-1]]), "leaves"),
    "nd: past the end": (lambda: update([[8]]), "leaves"),
    "nd: one dimension": (lambda: update([1, 2]), "two dimensions"),
    "nd: updates": (lambda: update([[1]], columns=D - 1), "updates"),
    "fp32": (lambda: tnd(dtype=torch.float32), "float32"),
    "kv heads": (lambda: tnd(num_key_value_heads=4), "num_key_value_heads=4"),
    "kv heads left out": (lambda: tnd(num_key_value_heads=0), "num_key_value_heads"),
    "head ratio": (lambda: tnd(k=(4, 3, D), num_key_value_heads=3), "multiple"),
    "query heads": (lambda: tnd(num_query_heads=4), "heads"),
    "head width": (lambda: tnd((4, N, 64), (4, G, 64)), "width"),
    "no lengths": (lambda: tnd(q_ends=None), "lengths"),
    "no kv lengths": (lambda: tnd(kv_ends=None), "lengths"),
    "not cumulative": (lambda: tnd(q_ends=(4, 2)), "cumulative"),
    "per-request lengths": (lambda: tnd(q_ends=(2, 2)), "end at 2"),
    "kv lengths' end": (lambda: tnd(kv_ends=(2, 3)), "end at 3"),
    "kv requests": (lambda: tnd(kv_ends=(4,)), "requests"),
    "more queries than keys": (lambda: tnd(k=(3, G, D), kv_ends=(1, 3)), "queries"),
    "no mask": (lambda: tnd(atten_mask=None), "mask"),
    "small mask": (lambda: tnd(atten_mask=MASK[:64, :64].contiguous()), "2048"),
    "lower mask": (lambda: tnd(atten_mask=MASK.t().contiguous()), "triu"),
    "inverted mask": (lambda: tnd(atten_mask=1 - MASK), "triu"),
    "float mask": (lambda: tnd(atten_mask=MASK.float()), "float32"),
    "mask without mode": (lambda: tnd(sparse_mode=0), "sparse_mode 3"),
    "band": (lambda: tnd(sparse_mode=4), "sparse_mode"),
    "layout": (lambda: tnd(input_layout="NTD"), "input_layout"),
    "default layout": (lambda: tnd(input_layout="BSH"), "wide"),
    "inner_precise": (lambda: tnd(inner_precise=1), "inner_precise"),
    "paged: block size": (lambda: pages(size=120, cache=(4, 120, G * D)), "block_size"),
    "paged: block size of a chunk": (lambda: pages(**CHUNKS, cache=(8, 64, G * D), size=64), "128 to 512"),
    "paged: lengths without the new tokens": (lambda: pages(**CHUNKS, kv=(1, 5)), "queries"),
    "paged: query lengths": (lambda: pages(q=(4, N, D), q_ends=(2, 2)), "end at 2"),
    "paged: strided table": (lambda: pages(table=((0, 1, 9), (2, 3, 9)), columns=2), "contiguous"),
    "paged: more blocks than the cache": (
        lambda: pages(table=((0, 1), (0, 1)), cache=(3, 128, G * D), kv=(130, 130)),
        "4 blocks",
    ),
    "paged: no block size": (lambda: pages(size=0), "block_size"),
    "paged: other block size": (lambda: pages(size=64, kv=(50, 5)), "64 tokens"),
    "paged: table dtype": (lambda: pages(kind=torch.int64), "block_table"),
    "paged: table rows": (lambda: pages(table=((0, 1),)), "block_table"),
    "paged: block": (lambda: pages(table=((0, 4), (2, 3))), "outside"),
    "paged: length": (lambda: pages(kv=(257, 5)), "lengths"),
    "paged: cumulative lengths": (lambda: pages(kv=(130, 400)), "lengths"),
    "paged: no lengths": (lambda: pages(kv=None), "lengths"),
    "paged: no key": (lambda: pages(kv=(0, 5)), "no key"),
    "paged: heads": (lambda: pages(cache=(4, 128, G * D * 2)), "num_key_value_heads"),
    "paged: ND view": (lambda: pages(cache=(4, 128, G, D)), "cache"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_strided_value_is_refused():
    qkv = bf16(4, N + 2 * G, D)
    q, k, v = qkv.split([N, G, G], 1)
    with pytest.raises(ValueError, match="value is not contiguous"):
        v2(q.contiguous(), k.contiguous(), v, **CAUSAL, actual_seq_qlen=[4], actual_seq_kvlen=[4])
