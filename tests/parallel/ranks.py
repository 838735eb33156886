# SPDX-License-Identifier: Apache-2.0
"""Runs a function on several ranks, one process each, and brings the results back; the settings of a layout."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch.distributed import TCPStore

# what a fork server imports once for the ranks of all tests; none of it may start threads or ask for a device
PRELOADED = ["torch", "torch.distributed", "transformers.models.qwen3_moe.modeling_qwen3_moe", "executor.llm"]


def settings_of(layout: tuple[int, int, int, int], world_size: int) -> dict[str, Any]:
    """Settings of an LLM; layout: attn_tp, moe_tp, embed_tp, lmhead_tp."""
    names = ("attn_tp_size", "moe_tp_size", "embed_tp_size", "lmhead_tp_size")
    return {"world_size": world_size, **dict(zip(names, layout, strict=True))}


def run_ranks(world_size: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """`function(*arguments)` on every rank; its results in the order of the ranks. An exception in one ends all."""
    torch.multiprocessing.set_forkserver_preload(PRELOADED)
    # held here until the ranks have ended, so that no other process can take its port
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = os.environ | {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 opens none of its own
    }
    torch.multiprocessing.start_processes(
        run_rank, args=(environment, folder, function, arguments), nprocs=world_size, start_method="forkserver"
    )
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(world_size)]


def run_rank(
    rank: int, environment: dict[str, str], folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.clear()  # the fork server's, of when it started
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.save(function(*arguments), folder / f"rank_{rank}.pt")
