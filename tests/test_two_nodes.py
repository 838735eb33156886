# SPDX-License-Identifier: Apache-2.0
"""infer.sh on two nodes, emulated by two network namespaces connected by a veth pair that can be cut."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs import ENDS_WITHIN_S, LONG, STARTS_WITHIN_S, TWO_RANKS, Job, wait_for

pytestmark = pytest.mark.xdist_group("jobs")
FOUR_RANKS = ("world_size=4", "model_config.dtype=float32", "parallel_config.attn_tp_size=4")
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=10)


class Cable:
    """Two network namespaces connected by a veth pair with ADDRESSES."""

    def __init__(self) -> None:
        name = f"t{uuid.uuid4().hex[:8]}"
        self.namespaces = (f"{name}a", f"{name}b")
        try:
            for namespace in self.namespaces:
                ip("netns", "add", namespace)
            ip("link", "add", f"{name}a", "netns", self.namespaces[0], "type", "veth", "peer", f"{name}b", "netns",
               self.namespaces[1])  # fmt: skip
            for namespace, address in zip(self.namespaces, ADDRESSES, strict=True):
                ip("-n", namespace, "address", "add", f"{address}/24", "dev", namespace)
                ip("-n", namespace, "link", "set", namespace, "up")
                ip("-n", namespace, "link", "set", "lo", "up")
        except BaseException:
            self.remove()
            raise

    def cut(self) -> None:
        ip("-n", self.namespaces[1], "link", "set", self.namespaces[1], "down")

    def remove(self) -> None:
        for namespace in self.namespaces:
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, timeout=10)


@pytest.fixture
def cable() -> Iterator[Cable]:
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip (package iproute2)")
    try:
        cable = Cable()
    except (subprocess.CalledProcessError, OSError) as error:
        pytest.skip(f"needs the right to make network namespaces: {getattr(error, 'stderr', error)}")
    try:
        yield cable
    finally:
        cable.remove()


@pytest.fixture
def node(cable: Cable, tmp_path: Path) -> Iterator:
    """node(index, *settings, ...) starts infer.sh in a namespace."""
    jobs: list[Job] = []

    def start(index: int, *settings: str, **env: str) -> Job:
        job = Job(
            tmp_path / f"terminal_{index}",
            *settings,
            "model_name=test_two_nodes",
            f"output_dir={tmp_path / f'results_{index}'}",
            options=("--output", str(tmp_path / f"result_{index}.jsonl")),
            namespace=cable.namespaces[index],
            **{"NODE_IPS": " ".join(ADDRESSES), "JOB_SECRET": "of the test"} | env,
        )
        jobs.append(job)
        return job

    yield start
    for job in jobs:
        job.__exit__()


def assert_ends(jobs: tuple[Job, Job], code: int, lines: tuple[str, str], timeout_s: float = ENDS_WITHIN_S) -> None:
    """Asserts that both nodes exit in time with that code and last line, and no process is left."""
    deadline_s = time.monotonic() + timeout_s
    for job, line in zip(jobs, lines, strict=True):
        assert job.end(deadline_s - time.monotonic()) == code, job.text
        assert job.last_line == f"error: {line}", job.text


def test_tokens_equal_one_process(node, tmp_path: Path) -> None:
    settings = (*FOUR_RANKS, "parallel_config.moe_tp_size=4")
    jobs = node(0, *settings), node(1, *settings)
    assert [job.end(STARTS_WITHIN_S) for job in jobs] == [0, 0], jobs[0].text + jobs[1].text
    with Job(tmp_path / "one", "model_config.dtype=float32", options=("--output", str(tmp_path / "one.jsonl"))) as one:
        assert one.end(STARTS_WITHIN_S) == 0, one.text
    two_nodes, one_process = (
        json.loads((tmp_path / name).read_text().splitlines()[0]) for name in ("result_0.jsonl", "one.jsonl")
    )
    assert two_nodes["token_ids"] == one_process["token_ids"]
    assert not (tmp_path / "result_1.jsonl").exists()
    assert "ranks 2 to 3 of 4" in jobs[1].last_line  # only rank 0 writes to the terminal
    logs = {file.resolve().relative_to(tmp_path.resolve()) for file in tmp_path.glob("results_*/*/*/*/log_*.log")}
    assert sorted((log.parts[0], log.name) for log in logs) == [
        ("results_0", "log_0.log"), ("results_0", "log_1.log"), ("results_1", "log_2.log"), ("results_1", "log_3.log"),
    ]  # fmt: skip
    assert len({log.parts[1:-1] for log in logs}) == 1  # node 0 chose the folder name


def test_cut_cable(cable: Cable, node) -> None:
    jobs = node(0, *TWO_RANKS, *LONG), node(1, *TWO_RANKS, *LONG)
    jobs[0].wait_until_decoding()
    for job, address in zip(jobs, ADDRESSES, strict=True):
        assert set(job.listening_at()) == {address}  # no other interface, and not 0.0.0.0
    cable.cut()
    lost = "node {} ({}) is lost: nothing was heard of it for 15 s"
    assert_ends(jobs, 1, (lost.format(1, ADDRESSES[1]), lost.format(0, ADDRESSES[0])))


@pytest.mark.parametrize("index", [0, 1])
def test_killed_rank_is_named_on_both_nodes(node, index: int) -> None:
    jobs = node(0, *TWO_RANKS, *LONG), node(1, *TWO_RANKS, *LONG)
    jobs[0].wait_until_decoding()
    os.kill(jobs[index].ranks()[index], signal.SIGKILL)
    line = f"rank {index} on node {index} ({ADDRESSES[index]}): killed by SIGKILL (out of memory?)"
    assert_ends(jobs, 1, (line, line))


def test_killed_launcher_of_node_0(node) -> None:
    jobs = node(0, *TWO_RANKS, *LONG), node(1, *TWO_RANKS, *LONG)
    jobs[0].wait_until_decoding()
    jobs[0].process.send_signal(signal.SIGKILL)
    assert jobs[1].end(ENDS_WITHIN_S) == 1
    assert jobs[1].last_line == f"error: node 0 ({ADDRESSES[0]}) is lost: nothing was heard of it for 15 s"
    wait_for(lambda: not jobs[0].ranks(), 3)


def test_different_settings(node, tmp_path: Path) -> None:
    jobs = node(0, *FOUR_RANKS), node(1, *FOUR_RANKS, "data_config.max_new_tokens=8")
    line = "data_config.max_new_tokens must be the same on all nodes: 8 on node 1 (10.77.0.2), 32 on node 0"
    assert_ends(jobs, 2, (line, line), STARTS_WITHIN_S)
    assert not list(tmp_path.glob("results_*"))


@pytest.mark.parametrize(("index", "sent"), [(0, "SIGINT"), (1, "SIGTERM")])
def test_signal_while_waiting_for_the_other_node(node, index: int, sent: str) -> None:
    job = node(index, *FOUR_RANKS)
    wait_for(lambda: f"ranks {2 * index} to" in job.text, STARTS_WITHIN_S)
    time.sleep(1)
    job.process.send_signal(getattr(signal, sent))
    assert job.end(5) == 1
    assert job.last_line == f"error: node {index} ({ADDRESSES[index]}): the launcher was ended by {sent}"
    assert "Traceback" not in job.text


def test_another_service_at_the_port(cable: Cable, node) -> None:
    server = [sys.executable, "-u", "-m", "http.server", "--bind", ADDRESSES[0], "29500"]
    service = subprocess.Popen(
        ["ip", "netns", "exec", cable.namespaces[0], *server], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert service.stdout.readline().startswith(b"Serving")
        jobs, here = (node(0, *FOUR_RANKS), node(1, *FOUR_RANKS)), f"node 0 ({ADDRESSES[0]})"
        lines = (
            f"MASTER_PORT: {here} cannot listen on port 29500, choose a free one: Address already in use",
            f"MASTER_PORT: what answers at port 29500 of {here} is not this job: give all nodes the same JOB_SECRET, "
            "and each job a port of its own",
        )
        assert_ends(jobs, 2, lines, STARTS_WITHIN_S)
    finally:
        service.kill()
        service.wait()


def test_another_secret(node) -> None:
    jobs = node(0, *FOUR_RANKS), node(1, *FOUR_RANKS, JOB_SECRET="another")
    assert jobs[1].end(STARTS_WITHIN_S) == 2
    assert "has another JOB_SECRET: give all nodes the same" in jobs[1].last_line
