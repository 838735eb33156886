# SPDX-License-Identifier: Apache-2.0
"""Graph replays against the same calls in eager mode; operations and call orders that a capture refuses."""

import ast
import contextlib
import inspect
import multiprocessing
import os
import threading
import zipfile

import pytest
import torch
import torch.distributed as dist

BATCH, HEADS, KV_HEADS, WIDTH, HIDDEN, BLOCK = 2, 4, 2, 128, 64, 128
MASK = torch.ones(2048, 2048, dtype=torch.int8).triu(1)
START = [127, 64]  # the first sequence enters its second block after one step
VERSIONS = {
    "v1": ("npu_fused_infer_attention_score", "actual_seq_lengths", "actual_seq_lengths_kv", "num_heads", "scale"),
    "v2": (
        "npu_fused_infer_attention_score_v2",
        "actual_seq_qlen",
        "actual_seq_kvlen",
        "num_query_heads",
        "softmax_scale",
    ),
}


class Decoder:
    """qkv projection, write into the paged cache, attention, output projection; all inputs in buffers."""

    def __init__(self, version, weights):
        self.op, self.q_key, self.kv_key, self.heads_key, self.scale_key = VERSIONS[version]
        self.qkv, self.out, cache = (tensor.clone() for tensor in weights)
        self.caches = cache.clone(), cache.neg()
        self.table = torch.tensor([[3, 1], [0, 4]], dtype=torch.int32)
        self.hidden = torch.zeros(BATCH, HIDDEN)
        self.slots = torch.arange(BATCH, dtype=torch.int32)

    def attend(self, q, lengths):
        caches = [cache.view(len(cache), BLOCK, -1) for cache in self.caches]
        names = {self.heads_key: HEADS, self.scale_key: WIDTH**-0.5, self.q_key: [1, 2], self.kv_key: lengths}
        settings = {"input_layout": "TND", "sparse_mode": 3, "atten_mask": MASK, "num_key_value_heads": KV_HEADS}
        paging = {"block_table": self.table, "block_size": BLOCK}
        return getattr(torch.ops.npu, self.op)(q, *caches, **names, **settings, **paging)[0]

    def step(self, lengths):
        qkv = torch.nn.functional.linear(self.hidden, self.qkv).half()
        parts = qkv.view(BATCH, -1, WIDTH).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        q, k, v = (part.contiguous() for part in parts)
        torch.ops.npu.npu_scatter_pa_kv_cache(k, v, *self.caches, self.slots, cache_mode="Norm")
        attended = self.attend(q, lengths)
        return torch.nn.functional.linear(attended.view(BATCH, -1).float(), self.out)

    def feed(self, hidden, lengths):
        positions = torch.tensor(lengths) - 1
        blocks = self.table[torch.arange(BATCH), positions // BLOCK]
        self.hidden.copy_(hidden)
        self.slots.copy_(blocks * BLOCK + positions % BLOCK)


def decoders(version):
    rows = (HEADS + 2 * KV_HEADS) * WIDTH
    cache = torch.randn(5, BLOCK, KV_HEADS, WIDTH).half()
    weights = torch.randn(rows, HIDDEN) / 8, torch.randn(HIDDEN, HEADS * WIDTH) / 8, cache
    return Decoder(version, weights), Decoder(version, weights)


def captured(body, **settings):
    graph = torch.npu.NPUGraph()
    with torch.inference_mode(), torch.npu.graph(graph, **settings):
        out = body()
    return graph, out


def grown(steps=4):
    return [[length + step for length in START] for step in range(1, steps + 1)]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("update_first", [True, False])
def test_updated_replays_equal_eager_steps(version, update_first):
    eager, graphed = decoders(version)
    before = [cache.clone() for cache in graphed.caches]
    graph, out = captured(lambda: graphed.step(START), auto_dispatch_capture=True)
    assert out.isnan().all() and all(map(torch.equal, graphed.caches, before))
    address = out.data_ptr()
    for lengths in grown():
        hidden = torch.randn(BATCH, HIDDEN)
        for decoder in (eager, graphed):
            decoder.feed(hidden, lengths)
        update = [{graphed.kv_key: lengths}]
        if update_first:
            graph.update(cpu_update_input=update)
        graph.replay()
        if not update_first:
            assert out.isnan().all()
            graph.update(cpu_update_input=update)
        torch.npu.synchronize()
        assert torch.equal(out, eager.step(lengths)) and all(map(torch.equal, eager.caches, graphed.caches))
    assert out.data_ptr() == address


@pytest.mark.parametrize("version", VERSIONS)
def test_lengths_without_update_are_those_of_the_capture(version):
    eager, graphed = decoders(version)
    graph, out = captured(lambda: graphed.step(START))
    with pytest.raises(RuntimeError, match="auto_dispatch_capture"):
        graph.update([{graphed.kv_key: START}])
    for lengths in grown(2):
        hidden = torch.randn(BATCH, HIDDEN)
        for decoder in (eager, graphed):
            decoder.feed(hidden, lengths)
        graph.replay()
        stale = eager.step(START)
        assert torch.equal(out, stale) and not torch.equal(out, eager.step(lengths))


def test_every_replay_needs_its_own_update():
    _, graphed = decoders("v2")
    graph, out = captured(lambda: graphed.step(START), auto_dispatch_capture=True)
    graph.update([{}])  # the values stay
    graph.replay()
    assert not out.isnan().any()
    graph.replay()
    assert out.isnan().all()
    for blocked in (torch.npu.synchronize, torch.npu.current_stream().synchronize, graph.replay):
        with pytest.raises(RuntimeError, match="wait"):
            blocked()
    graph.update([{}])
    torch.npu.synchronize()
    assert not out.isnan().any()
    graph.reset()
    graph.auto_dispatch_capture = True
    with torch.npu.graph(graph, auto_dispatch_capture=True):
        graphed.step(START)
    with pytest.raises(RuntimeError, match="reset"):
        graph.update([{}])


def test_an_update_from_another_thread():
    eager, graphed = decoders("v2")
    graph, out = captured(lambda: graphed.step(START), auto_dispatch_capture=True)
    for lengths in grown(8):
        hidden = torch.randn(BATCH, HIDDEN)
        for decoder in (eager, graphed):
            decoder.feed(hidden, lengths)
        thread = threading.Thread(target=graph.update, args=([{"actual_seq_kvlen": lengths}],))
        thread.start()
        graph.replay()
        thread.join()
        assert torch.equal(out, eager.step(lengths))


def test_update_takes_one_dict_per_call_and_ignores_other_keywords():
    _, graphed = decoders("v2")
    q = torch.randn(BATCH, HEADS, WIDTH).half()
    graph, outs = captured(lambda: [graphed.attend(q, START) for _ in range(2)], auto_dispatch_capture=True)
    lengths = [[100, 3], [5, 90]]
    graph.update([{"actual_seq_kvlen": given, "unknown": 1, "learnable_sink": q} for given in lengths])
    for given in lengths:
        given[0] = 1  # read when it is given
    graph.replay()
    assert torch.equal(outs[0], graphed.attend(q, [100, 3])) and torch.equal(outs[1], graphed.attend(q, [5, 90]))
    with pytest.raises(RuntimeError, match="3 elements for 2"):
        graph.update([{}, {}, {}])


def test_out_variants():
    _, graphed = decoders("v2")
    q, outs = torch.randn(BATCH, HEADS, WIDTH).half(), [torch.zeros(BATCH, HEADS, WIDTH).half(), torch.empty(0)]
    caches = [cache.view(5, BLOCK, -1) for cache in graphed.caches]
    settings = {"input_layout": "TND", "sparse_mode": 3, "atten_mask": MASK, "softmax_scale": WIDTH**-0.5}
    settings |= {"num_query_heads": HEADS, "num_key_value_heads": KV_HEADS, "block_table": graphed.table}
    lengths = {"actual_seq_qlen": [1, 2], "actual_seq_kvlen": START}
    attend = torch.ops.npu.npu_fused_infer_attention_score_v2.out
    graph, _ = captured(
        lambda: attend(q, *caches, **settings, **lengths, block_size=BLOCK, out=outs), auto_dispatch_capture=True
    )
    assert not outs[0].any()
    graph.update([{"actual_seq_kvlen": [9, 8]}])
    graph.replay()
    assert torch.equal(outs[0], graphed.attend(q, [9, 8]))


def test_views_lists_and_changes_in_place():
    x, total, values = torch.randn(3, 4), torch.zeros(4), torch.zeros(3, 1)
    places = torch.zeros(3, 1, dtype=torch.int64)

    def body():
        total.add_(x[1])
        x[2] *= 2
        torch.topk(x, 1, out=(values, places))
        top, index = (x * 2).topk(2)
        return [*torch.ones(2, 2).mul_(3).unbind(), *x.t().contiguous().split(2), top, index, x[0], torch.arange(3)]

    state = [tensor.clone() for tensor in (x, total, values, places)]
    graph, out = captured(body)
    assert all(map(torch.equal, state, (x, total, values, places)))
    assert all(tensor.isnan().all() for tensor in out[:5]) and (out[5] > 1 << 40).all() and (out[7] > 2).all()
    assert torch.equal(out[6], x[0])
    for _ in range(2):
        x.copy_(torch.randn(3, 4))
        want_total = total + x[1]
        want_x = x.clone()
        want_x[2] *= 2
        graph.replay()
        assert torch.equal(x, want_x) and torch.equal(total, want_total)
        assert torch.equal(values, x.topk(1)[0]) and torch.equal(places, x.topk(1)[1])
        top, index = (x * 2).topk(2)
        want = [torch.full((2,), 3.0)] * 2 + [*x.t().split(2), top, index, x[0], torch.arange(3)]
        assert all(map(torch.equal, out, want))


def test_replays_use_the_memory_of_the_capture():
    weight, moved = torch.ones(2), torch.zeros(2)

    def body():
        moved.add_(weight)
        return moved.unsqueeze_(0) * 2

    graph, out = captured(body)
    weight.data = torch.full((2,), 5.0)
    for step in (1, 2, 3):
        graph.replay()
        assert torch.equal(out, torch.full((1, 2), 2.0 * step)) and moved.shape == (1, 2)


X = torch.arange(6.0).view(2, 3)
REFUSED = {
    "aten.(item|_local_scalar_dense)": lambda: X[0, 0].item(),
    "aten.(is_nonzero|item|_local_scalar_dense)": lambda: bool((X > 0).any()),
    "Tensor.tolist": lambda: X.tolist(),
    "Tensor.cpu": lambda: X.cpu(),
    "Tensor.numpy": lambda: X.numpy(),
    "Tensor.__repr__": lambda: repr(X),
    "aten.nonzero": lambda: (X > 0).nonzero(),
    "aten.bincount": lambda: X.long().flatten().bincount(),
    "aten.masked_select": lambda: X.masked_select(X > 0),
    "aten.index.Tensor": lambda: X[X > 0],
    "aten.index_put_": lambda: X.__setitem__(X > 9, 0.0),
    "aten._unique2": lambda: X.unique(),
    "aten.repeat_interleave": lambda: X.repeat_interleave(torch.ones(2, dtype=torch.int64), dim=0),
    "aten.equal": lambda: torch.equal(X, X),
    "torch.tensor": lambda: torch.tensor([1, 2], device="cpu"),
    "torch.npu.synchronize": lambda: torch.npu.synchronize(),
    "Stream.synchronize": lambda: torch.npu.current_stream().synchronize(),
    "NPUGraph.capture_begin": lambda: torch.npu.NPUGraph().capture_begin(),
    "has not joined": lambda: on_another_stream(joins=False),
}


def on_another_stream(joins):
    side, main = torch.npu.Stream(), torch.npu.current_stream()
    if joins:
        side.wait_stream(main)
    with torch.npu.stream(side):
        y = X + 1
    main.wait_stream(side)
    return y


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("operation", REFUSED)
def test_refused_in_a_capture(operation, inference):
    graph = torch.npu.NPUGraph()
    with torch.inference_mode(inference), pytest.raises(RuntimeError, match=operation), torch.npu.graph(graph):
        REFUSED[operation]()
    assert torch.npu.current_stream() == torch.npu.default_stream() and (X + 1).sum().item() == 21
    with pytest.raises(RuntimeError, match="without a captured graph"):
        graph.replay()


def test_a_caught_refusal_invalidates_the_capture():
    def body():
        with contextlib.suppress(RuntimeError):
            torch.equal(X, X)

    with pytest.raises(RuntimeError, match="nothing is captured: aten.equal"):
        captured(body)


def test_allowed_in_a_capture():
    indices, repeats = torch.tensor([1, 0]), torch.tensor([1, 2])

    def body():
        x = X.masked_fill(X > 4, 0.0)[indices]
        return torch.cat((x, x.repeat_interleave(repeats, dim=0, output_size=3), on_another_stream(joins=True)))

    graph, out = captured(body)
    assert out.isnan().all()
    graph.replay()
    torch.npu.synchronize()
    assert torch.equal(out, body())


def test_order_of_calls():
    graph = torch.npu.NPUGraph()
    for call in (graph.replay, graph.capture_end, graph.pool, graph.capture_begin):  # the default stream's
        with pytest.raises(RuntimeError):
            call()
    assert not torch.npu.is_current_stream_capturing()
    pool = torch.npu.graph_pool_handle()
    with torch.npu.stream(torch.npu.Stream()):
        with pytest.raises(RuntimeError, match="strict"):
            graph.capture_begin(capture_error_mode="strict")
        graph.capture_begin(pool=pool, capture_error_mode="relaxed")
        assert torch.npu.is_current_stream_capturing()
        out = X + 1
        graph.capture_end()
    assert graph.pool() == pool
    with pytest.raises(RuntimeError, match="already"), torch.npu.graph(graph):
        pass
    graph.replay()
    assert torch.equal(out, X + 1)
    graph.reset()
    with pytest.raises(RuntimeError):
        graph.replay()
    with torch.npu.graph(graph, pool=pool):
        out = X + 2
    graph.replay()
    assert torch.equal(out, X + 2)
    other, _ = captured(lambda: X * 2)
    with pytest.raises(RuntimeError, match="replay"), torch.npu.graph(torch.npu.NPUGraph()):
        other.replay()


def _collectives(rank, folder):
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    x, every = torch.zeros(2), torch.zeros(4)

    def body():
        dist.all_reduce(x)
        dist.all_gather_into_tensor(every, x + rank)
        exchanged = torch.empty(2)
        dist.all_to_all_single(exchanged, x * (rank + 1))
        part = torch.empty(1)
        dist.reduce_scatter_tensor(part, x + 1)
        return exchanged, part * 2

    graph, (exchanged, part) = captured(body)
    assert not x.any() and not every.any() and exchanged.isnan().all()
    for step in (1.0, 2.0):
        x.copy_(torch.tensor([step, 10 * step]) * (rank + 1))
        graph.replay()
        assert x.tolist() == [3 * step, 30 * step]
        assert every.tolist() == [3 * step, 30 * step, 3 * step + 1, 30 * step + 1]
        assert exchanged.tolist() == [x[rank].item(), 2 * x[rank].item()]
        assert part.tolist() == [4 * (x[rank].item() + 1)]
    for refused in (lambda: dist.all_to_all_single(torch.empty(2), x, [1, 1], [1, 1]), dist.barrier):
        with pytest.raises(RuntimeError, match="c10d"):
            captured(refused)
    dist.destroy_process_group()


def test_collectives_are_recorded(tmp_path):
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_collectives, args=(rank, str(tmp_path))) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        if rank.is_alive():
            rank.terminate()
    assert [rank.exitcode for rank in ranks] == [0, 0]


def _wheel_source(name):
    with zipfile.ZipFile(os.environ["NPU_WHEEL"]) as archive:
        return archive.read(f"torch_npu/npu/{name}").decode()


def test_signatures_equal_the_wheels():
    classes = {node.name: node for node in ast.parse(_wheel_source("graphs.py")).body if isinstance(node, ast.ClassDef)}
    methods = ("capture_begin", "capture_end", "replay", "reset", "pool", "update")
    for owner, names in ((torch.npu.NPUGraph, methods), (torch.npu.graph, ("__init__",))):
        theirs = {node.name: node.args for node in classes[owner.__name__].body if isinstance(node, ast.FunctionDef)}
        for name in names:
            parameters = inspect.signature(getattr(owner, name)).parameters.values()
            ours = [parameter.name for parameter in parameters]
            defaults = [p.default for p in parameters if p.default is not inspect.Parameter.empty]
            assert ours == [argument.arg for argument in theirs[name].args], name
            assert defaults == [ast.literal_eval(default) for default in theirs[name].defaults], name
    handlers = _wheel_source("_npugraph_handlers/ifa_handler.py")
    for name in (f"{row[0]}.{form}" for row in VERSIONS.values() for form in ("default", "out")):
        assert f'"{name}"' in handlers
