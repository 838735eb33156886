# SPDX-License-Identifier: Apache-2.0
"""Fused attention (op-plugin docs: npu_fused_infer_attention_score and _v2): layouts, paging, lengths and masks.

B requests, S query positions, T tokens of all requests, N query heads, G kv heads, D head width.
"""

from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tests.npu.emulator.registry import (
    HALVES,
    poison,
    require,
    require_contiguous,
    require_dtype,
    require_same_dtype,
    takes_tiled_cache,
)

LAYOUTS = ("BSH", "BSND", "BNSD", "BNSD_BSND", "TND")
MASK_SIZE = 2048
_causal_masks: dict[tuple, StorageWeakRef] = {}  # masks seen to be strictly upper triangular


class Request(NamedTuple):
    query: torch.Tensor  # [N, S, D]
    key: torch.Tensor  # [G, Skv, D]
    value: torch.Tensor
    mask: torch.Tensor | None  # [S, Skv], True = excluded
    rows: int  # query positions that the lengths declare valid


class Call(NamedTuple):
    """An attention call's arguments under the names of the second version."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    atten_mask: torch.Tensor | None
    qlen: list[int] | None
    kvlen: list[int] | None
    block_table: torch.Tensor | None
    heads: int
    kv_heads: int
    scale: float
    layout: str
    sparse_mode: int
    block_size: int
    return_lse: bool
    version: int

    @property
    def is_tnd(self) -> bool:
        return self.layout == "TND"


def _require_causal_mask(mask: torch.Tensor | None, sparse_mode: int) -> None:
    require(mask is not None, f"sparse_mode {sparse_mode} needs the {MASK_SIZE}x{MASK_SIZE} mask")
    fits = 2 <= mask.dim() <= 4 and tuple(mask.shape[-2:]) == (MASK_SIZE,) * 2 and mask.numel() == MASK_SIZE**2
    require(fits, f"atten_mask {list(mask.shape)}: sparse_mode {sparse_mode} needs {MASK_SIZE}x{MASK_SIZE}")
    storage = mask.untyped_storage()
    seen = (storage._cdata, mask.data_ptr(), mask._version)
    if seen not in _causal_masks:
        upper = torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.bool).triu(1)
        require(bool((mask.reshape(MASK_SIZE, MASK_SIZE).bool() == upper).all()), "atten_mask is not triu(ones, 1)")
        _causal_masks[seen] = StorageWeakRef(storage)


def _check(call: Call) -> None:
    """Checks what the documentation requires of the call as a whole."""
    require(call.layout in LAYOUTS, f"input_layout '{call.layout}': allowed are {', '.join(LAYOUTS)}")
    require_dtype("query", call.query, HALVES)
    require_same_dtype(query=call.query, key=call.key, value=call.value)
    require_contiguous(
        query=call.query, key=call.key, value=call.value, atten_mask=call.atten_mask, block_table=call.block_table
    )
    require(0 < call.heads <= 256, f"{call.heads} query heads: 1 to 256")
    require(call.heads % call.kv_heads == 0, f"{call.heads} query heads are no multiple of {call.kv_heads} kv heads")
    require(call.heads // call.kv_heads <= 64, f"{call.heads} / {call.kv_heads} heads: at most 64 per kv head")
    require(call.sparse_mode in (0, 1, 2, 3), f"sparse_mode {call.sparse_mode}: the emulator has 0, 1, 2 and 3")
    dims = 3 if call.layout in ("BSH", "TND") else 4
    require(call.query.dim() == dims, f"query {list(call.query.shape)}: {call.layout} has {dims} dimensions")
    if call.is_tnd:
        require(call.sparse_mode in (0, 3), f"TND: sparse_mode 0 or 3, not {call.sparse_mode}")
        require(call.sparse_mode == 3 or call.atten_mask is None, "TND: a mask goes with sparse_mode 3")
    if call.atten_mask is not None:
        require_dtype("atten_mask", call.atten_mask, (torch.bool, torch.int8, torch.uint8))


def _queries(call: Call) -> list[torch.Tensor]:
    """Each request's query [N, S, D], padding included."""
    query = call.query
    if call.is_tnd:
        require(query.shape[1] == call.heads, f"query {list(query.shape)} has not {call.heads} heads")
        require(call.qlen is not None, "TND needs the query lengths")
        _require_cumulative("query", call.qlen, len(query))
        return [part.transpose(0, 1) for part in query.split(_differences(call.qlen))]
    if call.layout == "BSH":
        require(query.shape[2] % call.heads == 0, f"query {list(query.shape)} has not {call.heads} heads")
        query = query.unflatten(2, (call.heads, -1))
    if call.layout in ("BSH", "BSND"):
        require(query.shape[2] * query.shape[3] < 65535, f"query {list(query.shape)}: N * D under 65535")
        query = query.transpose(1, 2)
    require(query.shape[1] == call.heads, f"query {list(call.query.shape)} has not {call.heads} heads")
    require(call.layout != "BNSD_BSND" or query.shape[2] > 1, "BNSD_BSND: more than one query position")
    return list(query)


def _differences(cumulative: list[int]) -> list[int]:
    return [end - start for start, end in zip([0, *cumulative[:-1]], cumulative, strict=True)]


def _require_cumulative(name: str, lengths: list[int], tokens: int) -> None:
    require(0 < len(lengths) <= 4096, f"{len(lengths)} {name} lengths: 1 to 4096 requests")
    require(all(length >= 0 for length in _differences(lengths)), f"{name} lengths {lengths} are not cumulative")
    require(lengths[-1] == tokens, f"{name} lengths end at {lengths[-1]}, not at the {tokens} tokens")


def _per_request(name: str, lengths: list[int] | None, requests: int, longest: int) -> list[int]:
    if lengths is None:
        return [longest] * requests
    if len(lengths) == 1:
        lengths = lengths * requests
    require(len(lengths) >= requests, f"{len(lengths)} {name} lengths for {requests} requests")
    lengths = lengths[:requests]
    require(all(0 <= length <= longest for length in lengths), f"{name} lengths {lengths} leave [0, {longest}]")
    return lengths


def _kv_heads_match(call: Call, width: int, name: str = "key") -> None:
    require(width == call.kv_heads, f"{name} {list(call.key.shape)} has not num_key_value_heads={call.kv_heads}")


def _require_tiles(call: Call, size: int) -> None:
    """NZ caches [blocks, G, D / 16, block_size, 16]: the page has them for other forms of attention only; the source of
    the newest CANN takes them."""
    if not takes_tiled_cache():
        raise RuntimeError(f"key {list(call.key.shape)}: this CANN takes no NZ cache for {call.layout} without a rope")
    lane = 32 // call.key.element_size()
    width = call.query.shape[-1]
    fits = tuple(call.key.shape[1:]) == (call.kv_heads, width // lane, size, lane)
    require(fits, f"key {list(call.key.shape)} is no NZ cache of {call.kv_heads} x {width} in blocks of {size}")


def _paged(call: Call, queries: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    table, size = call.block_table, call.block_size
    longest = max(query.shape[1] for query in queries)
    if longest > 1:
        require(size in (128, 256, 384, 512), f"block_size {size}: 128 to 512 in steps of 128")
    most = 1024 if call.is_tnd else 512
    require(size % 16 == 0 and 0 < size <= most, f"block_size {size}: a multiple of 16, at most {most}")
    require_dtype("block_table", table, (torch.int32,))
    fits = table.dim() == 2 and len(table) == len(queries)
    require(fits, f"block_table {list(table.shape)} for {len(queries)} requests")
    require(call.kvlen is not None, "paging needs the kv lengths")
    if call.is_tnd:
        require(len(call.kvlen) == len(queries), f"{len(call.kvlen)} kv lengths for {len(queries)} requests")
    lengths = _per_request("kv", call.kvlen, len(queries), table.shape[1] * size)
    needed = sum(-(-length // size) for length in lengths)  # the documentation counts shared blocks once per request
    require(needed <= len(call.key), f"kv lengths {lengths} of {needed} blocks, but the cache has {len(call.key)}")
    require(call.key.shape[:-1] == call.value.shape[:-1], "key and value caches differ in shape")
    by_head, tiled = call.key.dim() == 4, call.key.dim() == 5
    if tiled:
        _require_tiles(call, size)
    elif by_head:
        allowed = call.layout.startswith("BNSD") or (call.is_tnd and call.version == 1)
        require(allowed, f"{call.layout}: the paged cache is [blocks, block_size, G * D]")
        _kv_heads_match(call, call.key.shape[1])
        require(call.key.shape[2] == size, f"key {list(call.key.shape)}: blocks have not {size} tokens")
    else:
        require(call.key.dim() == 3, f"key {list(call.key.shape)}: a paged cache has 3 or 4 dimensions")
        require(call.key.shape[1] == size, f"key {list(call.key.shape)}: blocks have not {size} tokens")
        require(call.key.shape[2] <= 65535, f"key {list(call.key.shape)}: G * D at most 65535")
        width = queries[0].shape[2]
        fits = call.key.shape[2] == call.kv_heads * width
        require(fits, f"key {list(call.key.shape)} is not num_key_value_heads={call.kv_heads} x {width}")
    requests = []
    for row, length in zip(table, lengths, strict=True):
        blocks = row[: -(-length // size)].long()
        valid = bool(((blocks >= 0) & (blocks < len(call.key))).all())
        require(valid, f"block_table names a block outside [0, {len(call.key)})")
        pair = []
        for cache in (call.key, call.value):
            picked = cache[blocks].permute(0, 3, 1, 2, 4).flatten(3) if tiled else cache[blocks]
            if not tiled:
                picked = picked.transpose(1, 2) if by_head else picked.unflatten(2, (call.kv_heads, -1))
            pair.append(picked.flatten(0, 1)[:length].transpose(0, 1))
        requests.append(tuple(pair))
    return requests


def _dense(call: Call, queries: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    key, value = call.key, call.value
    require(key.dim() == call.query.dim(), f"key {list(key.shape)}: {call.layout} without paging")
    require(key.shape[:-1] == value.shape[:-1], "key and value differ in shape")
    if call.is_tnd:
        _kv_heads_match(call, key.shape[1])
        require(call.kvlen is not None, "TND needs the kv lengths")
        require(len(call.kvlen) == len(queries), f"{len(call.kvlen)} kv lengths for {len(queries)} requests")
        _require_cumulative("kv", call.kvlen, len(key))
        parts = _differences(call.kvlen)
        pairs = zip(key.split(parts), value.split(parts), strict=True)
        return [(k.transpose(0, 1), v.transpose(0, 1)) for k, v in pairs]
    require(len(key) == len(queries), f"key {list(key.shape)} for {len(queries)} requests")
    if call.layout == "BSH":
        require(key.shape[2] == call.kv_heads * queries[0].shape[2], f"key {list(key.shape)} is not G * D wide")
        key, value = (tensor.unflatten(2, (call.kv_heads, -1)) for tensor in (key, value))
    if call.layout in ("BSH", "BSND"):
        key, value = key.transpose(1, 2), value.transpose(1, 2)
    _kv_heads_match(call, key.shape[1])
    lengths = _per_request("kv", call.kvlen, len(queries), key.shape[2])
    return [(k[:, :n], v[:, :n]) for k, v, n in zip(key, value, lengths, strict=True)]


def _require_widths(call: Call, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    width = query.shape[2]
    require(key.shape[2] == width, f"query and key heads are {width} and {key.shape[2]} wide")
    require(width <= 512 and width % 16 == 0, f"head width {width}: a multiple of 16, at most 512")
    if call.is_tnd:
        fits = (width, value.shape[2]) in ((128, 128), (192, 128), (192, 192))
        require(fits, f"TND: head width {width}, value {value.shape[2]}; 128, or 192 for query and key")


def _mask(call: Call, index: int, rows: int, columns: int, longest: int) -> torch.Tensor | None:
    """The request's mask [S, Skv], True = excluded, or None."""
    mode = call.sparse_mode
    if longest == 1 and not call.is_tnd:
        mode = 0  # one query position: the documentation says that sparse_mode has no effect
    if mode in (2, 3):
        _require_causal_mask(call.atten_mask, mode)
        require(mode == 2 or not call.is_tnd or rows <= columns, f"sparse_mode 3: {rows} queries, {columns} keys")
        return torch.ones(rows, columns, dtype=torch.bool).triu(1 + (columns - rows if mode == 3 else 0))
    mask = call.atten_mask
    require(mask is not None or mode == 0, "sparse_mode 1 needs the full mask")
    if mask is None:
        return None
    wide = call.block_table.shape[1] * call.block_size if call.block_table is not None else columns
    shape = tuple(mask.shape)
    fits = mask.dim() in (2, 3, 4) and shape[-2] >= rows and shape[-1] >= wide
    fits = fits and (mask.dim() < 4 or shape[1] == 1) and (mask.dim() == 2 or shape[0] in (1, len(call.query)))
    require(fits, f"atten_mask {list(shape)} does not cover {rows} queries and {wide} keys")
    if mask.dim() > 2:
        mask = mask[index if shape[0] > 1 else 0]
    return mask.reshape(shape[-2:])[:rows, :columns].bool()


def _attend(request: Request, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [N, S, Dv], lse [N, S, 1] fp32); rows that attend to nothing, and rows past the length, are undefined."""
    repeats = len(request.query) // len(request.key)
    key, value = (tensor.float().repeat_interleave(repeats, 0) for tensor in (request.key, request.value))
    scores = request.query.float() @ key.transpose(1, 2) * scale
    if request.mask is not None:
        scores = scores.masked_fill(request.mask, -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    out = (scores - lse).exp() @ value
    empty = torch.isinf(lse) & (lse < 0)
    empty[:, request.rows :] = True
    return out.masked_fill(empty, torch.nan).to(request.query.dtype), lse.masked_fill(empty, torch.nan)


def attend(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """(out in the layout's form and query's dtype, lse fp32 or an empty tensor)."""
    _check(call)
    queries = _queries(call)
    pairs = _paged(call, queries) if call.block_table is not None else _dense(call, queries)
    longest = max(query.shape[1] for query in queries)
    rows = [query.shape[1] for query in queries]
    if not call.is_tnd and longest > 1:
        rows = _per_request("query", call.qlen, len(queries), longest)
    outs, lses = [], []
    for index, (query, (key, value)) in enumerate(zip(queries, pairs, strict=True)):
        _require_widths(call, query, key, value)
        require(key.shape[1] > 0 or query.shape[1] == 0, f"request {index} has no key")
        require(longest > 1 or key.shape[1] <= 262144, f"request {index} has {key.shape[1]} keys: at most 262144")
        mask = _mask(call, index, rows[index], key.shape[1], longest)
        if mask is not None and rows[index] < query.shape[1]:
            mask = torch.nn.functional.pad(mask, (0, 0, 0, query.shape[1] - rows[index]), value=True)
        out, lse = _attend(Request(query, key, value, mask, rows[index]), call.scale)
        outs.append(out)
        lses.append(lse)
    if call.is_tnd:
        out, lse = (torch.cat(parts, 1).transpose(0, 1).contiguous() for parts in (outs, lses))  # [T, N, *]
    else:
        out, lse = torch.stack(outs), torch.stack(lses)  # [B, N, S, *]
        if call.layout != "BNSD":
            out = out.transpose(1, 2).contiguous()
        if call.layout == "BSH":
            out = out.flatten(2)
    return out, lse if call.return_lse else poison((0,), torch.float32)
