# SPDX-License-Identifier: Apache-2.0
"""The nodes of a job, seen from the launcher of each: they meet, start their ranks, and tell each other what failed.

All of it goes through one TCPStore in the launcher of node 0, which the ranks' process groups use as well.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import NoReturn

from torch.distributed import DistError, DistNetworkError, Store, TCPStore
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run

# The heartbeat is that of a node's launcher, not of its ranks: it does nothing else, so that a rank which keeps Python
# busy for minutes (loading, compiling) is not taken for dead, and a rank that dies is seen at once by its launcher.
BEAT_S = 1.0
LOST_AFTER_S = 15.0  # several times what a beat may be late on an overloaded machine
PORTS_TRIED = 100


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why the job ends; the message names rank and node. A consequence is a failure that another rank's may explain."""

    message: str
    exit_code: int = 1
    is_consequence: bool = False


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The addresses of all nodes in rank order, and which of them this one is."""

    addresses: tuple[str, ...]
    index: int

    def __len__(self) -> int:
        return len(self.addresses)

    def name(self, index: int) -> str:
        return f"node {index} ({self.addresses[index]})"


def open_store(nodes: Nodes, port: int, timeout_s: float) -> TCPStore:
    """The job's store, in node 0 at `port`; a job on one node takes the next free port.

    Raises ValueError if the port is in use, TimeoutError if node 0 does not answer.
    """
    address = nodes.addresses[0]
    timeout = datetime.timedelta(seconds=timeout_s)
    if nodes.index > 0:
        wait_for_port(nodes, port, timeout_s)
        return TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
    reason = ""
    for candidate in range(port, port + (PORTS_TRIED if len(nodes) == 1 else 1)):
        try:
            store = TCPStore(
                address, candidate, is_master=True, timeout=timeout, wait_for_workers=False, multi_tenant=True
            )
        except DistNetworkError as error:
            reason = str(error).splitlines()[0]
            continue
        if candidate != port:
            print(f"port {port} is in use, this job takes {candidate}", file=sys.stderr)
        return store
    raise ValueError(f"MASTER_PORT: {nodes.name(0)} cannot listen on port {port}, choose a free one: {reason}")


def wait_for_port(nodes: Nodes, port: int, timeout_s: float) -> None:
    """Returns when node 0 listens."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((nodes.addresses[0], port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline_s:
                raise TimeoutError(
                    f"{nodes.name(0)} did not answer on port {port} within {timeout_s:g} s ({error}): start infer.sh "
                    "there too, and let no firewall stand between"
                ) from None
        time.sleep(0.2)


def meet(store: Store, nodes: Nodes, facts: dict[str, str], timeout_s: float) -> Failure | None:
    """Returns once all nodes are there; a Failure, the same on each, if one is missing or has other facts than node 0.

    Raises ValueError if another job is at the store, TimeoutError if node 0 ends.
    """
    own_ips = " ".join(nodes.addresses)
    if nodes.index == 0:
        store.set("IPs", own_ips)
        failure = judge(store, nodes, facts, timeout_s)
        store.set("verdict", json.dumps(failure and dataclasses.asdict(failure)))
    else:
        try:
            job_ips = store.get("IPs").decode()
            if job_ips != own_ips or store.add(f"arrived/{nodes.index}", 1) > 1:
                raise ValueError(
                    f"MASTER_PORT: the job at that port of {nodes.name(0)} is not this one, or was started before: its "
                    f"IPs are {job_ips}, here they are {own_ips}; give all nodes the same IPs, and each job a port"
                )
            store.set(f"facts/{nodes.index}", json.dumps(facts))
            store.wait(["verdict"], datetime.timedelta(seconds=timeout_s + 5))
            verdict = json.loads(store.get("verdict"))
        except DistError:
            raise TimeoutError(f"{nodes.name(0)} ended before all nodes had met") from None
        failure = verdict and Failure(**verdict)
    if failure:
        leave(store, nodes)
    return failure


def judge(store: Store, nodes: Nodes, facts: dict[str, str], timeout_s: float) -> Failure | None:
    """What node 0 has against the others."""
    others = range(1, len(nodes))
    deadline_s = time.monotonic() + timeout_s
    while missing := [index for index in others if not store.check([f"facts/{index}"])]:
        if time.monotonic() > deadline_s:
            names = ", ".join(map(nodes.name, missing))
            return Failure(message=f"{names} did not come within {timeout_s:g} s: start infer.sh there too")
        time.sleep(0.1)
    for index in others:
        theirs = json.loads(store.get(f"facts/{index}"))
        for key in [*facts, *theirs]:
            here, there = facts.get(key, "absent"), theirs.get(key, "absent")
            if here != there:
                message = f"{key} must be the same on all nodes: {there} on {nodes.name(index)}, {here} on node 0"
                return Failure(message=message, exit_code=2)
    return None


def leave(store: Store, nodes: Nodes) -> None:
    """To be called last. Node 0, which holds the store, waits for the others, but no longer than a few beats."""
    deadline_s = time.monotonic() + 3 * BEAT_S
    left = store.add("left", 1)
    while nodes.index == 0 and left < len(nodes) and time.monotonic() < deadline_s:
        time.sleep(0.1)
        left = store.add("left", 0)


class Watch:
    """Ends this launcher, and with it this node's ranks, when any node fails or is no longer heard of."""

    def __init__(self, store: Store, nodes: Nodes, scratch: str):
        self.store = store
        self.nodes = nodes
        self.scratch = scratch
        self.failure: Failure | None = None  # of this node, since failed_s
        self.failed_s = 0.0
        self.cause: Failure | None = None  # the job's first failure
        now_s = time.monotonic()
        self.answered_s = now_s
        self.heard = {index: (0, now_s) for index in range(1, len(nodes))}  # number and time of the latest beat
        if len(nodes) > 1:
            # A store's answer may never come where a link is cut: one thread asks, another looks at the clock.
            threading.Thread(target=self._beat, daemon=True).start()
            threading.Thread(target=self._guard, daemon=True).start()

    def finish(self, failure: Failure | None) -> Failure | None:
        """Takes what became of this node's ranks. Returns what became of the job, unless the process ends before."""
        if len(self.nodes) == 1:
            return failure
        if failure is None:
            leave(self.store, self.nodes)
            return None
        self.failed_s, self.failure = time.monotonic(), failure
        while True:  # the guard ends the process
            time.sleep(BEAT_S)

    def _beat(self) -> None:
        while self.cause is None:
            with contextlib.suppress(DistError):  # the guard counts the time without an answer
                self._exchange()
            time.sleep(BEAT_S)

    def _exchange(self) -> None:
        self.store.add(f"beat/{self.nodes.index}", 1)
        now_s = time.monotonic()
        if self.nodes.index == 0:
            for index, (count, heard_s) in self.heard.items():
                new_count = self.store.add(f"beat/{index}", 0)
                if new_count != count:
                    self.heard[index] = (new_count, now_s)
                elif now_s - heard_s > LOST_AFTER_S:
                    self._post(self._lost(index))
        # What caused a consequence is posted by its own node, or is that node's loss: that comes first.
        patience_s = LOST_AFTER_S + 2 * BEAT_S if self.failure and self.failure.is_consequence else 0
        if self.failure and now_s - self.failed_s >= patience_s:
            self._post(self.failure)
        if self.store.check(["cause"]):
            cause = Failure(**json.loads(self.store.get("cause")))
            leave(self.store, self.nodes)
            self.cause = cause
        self.answered_s = time.monotonic()

    def _post(self, failure: Failure) -> None:
        self.store.compare_set("cause", "", json.dumps(dataclasses.asdict(failure)))  # only the first one stays

    def _lost(self, index: int) -> Failure:
        return Failure(message=f"{self.nodes.name(index)} is lost: nothing was heard of it for {LOST_AFTER_S:g} s")

    def _guard(self) -> None:
        while self.cause is None and time.monotonic() - self.answered_s < LOST_AFTER_S:
            time.sleep(BEAT_S / 4)
        end_launcher(self.cause or self._lost(0), self.scratch)


def end_launcher(failure: Failure | None, scratch: str) -> NoReturn:
    """Ends this process from any thread, whatever the others wait for; the kernel then kills ranks that still run."""
    shutil.rmtree(scratch, ignore_errors=True)
    if failure is None:
        os._exit(0)
    print(f"error: {failure.message}", file=sys.stderr, flush=True)
    os._exit(failure.exit_code)


def run_ranks(
    nodes: Nodes, port: int, processes: int, timeout_s: float, scratch: str, command: list[str]
) -> Failure | None:
    """Runs `command` (a module and its arguments) in `processes` ranks on this node, by torchrun, until all have ended.

    torchrun runs in this process, so that no signal ends the one and leaves the other. scratch: a folder for its files.
    """
    arguments = [f"--nnodes={len(nodes)}", f"--node_rank={nodes.index}", f"--nproc_per_node={processes}"]
    arguments += [f"--master_addr={nodes.addresses[0]}", f"--master_port={port}", f"--log_dir={scratch}"]
    arguments += [f"--rdzv_conf=timeout={timeout_s:g}", "--max_restarts=0", "--module", *command]
    here = nodes.name(nodes.index)
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        return first_failure(here, error.failures)
    except SignalException as error:
        return Failure(message=f"{here}: the launcher was ended by {error.sigval.name}")
    except DistError as error:
        reason = str(error).splitlines()[0]
        return Failure(message=f"{here}: no connection to {nodes.name(0)}: {reason}", is_consequence=True)
    return None


def first_failure(here: str, failures: dict[int, ProcessFailure]) -> Failure:
    """The failure that caused the others, as far as this node can tell; `failures` by rank, in the order seen."""
    described = [describe(f"rank {rank} on {here}", failure) for rank, failure in failures.items()]
    return min(described, key=lambda failure: failure.is_consequence)


def describe(where: str, failure: ProcessFailure) -> Failure:
    report = failure.error_file_data
    if "exit_code" in report:  # by executor.rank.fail
        return Failure(
            message=f"{where}: {report['message']}",
            exit_code=report["exit_code"],
            is_consequence=report["is_consequence"],
        )
    if failure.exitcode >= 0:
        return Failure(message=f"{where}: ended with exit code {failure.exitcode}")
    name = failure.signal_name()
    # torchrun ends the other ranks by SIGTERM, NCCL's watchdog one that waits for a dead rank by SIGABRT
    return Failure(
        message=f"{where}: killed by {name}" + (" (out of memory?)" if failure.exitcode == -signal.SIGKILL else ""),
        is_consequence=failure.exitcode in (-signal.SIGTERM, -signal.SIGABRT),
    )
