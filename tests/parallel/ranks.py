# SPDX-License-Identifier: Apache-2.0
"""Helpers: runs a function on several ranks, one process each, and builds the settings of a layout."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch.distributed import TCPStore

# preloaded once by the fork server for all tests; must not start threads or initialise a device
PRELOADED = ["torch", "torch.distributed", "transformers.models.qwen3_moe.modeling_qwen3_moe", "executor.llm"]


def settings_of(layout: tuple[int, int, int, int], world_size: int) -> dict[str, Any]:
    """Builds LLM settings; layout: attn_tp, moe_tp, embed_tp, lmhead_tp."""
    names = ("attn_tp_size", "moe_tp_size", "embed_tp_size", "lmhead_tp_size")
    return {"world_size": world_size, **dict(zip(names, layout, strict=True))}


def run_ranks(world_size: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """Runs `function(*arguments)` on every rank; returns results in rank order. An exception in one ends all."""
    torch.multiprocessing.set_forkserver_preload(PRELOADED)
    # kept open until the ranks exit, so that the port stays taken
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = os.environ | {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 opens no store
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
