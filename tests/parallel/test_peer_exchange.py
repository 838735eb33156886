# SPDX-License-Identifier: Apache-2.0
"""Tests all-reduce and all-gather by peer memory writes: between GPUs if there are two, else in Triton's interpreter
between processes that map the same file."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

ON_GPUS = torch.cuda.device_count() >= 2
if not ON_GPUS:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, here and by the ranks
pytest.importorskip("triton", reason="the kernel needs triton")

from ops.comm import Group, init_parallel  # noqa: E402
from ops.cuda.peer_exchange import CAPACITY, PeerExchange, slot_words  # noqa: E402
from tests.parallel.ranks import run_ranks  # noqa: E402

SIZE = 2 if ON_GPUS else 3
# the last is too large and uses torch.distributed
SHAPES = [(1,), (3, 128), (2, 129), (1, 1), (5, 24), *([(8, 2048), (CAPACITY,)] if ON_GPUS else []), (CAPACITY + 1,)]
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if ON_GPUS else [])  # which the interpreter truncates
ROUNDS = 2


def connected(rank: int, folder: Path) -> Group:
    """Creates a group of all ranks, with slots in files without GPUs."""
    if ON_GPUS:
        torch.cuda.set_device(rank)
        group = init_parallel(torch.device("cuda", rank), SIZE, SIZE, SIZE, SIZE).attn_tp
        assert isinstance(group.small, PeerExchange)
        return group
    group = init_parallel(torch.device("cpu"), SIZE, SIZE, SIZE, SIZE).attn_tp
    assert group.small is None
    names = [str(folder / f"slots_{other}") for other in range(SIZE)]
    slots = [torch.from_file(name, shared=True, size=slot_words(SIZE), dtype=torch.int64) for name in names]
    addresses = [mapped.data_ptr() for mapped in slots]
    return dataclasses.replace(group, small=PeerExchange(rank, addresses, torch.device("cpu"), slots))


def values_of(rank: int, round_number: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * round_number + 10 * sum(shape) + rank)
    return torch.randn(shape, generator=generator).to(dtype)


def exchange_all(folder: Path) -> tuple[list[torch.Tensor], int]:
    """Returns all results of this rank and the sequence number of the kernel's first program."""
    rank = int(os.environ["RANK"])
    group = connected(rank, folder)
    counts = group.small.counts
    results = []
    for round_number in range(ROUNDS):
        for shape in SHAPES:
            for dtype in DTYPES:
                results.append(group.all_reduce(values_of(rank, round_number, shape, dtype).to(counts.device)).cpu())
            ids = torch.full(shape, rank + 2**40 * round_number, device=counts.device)
            results.append(group.all_gather(ids).cpu())
        columns = torch.arange(12.0, device=counts.device).view(3, 4) + rank
        results.append(group.all_gather(columns[:, 2:]).cpu())
        group.all_reduce(columns[:, 1])  # neither contiguous nor aligned
        results.append(columns.cpu())
    return results, int(counts[0])


def test_ranks_get_the_same_sums_and_everybodys_values(tmp_path):
    for rank in range(SIZE):
        (tmp_path / f"slots_{rank}").write_bytes(bytes(8 * slot_words(SIZE)))
    for rank, (results, count) in enumerate(run_ranks(SIZE, exchange_all, tmp_path, tmp_path)):
        found = iter(results)
        for round_number in range(ROUNDS):
            for shape in SHAPES:
                for dtype in DTYPES:
                    parts = [values_of(other, round_number, shape, dtype).float() for other in range(SIZE)]
                    total = next(found)
                    if shape[0] <= CAPACITY:
                        assert torch.equal(total, sum(parts[1:], parts[0]).to(dtype))  # in the order of the ranks
                    else:
                        torch.testing.assert_close(total.float(), sum(parts), atol=0.05, rtol=0.01)
                everybodys = [torch.full(shape, other + 2**40 * round_number) for other in range(SIZE)]
                assert torch.equal(next(found), torch.cat(everybodys))
            columns = [torch.arange(12.0).view(3, 4) + other for other in range(SIZE)]
            assert torch.equal(next(found), torch.cat([every[:, 2:] for every in columns]))
            own = columns[rank].clone()
            own[:, 1] = sum(columns[1:], columns[0])[:, 1]
            assert torch.equal(next(found), own)
        exchanged = [shape for shape in SHAPES if shape[0] <= CAPACITY]
        gathered = [shape for shape in SHAPES if shape[0] <= CAPACITY // 2]  # two values per 64-bit element
        assert count == ROUNDS * (len(exchanged) * len(DTYPES) + len(gathered) + 2)


def test_what_is_taken_follows_from_shape_and_dtype():
    exchange = PeerExchange(0, [0, 0], torch.device("cpu"), None)
    assert exchange.sums(torch.empty(CAPACITY, dtype=torch.bfloat16))
    assert not exchange.sums(torch.empty(CAPACITY + 1))
    assert not exchange.sums(torch.empty(4, dtype=torch.int64))
    assert not exchange.sums(torch.empty(0))
    assert exchange.gathers(torch.empty(CAPACITY // 2, dtype=torch.int64))
    assert not exchange.gathers(torch.empty(CAPACITY // 2 + 1, dtype=torch.int64))
    assert not exchange.gathers(torch.empty(3, dtype=torch.float16))
    assert not exchange.gathers(torch.empty(0))
