# SPDX-License-Identifier: Apache-2.0
"""A job on one node ends, with its cause, whatever happens to one of its processes."""

import os
import signal
from pathlib import Path

import pytest

from tests.jobs import LONG, TWO_RANKS, Job

NO_MEMORY = r"""
import os
if os.environ.get("RANK") == "1":
    import safetensors
    def safe_open(*_, **__):
        raise RuntimeError("no memory left\nand more lines")
    safetensors.safe_open = safe_open
"""


def test_killed_rank_ends_its_job_and_no_other(tmp_path: Path) -> None:
    with Job(tmp_path / "first", *TWO_RANKS, *LONG, "model_name=test_first") as first:
        first.wait_until_decoding()
        with Job(tmp_path / "second", *TWO_RANKS, "model_name=test_second") as second:
            second.wait_until_decoding()
            os.kill(first.ranks()[1], signal.SIGKILL)
            assert first.end() == 1
            assert first.last_line == "error: rank 1 on node 0 (127.0.0.1): killed by SIGKILL (out of memory?)"
            assert second.end(60) == 0
            assert "in use, this job takes" in second.text and "results: " in second.last_line


def test_rank_that_fails_to_load(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_MEMORY)
    with Job(tmp_path / "terminal", *TWO_RANKS, "model_name=test_load", PYTHONPATH=str(tmp_path)) as job:
        assert job.end(60) == 1
        assert job.last_line == "error: rank 1 on node 0 (127.0.0.1): RuntimeError: no memory left"


@pytest.mark.parametrize(("sent", "code"), [("SIGTERM", 1), ("SIGINT", 1), ("SIGKILL", -9)])
def test_launcher_takes_its_ranks_along(tmp_path: Path, sent: str, code: int) -> None:
    with Job(tmp_path / "terminal", *TWO_RANKS, *LONG, "model_name=test_launcher") as job:
        job.wait_until_decoding()
        assert sorted(job.ranks()) == [0, 1]
        job.process.send_signal(getattr(signal, sent))
        assert job.end() == code
        if code == 1:
            assert job.last_line == f"error: node 0 (127.0.0.1): the launcher was ended by {sent}"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["world_size=2", "parallel_config.attn_tp_size=3"], "parallel_config.attn_tp_size: 3 is impossible"),
        ([*TWO_RANKS, "model_path=/nowhere"], "model_path: /nowhere does not exist"),
        ([*TWO_RANKS, "data_config.max_new_tokens=0"], "data_config.max_new_tokens: 0 is impossible"),
    ],
)
def test_wrong_input_ends_before_any_rank(tmp_path: Path, settings: list[str], named: str) -> None:
    with Job(tmp_path / "terminal", *settings) as job:
        assert job.end() == 2
        assert named in job.last_line and job.text.count("\n") == 1
