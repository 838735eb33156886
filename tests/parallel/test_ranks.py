# SPDX-License-Identifier: Apache-2.0
"""Tests the isolation of ranks from the fork server: environment of the call, fresh modules, one root cause."""

import os
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import tests.checkpoints
from tests.parallel.ranks import run_ranks


def seen() -> dict[str, object]:
    """Returns the state that a rank sees, then modifies it; the next rank must not see that."""
    dist.init_process_group("gloo")
    total = torch.tensor([dist.get_rank() + 1])
    dist.all_reduce(total)
    dist.destroy_process_group()
    found = {
        "total": int(total),
        "process": os.getpid(),
        "variable": os.environ.get("OF_THIS_TEST"),
        "mark": hasattr(tests.checkpoints, "mark"),
        "folder": os.getcwd(),
        "path": sys.path[-1],
    }
    tests.checkpoints.mark = True
    return found


def fail_on_one() -> None:
    if os.environ["RANK"] == "1":
        raise RuntimeError("this is why")
    dist.init_process_group("gloo")  # blocks on the other rank


def test_each_is_a_process_of_its_own(tmp_path, monkeypatch):
    processes = set()
    for value in ("first", "second"):
        monkeypatch.setenv("OF_THIS_TEST", value)
        sys.path.append(value)
        for found in run_ranks(3, seen, tmp_path):
            processes.add(found.pop("process"))
            assert found == {"total": 6, "variable": value, "mark": False, "folder": os.getcwd(), "path": value}
        sys.path.remove(value)
    assert len(processes) == 6


def test_an_exception_in_one_ends_all(tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="this is why"):
        run_ranks(2, fail_on_one, tmp_path)
