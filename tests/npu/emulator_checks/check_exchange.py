# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine over two ranks, which are forks of this process."""

import multiprocessing
import multiprocessing.connection
import os
import time
import traceback

import pytest
import torch
import torch.distributed as dist

from tests.npu.emulator import comm_name, exchange, exchange_rules, set_product

BF16 = torch.bfloat16
E, K = 8, 3
TIMEOUT_S = 60


def _rank(rank, folder, errors):
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(rank)
    for case, body in CASES.items():
        try:
            body(rank, dist.new_group([0, 1]))
        except BaseException:
            errors.put(f"{case}, rank {rank}: {traceback.format_exc()}")
            raise
    dist.destroy_process_group()


def inputs(tokens, hidden):
    x = torch.randn(tokens, hidden).to(BF16)
    ids = torch.stack([torch.randperm(E - 1)[:K] for _ in range(tokens)]).to(torch.int32)  # the last is not chosen
    return x, ids, torch.rand(tokens, K)


def gathered(value):
    values = [None, None]
    dist.all_gather_object(values, value)
    return values


def round_trip(rank, group, tokens, hidden, product="A3", active=None, **settings):
    """Dispatch, the expert function e -> (e + 1) * x + row sum, combine; compared with the sum of each token."""
    set_product(product)
    is_a2 = product == "A2"
    x, ids, weights = inputs(tokens, hidden)
    mask = None if active is None else torch.arange(tokens) < active
    common = {"x_active_mask": mask, "global_bs": settings.pop("global_bs", 0), "shared_expert_num": int(is_a2)}
    common |= {"tp_world_size": int(not is_a2)}
    name = comm_name(group, rank)
    to_a2 = {"expert_scales": weights} if is_a2 else {}
    out = torch.ops.npu.npu_moe_distribute_dispatch_v2(x, ids, name, 2, rank, E, **common, **to_a2, **settings)
    rows, scales, assist, counts, received, _, expand = out
    valid = int(counts.sum())
    every = gathered((x[:active], ids[:active], weights[:active]))
    want = [
        (e, r, t)
        for e in range(rank * 4, rank * 4 + 4)
        for r in range(2)
        for t in range(len(every[r][0]))
        if e in every[r][1][t].tolist()
    ]
    assert valid == len(want) and counts.dtype == torch.int64
    assert counts.tolist() == [sum(e == rank * 4 + local for e, _, _ in want) for local in range(4)]
    sent = torch.stack([every[r][0][t] for _, r, t in want])
    if settings.get("quant_mode") == 2:
        torch.testing.assert_close(rows[:valid].float() * scales[:valid, None], sent.float(), rtol=0, atol=0.03)
        rows = torch.cat((sent, torch.full((len(rows) - valid, hidden), torch.nan, dtype=BF16)))
    assert torch.equal(rows[:valid], sent) and rows[valid:].isnan().all()
    assert len(rows) == (common["global_bs"] or 2 * tokens) * min(4, K)
    if is_a2:
        chosen = [every[r][2][t][every[r][1][t] == e].item() for e, r, t in want]
        assert expand[:valid].tolist() == chosen
    y = rows.clone()
    for row, (e, _, _) in enumerate(want):
        y[row] = rows[row] * (e + 1)
    extra = {"expand_scales": expand} if is_a2 else {}
    arguments = (y, ids, assist, received, weights, name, 2, rank, E)
    back = torch.ops.npu.npu_moe_distribute_combine_v2(*arguments, **common, **extra)
    scaled = torch.stack([(x.double() * (ids[:, k : k + 1] + 1)).to(BF16).double() for k in range(K)], 1)
    result = (weights.double()[..., None] * scaled).sum(1)
    torch.testing.assert_close(back[:active].double(), result[:active], rtol=2e-2, atol=2e-2)
    assert active is None or back[active:].isnan().all()
    with pytest.raises(ValueError, match="dispatch returned"):
        torch.ops.npu.npu_moe_distribute_combine_v2(*arguments[:3], received + 9999, *arguments[4:], **common, **extra)
    with pytest.raises(ValueError, match="match dispatch"):
        changed = dict(common, global_bs=40)
        torch.ops.npu.npu_moe_distribute_combine_v2(*arguments, **changed, **extra)
    with pytest.raises(ValueError, match="x_active_mask has"):
        other = ((tokens if active is None else active) + 1) % (tokens + 1)
        changed = dict(common, x_active_mask=torch.arange(tokens) < other)
        torch.ops.npu.npu_moe_distribute_combine_v2(*arguments, **changed, **extra)
    with pytest.raises(ValueError, match="global_bs 40 after"):
        settings |= dict(common, global_bs=40, x_active_mask=None) | to_a2
        torch.ops.npu.npu_moe_distribute_dispatch_v2(x, ids, name, 2, rank, E, **settings)


def refusals(rank, group):
    x, ids, weights = inputs(2, 1024)
    name = comm_name(group, rank)

    def refused(message, x=x, ids=ids, name=name, ranks=2, me=rank, experts=E, **settings):
        with pytest.raises(ValueError, match=message):
            torch.ops.npu.npu_moe_distribute_dispatch_v2(x, ids, name, ranks, me, experts, **settings)

    set_product("A3")
    refused("twice", ids=torch.zeros(2, K, dtype=torch.int32))
    refused("leaves", ids=ids + E)
    refused("expert_ids", ids=ids.long())
    refused("multiple", experts=9)
    refused("no tokens", x=x[:0], ids=ids[:0])
    refused("float32", x=x.float())
    refused("hidden", x=x[:, :512])
    refused("hidden", x=x.repeat(1, 9))
    refused("more than 512", x=x.repeat(257, 1), ids=ids.repeat(257, 1))
    v2 = {"comm_alg": "fullmesh_v2", "tp_world_size": 1}
    refused("more than 256", x=x.repeat(129, 1), ids=ids.repeat(129, 1), **v2)
    refused("K 13", ids=torch.arange(13, dtype=torch.int32).repeat(2, 1), experts=16, **v2)
    refused("tp_world_size 0", comm_alg="fullmesh_v2")
    refused("comm_alg", comm_alg="fullmesh")
    refused("ep_world_size", comm_alg="hierarchy")
    refused("ep_world_size 4", ranks=4)
    refused("this is", me=1 - rank)
    refused("no communicator", name="hccl_world")
    refused("quant_mode", quant_mode=1)
    refused("shared", shared_expert_num=2)
    refused("tp_world_size", tp_world_size=2)
    refused("global_bs", global_bs=2)
    refused("expert_scales", expert_scales=weights)
    refused("come first", x_active_mask=torch.tensor([False, True]))
    refused("x_active_mask", x_active_mask=torch.ones(2))
    os.environ["HCCL_BUFFSIZE"] = "1"
    refused("HCCL buffer", x=x.repeat(32, 1), ids=ids.repeat(32, 1))
    del os.environ["HCCL_BUFFSIZE"]
    refused("differ in", experts=E * (rank + 1))
    more = slice(0, 1 + rank)
    refused("global_bs must be given", x=x[more], ids=ids[more])
    refused("needs equal ones", x=x[more], ids=ids[more], global_bs=4, **v2)
    everyone = torch.ones(1 + rank, dtype=torch.bool)
    refused("x_active_mask needs equal", x=x[more], ids=ids[more], global_bs=4, x_active_mask=everyone)
    os.environ["HCCL_LOGIC_SUPERPOD_ID"] = str(rank)
    refused("several super-nodes")
    del os.environ["HCCL_LOGIC_SUPERPOD_ID"]
    set_product("A2")
    refused("hidden", x=x[:, :100])
    refused("hidden", x=x.repeat(1, 8))
    refused("more than 256", x=x.repeat(129, 1), ids=ids.repeat(129, 1))
    refused("shared", shared_expert_num=0)
    refused("comm_alg", comm_alg="fullmesh_v2")
    refused("ep_world_size 9", ranks=9, experts=9)
    a2 = {"expert_scales": weights, "shared_expert_num": 1}
    refused("tp_world_size 1", tp_world_size=1, **a2)
    refused("expert_scales must be given", shared_expert_num=1)
    tensors = torch.zeros(8, 1024).to(BF16), ids, torch.zeros(1024).int(), torch.zeros(9).int()
    with pytest.raises(ValueError, match="no dispatch"):
        torch.ops.npu.npu_moe_distribute_combine_v2(*tensors, weights, "never", 2, rank, E)


CASES = {
    "A3": lambda rank, group: round_trip(rank, group, 5, 1024),
    "A3 idle": lambda rank, group: round_trip(rank, group, 3, 1024, active=3 * rank, comm_alg="fullmesh_v2"),
    "A2 padded": lambda rank, group: round_trip(rank, group, 4, 128, "A2", active=3 - 2 * rank),
    "A3 padded": lambda rank, group: round_trip(rank, group, 4, 1024, active=3 - rank),
    "A3 int8": lambda rank, group: round_trip(rank, group, 4, 1024, quant_mode=2, comm_alg="fullmesh_v2"),
    "A2": lambda rank, group: round_trip(rank, group, 5, 128, "A2"),
    "unequal ranks": lambda rank, group: round_trip(rank, group, 2 + rank, 1024, global_bs=6),
    "refusals": refusals,
}


def exchange_of(**changed):
    """The sizes of a call with comm_alg hierarchy on 32 ranks, more than the checks can start."""
    sizes = {"ranks": 32, "rank": 0, "experts": 128, "tokens": 4, "hidden": 2048, "k": 8, "global_bs": 0}
    sizes |= {"algorithm": "hierarchy", "quant_mode": 0, "shared": (0, 0), "tp_world_size": 1}
    return exchange_rules.Exchange(**(sizes | changed))


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("ep_world_size 24", {"ranks": 24, "experts": 120}),
        ("at most 24", {"ranks": 16, "experts": 512}),
        ("hidden size 2056", {"hidden": 2056}),
        ("hidden size 7200", {"hidden": 7200}),
        ("more than 256", {"tokens": 257}),
        ("tp_world_size 0", {"tp_world_size": 0}),
        ("HCCL buffer", {}),
    ],
)
def test_hierarchy_of_a3(message, changed, monkeypatch):
    set_product("A3")
    monkeypatch.setenv("HCCL_BUFFSIZE", "600" if changed else "403")
    with pytest.raises(ValueError, match=message):
        exchange_rules.check(exchange_of(**changed), combine=False)
    monkeypatch.setenv("HCCL_BUFFSIZE", "407")
    exchange_rules.check(exchange_of(), combine=False)
    exchange_rules.check_ranks([exchange_of(rank=rank) for rank in range(32)], True, {"first", "second"})
    with pytest.raises(ValueError, match="needs equal ones"):
        unequal = [exchange_of(rank=rank, tokens=1 + rank % 2, global_bs=64) for rank in range(32)]
        exchange_rules.check_ranks(unequal, False, {"first"})


def test_hierarchy_of_a2_takes_no_mask():
    set_product("A2")
    with pytest.raises(ValueError, match="x_active_mask: not with"):
        exchange._active(torch.ones(4, dtype=torch.bool), exchange_of())


def test_two_ranks(tmp_path):
    fork = multiprocessing.get_context("fork")
    errors = fork.Queue()
    ranks = [fork.Process(target=_rank, args=(rank, str(tmp_path), errors), daemon=True) for rank in range(2)]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + TIMEOUT_S
    while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
        assert time.monotonic() < deadline, "the ranks do not end"
        multiprocessing.connection.wait([rank.sentinel for rank in ranks if rank.is_alive()], timeout=1)
    failed = any(rank.exitcode for rank in ranks)
    for rank in ranks:  # where one failed, the other may wait for it
        rank.kill()
    assert not failed, errors.get(timeout=5)
