# SPDX-License-Identifier: Apache-2.0
"""Names of emulated HCCL communicators, which are torch.distributed groups on the CPU."""

from typing import Any

import torch.distributed as dist

from tests.npu.emulator.registry import require

_groups: dict[str, dist.ProcessGroup] = {}


def comm_name(group: dist.ProcessGroup | None, rank: int) -> str:
    """Name of the emulated HCCL communicator of `group` (None: all ranks), of which global `rank` is a member.

    Replaces `group._get_backend(torch.device("npu")).get_hccl_comm_name(rank)`.
    """
    group = group or dist.group.WORLD
    ranks = dist.get_process_group_ranks(group)
    require(rank in ranks, f"rank {rank} is not of the group {ranks}")
    name = f"emulated_hccl_{group.group_name}_of_{'_'.join(map(str, ranks))}"
    _groups[name] = group
    return name


def group_of(name: str) -> dist.ProcessGroup:
    """The group behind a communicator; ValueError for an unknown name."""
    require(name in _groups, f"no communicator '{name}': comm_name(group, rank) gives its name")
    return _groups[name]


def gather(group: dist.ProcessGroup, value: Any) -> list[Any]:
    """Every rank's value, in the order of the group's ranks."""
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
