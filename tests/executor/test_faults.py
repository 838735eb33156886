# SPDX-License-Identifier: Apache-2.0
"""A job on one node ends, with its cause, whatever happens to one of its processes."""

import os
import signal
from pathlib import Path

import pytest

from tests.jobs import LONG, STARTS_WITHIN_S, TWO_RANKS, Job, wait_for

pytestmark = pytest.mark.xdist_group("jobs")
NO_MEMORY = r"""
import os
if os.environ.get("RANK") == "1":
    import safetensors
    class Slice:
        def __init__(self, slice):
            self.get_shape, self.get_dtype = slice.get_shape, slice.get_dtype
        def __getitem__(self, _):
            raise RuntimeError("no memory left\nand more lines")
    class Handle:
        def __init__(self, *arguments, **options):
            self.handle = original(*arguments, **options)
            self.keys, self.metadata = self.handle.keys, self.handle.metadata
        def __enter__(self):
            return self
        def __exit__(self, *_):
            pass
        def get_slice(self, name):
            return Slice(self.handle.get_slice(name))
    original, safetensors.safe_open = safetensors.safe_open, Handle
"""


def test_killed_rank_ends_its_job_and_no_other(tmp_path: Path) -> None:
    with Job(tmp_path / "first", *TWO_RANKS, *LONG, "model_name=test_first") as first:
        first.wait_until_decoding()
        with Job(tmp_path / "second", *TWO_RANKS, "model_name=test_second") as second:
            second.wait_until_decoding()
            os.kill(first.ranks()[1], signal.SIGKILL)
            assert first.end() == 1
            assert first.last_line == "error: rank 1 on node 0 (127.0.0.1): killed by SIGKILL (out of memory?)"
            assert second.end(STARTS_WITHIN_S) == 0
            assert "in use, this job takes" in second.text and "results: " in second.last_line


def test_rank_that_fails_to_load(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_MEMORY)
    with Job(tmp_path / "terminal", *TWO_RANKS, "model_name=test_load", PYTHONPATH=str(tmp_path)) as job:
        assert job.end(STARTS_WITHIN_S) == 1
        assert job.last_line == "error: rank 1 on node 0 (127.0.0.1): RuntimeError: no memory left"


@pytest.mark.parametrize(("sent", "code"), [("SIGTERM", 1), ("SIGKILL", -9)])
def test_launcher_takes_its_ranks_along(tmp_path: Path, sent: str, code: int) -> None:
    settings = (*TWO_RANKS, *LONG, f"output_dir={tmp_path}", "model_name=test_launcher")
    (tmp_path / "temporary").mkdir()
    with Job(tmp_path / "terminal", *settings, TMPDIR=str(tmp_path / "temporary")) as job:
        job.wait_until_decoding()
        assert sorted(job.ranks()) == [0, 1]
        assert set(job.listening_at()) == {"127.0.0.1"}  # launcher and ranks listen on loopback only
        job.process.send_signal(getattr(signal, sent))
        assert job.end() == code
        if code == 1:
            assert job.last_line == f"error: node 0 (127.0.0.1): the launcher was ended by {sent}"
            assert job.text.count("error:") == 1 and "Traceback" not in job.text
    wait_for(lambda: not scratch_folders(tmp_path / "temporary"), 5)


def scratch_folders(temporary: Path) -> list[Path]:
    return [*temporary.glob("ranks_*"), *temporary.glob("torchelastic_*")]


@pytest.mark.parametrize(
    ("moment", "sent"), [("environment:", "SIGINT"), ("ranks 0 to 1", "SIGTERM"), ("a rank", "SIGINT")]
)
def test_signal_during_startup(tmp_path: Path, moment: str, sent: str) -> None:
    (tmp_path / "temporary").mkdir()
    settings = (*TWO_RANKS, f"output_dir={tmp_path / 'results'}", "model_name=test_signal")
    with Job(tmp_path / "terminal", *settings, TMPDIR=str(tmp_path / "temporary")) as job:
        wait_for(lambda: job.ranks() if moment == "a rank" else moment in job.text, STARTS_WITHIN_S)
        job.process.send_signal(getattr(signal, sent))
        assert job.end() == 1
        assert job.last_line.startswith("error: ") and job.last_line.endswith(sent)
        assert job.text.count("error:") == 1 and "Traceback" not in job.text
    wait_for(lambda: not scratch_folders(tmp_path / "temporary"), 5)


def test_rejection_by_a_rank_leaves_no_files(tmp_path: Path) -> None:
    output = str(tmp_path / "missing" / "out.jsonl")
    with Job(
        tmp_path / "terminal", *TWO_RANKS, f"output_dir={tmp_path / 'results'}", options=("--output", output)
    ) as job:
        assert job.end(STARTS_WITHIN_S) == 2
        assert job.last_line.startswith("error: rank 0 on node 0 (127.0.0.1): --output: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["terminal"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["world_size=2", "parallel_config.attn_tp_size=3"], "parallel_config.attn_tp_size: 3 is impossible"),
        ([*TWO_RANKS, "model_path=/nowhere"], "model_path: /nowhere does not exist"),
        ([*TWO_RANKS, "data_config.max_new_tokens=0"], "data_config.max_new_tokens: 0 is impossible"),
    ],
)
def test_invalid_input_is_rejected_before_ranks_start(tmp_path: Path, settings: list[str], named: str) -> None:
    with Job(tmp_path / "terminal", *settings) as job:
        assert job.end(STARTS_WITHIN_S) == 2
        assert named in job.last_line and job.text.count("\n") == 1
