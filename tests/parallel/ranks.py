# SPDX-License-Identifier: Apache-2.0
"""Runs a function on several ranks, one process each, and brings the results back; the settings of a layout."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing


def settings_of(layout: tuple[int, int, int, int], world_size: int) -> dict[str, Any]:
    """Settings of an LLM; layout: attn_tp, moe_tp, embed_tp, lmhead_tp."""
    names = ("attn_tp_size", "moe_tp_size", "embed_tp_size", "lmhead_tp_size")
    return {"world_size": world_size, **dict(zip(names, layout, strict=True))}


def run_ranks(world_size: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """`function(*arguments)` on every rank; its results in the order of the ranks. An exception in one ends all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(
        run_rank, args=(world_size, port, folder, function, arguments), nprocs=world_size, join=True
    )
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(world_size)]


def run_rank(
    rank: int, world_size: int, port: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.save(function(*arguments), folder / f"rank_{rank}.pt")
