# SPDX-License-Identifier: Apache-2.0
"""Low-latency one-shot all-reduce and all-gather between the GPUs of one host, by direct peer memory writes.

Each value is packed with the sequence number of its exchange into one 64-bit word, written atomically, so the receiver
polls for the sequence number without flags, fences or barriers. Slots are double-buffered: a rank that writes for
exchange c + 2 has received all words of c + 1, whose senders have finished c.
"""

import logging
import os
from pathlib import Path

import torch
import torch.distributed as dist
import triton
import triton.language as tl

from ops.comm import all_gather_single
from ops.cuda.launch import BoundKernel, fits, has_pdl, pdl_trigger, pdl_wait

logger = logging.getLogger(__name__)

BLOCK = 128  # values per program: one warp, so that polling needs no barrier
CAPACITY = 512 * BLOCK  # maximum values per exchange; NCCL is as fast for more
SUMMED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit(do_not_specialize=["n"])
def exchange_kernel(
    values,  # [n] values of this rank
    output,  # [n] sum in float32, in rank order; or [SIZE, n] gathered values
    n,
    addresses,  # [SIZE] int64, addresses of the ranks' slots [2, SIZE, CAPACITY] int64
    counts,  # [CAPACITY / BLOCK] int32, sequence number of each program's last exchange
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
    SUM: tl.constexpr,
    PDL: tl.constexpr,
):
    """One-shot all-reduce or all-gather between programs of the same index on all ranks. Grid (ceil(n / BLOCK),)."""
    program = tl.program_id(0)
    i = program * BLOCK + tl.arange(0, BLOCK)
    pdl_trigger(PDL)
    slots = ()
    for rank in tl.static_range(SIZE):
        slots = slots + (tl.multiple_of(tl.load(addresses + rank).to(tl.pointer_type(tl.int64)), 16),)
    pdl_wait(PDL)
    count = tl.load(counts + program, volatile=True) + 1
    own = tl.load(values + i, mask=i < n, other=0)
    bits = own.to(tl.float32).to(tl.int32, bitcast=True) if SUM else own
    words = (count.to(tl.int64) << 32) | (bits.to(tl.int64) & 0xFFFFFFFF)
    place = (count & 1) * (SIZE * CAPACITY) + i
    for rank in tl.static_range(SIZE):
        if rank != RANK:
            tl.store(slots[rank] + place + RANK * CAPACITY, words)
    total = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(SIZE):
        received = bits
        if rank != RANK:
            slot = slots[RANK] + place + rank * CAPACITY
            arrived = tl.load(slot, volatile=True)
            while tl.max(((arrived >> 32).to(tl.int32) != count).to(tl.int32), axis=0) > 0:
                arrived = tl.load(slot, volatile=True)
            received = arrived.to(tl.int32)
        if SUM:
            total += received.to(tl.float32, bitcast=True)
        else:
            tl.store(output + rank * n + i, received, mask=i < n)
    if SUM:
        tl.store(output + i, total.to(output.dtype.element_ty), mask=i < n)
    tl.store(counts + program, count)


class PeerExchange:
    """All-reduce and all-gather for tensors that `sums` and `gathers` accept: by shape and dtype only, which are equal
    on all ranks, so that all ranks take the same path.

    addresses: each rank's zeroed slots, mapped into this process; memory: the object that keeps them alive.
    """

    def __init__(self, rank: int, addresses: list[int], device: torch.device, memory: object):
        self.size = len(addresses)
        self.memory = memory
        self.addresses = torch.tensor(addresses, dtype=torch.int64, device=device)
        self.counts = torch.zeros(CAPACITY // BLOCK, dtype=torch.int32, device=device)
        self.pdl = has_pdl()
        self.constants = {"RANK": rank, "SIZE": self.size, "CAPACITY": CAPACITY, "BLOCK": BLOCK}
        self.kernels: dict[tuple[torch.dtype, bool], BoundKernel] = {}

    def sums(self, tensor: torch.Tensor) -> bool:
        return 0 < tensor.numel() <= CAPACITY and tensor.dtype in SUMMED_DTYPES

    def gathers(self, tensor: torch.Tensor) -> bool:
        return 0 < tensor.nbytes <= 4 * CAPACITY and tensor.nbytes % 4 == 0

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """All-reduce: sums over the ranks in place."""
        if fits(tensor):
            self.run(tensor, tensor, tensor.numel(), summed=True)
        else:
            aligned = tensor.clone(memory_format=torch.contiguous_format)
            self.run(aligned, aligned, tensor.numel(), summed=True)
            tensor.copy_(aligned)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-gather: concatenates [N, ...] of every rank -> [size * N, ...]."""
        own = tensor if fits(tensor) else tensor.clone(memory_format=torch.contiguous_format)
        gathered = own.new_empty(self.size * own.shape[0], *own.shape[1:])
        self.run(own.view(-1).view(torch.int32), gathered.view(-1).view(torch.int32), own.nbytes // 4, summed=False)
        return gathered

    def run(self, values: torch.Tensor, output: torch.Tensor, n: int, summed: bool) -> None:
        key = (values.dtype, summed)
        kernel = self.kernels.get(key)
        if kernel is None:
            fixed = (self.addresses, self.counts)
            constants = {**self.constants, "SUM": summed, "PDL": self.pdl}
            kernel = BoundKernel(exchange_kernel, (1,), 1, pdl=self.pdl, fixed=fixed, **constants)
            self.kernels[key] = kernel
        kernel.grid = (triton.cdiv(n, BLOCK), 1, 1)
        kernel(values, output, n)


def slot_words(size: int) -> int:
    """Size of a rank's slots in 64-bit words, for a group of `size` ranks."""
    return 2 * size * CAPACITY


def connect(group: dist.ProcessGroup, device: torch.device) -> PeerExchange | None:
    """Sets up a PeerExchange (collective over the group); logs why and returns None if peer memory is unavailable."""
    size, ranks = dist.get_world_size(group), dist.get_process_group_ranks(group)
    own = bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))
    hosts = torch.empty(size, len(own), dtype=torch.uint8, device=device)
    all_gather_single(hosts, torch.tensor([list(own)], dtype=torch.uint8, device=device), group=group)
    if (hosts != hosts[0]).any():
        logger.info("ranks %s: on several hosts, all exchanges by %s", ranks, dist.get_backend(group))
        return None
    exchange, reason = None, "another rank has no access to its peers' memory"
    try:
        exchange = share_memory(group, device)
    except (AttributeError, ImportError, RuntimeError) as error:  # private interface, differs between versions
        reason = str(error).splitlines()[0]
    everywhere = torch.tensor(exchange is not None, dtype=torch.int32, device=device)
    dist.all_reduce(everywhere, dist.ReduceOp.MIN, group=group)  # also a barrier: all slots are zero after it
    if not everywhere.item():
        logger.warning("ranks %s: all exchanges by %s: %s", ranks, dist.get_backend(group), reason)
        return None
    logger.info("ranks %s: exchanges of up to %d numbers by writes to peer memory", ranks, CAPACITY)
    return exchange


def share_memory(group: dist.ProcessGroup, device: torch.device) -> PeerExchange:
    """Allocates slots in torch's symmetric memory; raises RuntimeError if the driver cannot map it on all ranks."""
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # not needed, often unavailable
    from torch.distributed import _symmetric_memory as symmetric_memory

    slots = symmetric_memory.empty(slot_words(dist.get_world_size(group)), dtype=torch.int64, device=device).zero_()
    handle = symmetric_memory.rendezvous(slots, group)
    offset = slots.data_ptr() - handle.buffer_ptrs[handle.rank]
    addresses = [address + offset for address in handle.buffer_ptrs]
    return PeerExchange(handle.rank, addresses, device, memory=(slots, handle))
