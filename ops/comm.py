# SPDX-License-Identifier: Apache-2.0
"""Process groups and their collectives, which are no-ops for a group of one rank.

Every group counts the bytes this rank sends, assuming bandwidth-optimal algorithms such as ring all-reduce.
"""

import atexit
import dataclasses
import datetime
import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Protocol

import torch
import torch.distributed as dist

# functions renamed in torch 2.13
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

COLLECTIVE_TIMEOUT = datetime.timedelta(hours=1)  # loading times of ranks differ widely; the launcher detects failures

IDLE_TIMEOUT = datetime.timedelta(days=365)  # a server may be idle for long

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}


@dataclass
class Traffic:
    """Counts the bytes that this rank has sent, by group name."""

    sent_bytes: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, count: float) -> None:
        self.sent_bytes[name] = self.sent_bytes.get(name, 0) + count

    def since(self, before: dict[str, float]) -> dict[str, float]:
        """Returns the bytes sent since the snapshot `before` of `sent_bytes`."""
        return {name: count - before.get(name, 0) for name, count in self.sent_bytes.items()}


class SmallCollectives(Protocol):
    """Low-latency all-reduce and all-gather for the small tensors that `sums` and `gathers` accept."""

    def sums(self, tensor: torch.Tensor) -> bool: ...

    def gathers(self, tensor: torch.Tensor) -> bool: ...

    def all_reduce(self, tensor: torch.Tensor) -> None: ...

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Group:
    """A process group that contains this rank, with collectives over dimension 0 in the order of its ranks."""

    name: str
    ranks: tuple[int, ...] = (0,)
    index: int = 0  # of this rank within the group
    process_group: dist.ProcessGroup | None = None
    small: SmallCollectives | None = None
    traffic: Traffic = field(default_factory=Traffic)

    @cached_property
    def size(self) -> int:
        return len(self.ranks)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce: sums over the ranks in place."""
        if self.size > 1:
            self.traffic.add(self.name, 2 * (self.size - 1) / self.size * tensor.nbytes)
            if self.small is not None and self.small.sums(tensor):
                self.small.all_reduce(tensor)
            else:
                dist.all_reduce(tensor, group=self.process_group)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-gather: concatenates [N, ...] of every rank (equal shapes) -> [size * N, ...]."""
        if self.size == 1:
            return tensor
        self.traffic.add(self.name, (self.size - 1) * tensor.nbytes)
        if self.small is not None and self.small.gathers(tensor):
            return self.small.all_gather(tensor)
        gathered = tensor.new_empty(self.size * tensor.shape[0], *tensor.shape[1:])
        all_gather_single(gathered, tensor.contiguous(), group=self.process_group)
        return gathered

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """Reduce-scatter: sums over the ranks and returns this rank's shard: [size * N, ...] -> [N, ...]."""
        if self.size == 1:
            return tensor
        part = tensor.new_empty(tensor.shape[0] // self.size, *tensor.shape[1:])
        self.traffic.add(self.name, (self.size - 1) * part.nbytes)
        reduce_scatter_single(part, tensor.contiguous(), group=self.process_group)
        return part

    def all_to_all(self, tensor: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        """All-to-all of rows: [sum(send), ...] by destination rank -> [sum(receive), ...] by source rank."""
        if self.size == 1:
            return tensor
        row_bytes = tensor[:1].nbytes if len(tensor) else 0
        self.traffic.add(self.name, (sum(send) - send[self.index]) * row_bytes)
        received = tensor.new_empty(sum(receive), *tensor.shape[1:])
        dist.all_to_all_single(received, tensor.contiguous(), receive, send, group=self.process_group)
        return received

    @cached_property
    def hccl_name(self) -> str:
        """Name of the group's HCCL communicator, which torch_npu's fused communication operations take."""
        assert self.process_group is not None, "a group of one rank has no communicator"
        backend = self.process_group._get_backend(torch.device("npu"))
        return backend.get_hccl_comm_name(self.ranks[self.index])


class CommandChannel:
    """Broadcast of bytes from rank 0 over a CPU group: waiting ranks block without using CPU or device."""

    def __init__(self) -> None:
        """Collective: all ranks must call it."""
        self.group = dist.new_group(backend="gloo", timeout=IDLE_TIMEOUT)
        self.is_source = dist.get_rank() == 0

    def broadcast(self, data: bytes = b"") -> bytes:
        """Returns rank 0's `data` on every rank."""
        size = torch.tensor([len(data)])
        dist.broadcast(size, src=0, group=self.group)
        if not size.item():
            return b""
        payload = torch.empty(int(size.item()), dtype=torch.uint8)
        if self.is_source:
            payload = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.broadcast(payload, src=0, group=self.group)
        return payload.numpy().tobytes()


def gather_json(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Gathers every rank's value as JSON, in their order, over a group of CPU tensors such as `host_group` makes."""
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([len(data)]), group=group)
    texts = [torch.zeros(int(max(sizes)), dtype=torch.uint8) for _ in sizes]
    dist.all_gather(texts, torch.nn.functional.pad(data, (0, int(max(sizes)) - len(data))), group=group)
    return [json.loads(bytes(text[: int(size)].tolist())) for text, size in zip(texts, sizes, strict=True)]


def host_group() -> dist.ProcessGroup:
    """Makes a group of all ranks for CPU tensors. Collective."""
    return dist.new_group(backend="gloo")


GROUP_NAMES = ("world", "control", "attn_tp", "attn_dp", "moe_tp", "moe_ep", "embed_tp", "lmhead_tp")
SINGLE = {name: Group(name=name) for name in GROUP_NAMES}


@dataclass(frozen=True, kw_only=True)
class ParallelContext:
    """The process groups of this rank; docs/parallelism.md shows their layout.

    attn_tp: shards attention heads. attn_dp: same heads, different requests. moe_ep: shards experts. moe_tp: shards
    each expert's intermediate size. embed_tp, lmhead_tp: shard the vocabulary. control: all ranks, to exchange request
    state. dispatch: all ranks on a communicator reserved for fused dispatch and combine; None if those are not used.
    """

    world: Group = SINGLE["world"]
    control: Group = SINGLE["control"]
    attn_tp: Group = SINGLE["attn_tp"]
    attn_dp: Group = SINGLE["attn_dp"]
    moe_tp: Group = SINGLE["moe_tp"]
    moe_ep: Group = SINGLE["moe_ep"]
    embed_tp: Group = SINGLE["embed_tp"]
    lmhead_tp: Group = SINGLE["lmhead_tp"]
    dispatch: Group | None = None

    @property
    def traffic(self) -> Traffic:
        return self.world.traffic

    def holds_same_tokens(self, group: Group) -> bool:
        """Whether a vocabulary group lies within one attention TP group, so that its ranks hold the same tokens."""
        return self.attn_tp.size % group.size == 0


def rank_and_world_size() -> tuple[int, int]:
    """Reads RANK and WORLD_SIZE from the environment; (0, 1) without a launcher."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Reads LOCAL_RANK, the index of this rank on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@cache
def rendezvous_store() -> dist.Store:
    """The ranks' key-value store, which they share before they have process groups."""
    store, _, _ = next(dist.rendezvous("env://", timeout=rendezvous_timeout()))
    return store


def rendezvous_timeout() -> datetime.timedelta:
    return datetime.timedelta(seconds=int(os.environ.get("RENDEZVOUS_TIMEOUT_S", "120")))


def gather_texts(name: str, text: str) -> list[str]:
    """Gathers a text of every rank, in their order, without a process group. Collective, once for a `name`."""
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return [text]
    store = dist.PrefixStore(name, rendezvous_store())
    store.set(str(rank), text)
    return [store.get(str(other)).decode() for other in range(world_size)]


def group_members(
    world_size: int, attn_tp: int, moe_tp: int, embed_tp: int, lmhead_tp: int
) -> dict[str, list[tuple[int, ...]]]:
    """Lists the ranks of each group: contiguous ranks for groups that shard a tensor, strided for those across them."""

    def blocks(size: int) -> list[tuple[int, ...]]:
        return [tuple(range(start, start + size)) for start in range(0, world_size, size)]

    def strides(size: int) -> list[tuple[int, ...]]:
        return [tuple(range(start, world_size, size)) for start in range(size)]

    return {
        "world": blocks(world_size),
        "control": blocks(world_size),
        "attn_tp": blocks(attn_tp),
        "attn_dp": strides(attn_tp),
        "moe_tp": blocks(moe_tp),
        "moe_ep": strides(moe_tp),
        "embed_tp": blocks(embed_tp),
        "lmhead_tp": blocks(lmhead_tp),
    }


def init_parallel(
    device: torch.device, attn_tp: int, moe_tp: int, embed_tp: int, lmhead_tp: int, with_dispatch: bool = False
) -> ParallelContext:
    """Initialises torch.distributed from torchrun's environment and all groups; one rank if there is no launcher."""
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return ParallelContext()
    if not dist.is_initialized():
        dist.init_process_group(
            BACKENDS[device.type],
            device_id=device if device.type == "cuda" else None,
            rank=rank,
            world_size=world_size,
            timeout=rendezvous_timeout(),
        )
        atexit.register(dist.destroy_process_group)
    traffic = Traffic()
    made: dict[tuple[tuple[int, ...], bool], dist.ProcessGroup] = {}
    small: dict[dist.ProcessGroup, SmallCollectives | None] = {}
    groups = {}
    options = group_options(device)
    layout = group_members(world_size, attn_tp, moe_tp, embed_tp, lmhead_tp)
    for name, members in layout.items():
        for ranks in members:
            # the all-to-all of prefill is on `world`
            has_no_all_to_all = options is not None and name != "world" and ranks in layout["attn_tp"]
            key = ranks, has_no_all_to_all
            if len(ranks) > 1 and key not in made:
                own_options = None if options is None else options(*key)
                made[key] = dist.new_group(ranks, timeout=COLLECTIVE_TIMEOUT, pg_options=own_options)  # collective
                if rank in ranks:
                    small[made[key]] = connect_small(made[key], device)
            if rank in ranks:
                group = made.get(key)
                groups[name] = Group(
                    name=name,
                    ranks=ranks,
                    index=ranks.index(rank),
                    process_group=group,
                    small=None if group is None else small[group],
                    traffic=traffic,
                )
    if with_dispatch:
        own = dist.new_group(groups["world"].ranks, timeout=COLLECTIVE_TIMEOUT)
        groups["dispatch"] = dataclasses.replace(groups["world"], name="dispatch", process_group=own, small=None)
    return ParallelContext(**groups)


def group_options(device: torch.device) -> Callable[[tuple[int, ...], bool], Any] | None:
    """Makes a function of a group's ranks and whether no all-to-all runs on it, which returns the backend's options.

    None: the backend has none. Collective.
    """
    if device.type != "npu":
        return None
    from ops.npu.communicators import group_options

    return group_options()


def connect_small(group: dist.ProcessGroup, device: torch.device) -> SmallCollectives | None:
    """Sets up the backend's low-latency collectives for small tensors, if it has any."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from ops.cuda.peer_exchange import connect

    return connect(group, device)
