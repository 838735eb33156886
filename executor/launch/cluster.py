# SPDX-License-Identifier: Apache-2.0
"""Coordinates the launchers of a job's nodes: rendezvous, heartbeats and failure propagation.

The launcher of node 0 listens on MASTER_PORT, the others connect to it; a job on one node needs no connection. A node
reports success only after its own ranks have exited successfully, whatever the other nodes report.
"""

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from executor.launch.channel import Channel, Listener, ProtocolError
from executor.launch.messages import MAX_FACT, Failure, Start, clean, parse, parse_facts, parse_failure, parse_start
from executor.launch.nodes import TIMING, Nodes, Timing, connect


class Job:
    """Launcher's handle of a job. This class is for single-node jobs; `open_job` also creates multi-node ones."""

    def __init__(self, nodes: Nodes, timing: Timing):
        self.nodes = nodes
        self.timing = timing

    def rendezvous(self, facts: dict[str, str], timeout_s: float, decide: Callable[[], Start]) -> Start | Failure:
        """Rendezvous: waits for all nodes, then returns node 0's `decide()` on every node, or on every node the same
        Failure if a node is missing or its facts differ from node 0's. Raises TimeoutError if node 0 exits; node 0
        re-raises what `decide` raises."""
        return decide()

    def watch(self, end: Callable[[Failure], NoReturn]) -> None:
        """Starts failure detection: calls `end` in a thread when any node fails or its heartbeat stops."""

    def finish(self, failure: Failure | None) -> Failure | None:
        """Reports the outcome of this node's ranks (None: success), waits for the other nodes and returns the
        outcome of the job, unless `end` is called first."""
        return failure


class JobOfSeveral(Job):
    def __init__(self, nodes: Nodes, timing: Timing):
        super().__init__(nodes, timing)
        self.state = threading.Condition()  # guards the fields below; notified on every change
        self.failure: Failure | None = None  # of this node, at time failed_s
        self.failed_s = 0.0
        self.is_posted = False
        self.cause: Failure | None = None  # root cause: the job's first failure
        self.has_left = False

    def watch(self, end: Callable[[Failure], NoReturn]) -> None:
        def wait_for_cause() -> None:
            with self.state:
                while self.cause is None and not self.has_left:
                    self.state.wait(self.timing.beat_s / 4)
                    self._check_timeouts(time.monotonic())
            if self.cause is not None:
                self._leave(self.timing.leave_s)
                end(self.cause)

        threading.Thread(target=wait_for_cause, daemon=True).start()

    def finish(self, failure: Failure | None) -> Failure | None:
        if failure is None:
            self._leave(self.timing.lost_after_s)
            return None
        with self.state:
            self.failed_s, self.failure = time.monotonic(), failure
            self.state.notify_all()
            while not self.has_left:  # normally `end` exits the process first
                self.state.wait(self.timing.beat_s)
        return self.cause or failure

    def _beat(self) -> None:
        while not self.has_left:
            self._send(kind="beat")
            time.sleep(self.timing.beat_s)

    def _check_timeouts(self, now_s: float) -> None:
        """Checks heartbeat timeouts and reports this node's failure when it is due; the caller holds `state`."""
        # Report a consequence only after its root cause had time to be reported, or its node to be declared lost.
        late = self.failure is not None and self.failure.is_consequence
        patience_s = self.timing.lost_after_s + 2 * self.timing.beat_s if late else 0
        if self.failure and not self.is_posted and now_s - self.failed_s >= patience_s:
            self.is_posted = True
            self._post(self.failure)

    def _lost(self, index: int) -> Failure:
        after_s = self.timing.lost_after_s
        return Failure(message=f"{self.nodes.name(index)} is lost: nothing was heard of it for {after_s:g} s")

    def _send(self, **message: Any) -> None:
        raise NotImplementedError

    def _post(self, failure: Failure) -> None:
        """Reports a failure to node 0, which records the first one as the job's root cause."""
        raise NotImplementedError

    def _leave(self, timeout_s: float) -> None:
        """Sends the final message and waits until the peers disconnect, at most timeout_s; call last."""
        raise NotImplementedError


class Member:
    """State of another node, kept by node 0."""

    def __init__(self, channel: Channel):
        self.channel = channel
        self.facts: dict[str, str] | None = None
        self.heard_s = time.monotonic()
        self.is_connected = True
        self.is_done = False


class Coordinator(JobOfSeveral):
    """Coordinator of a multi-node job, on node 0."""

    def __init__(self, nodes: Nodes, port: int, secret: bytes, timing: Timing):
        """Raises ValueError if it cannot listen on `port`."""
        super().__init__(nodes, timing)
        self.members: dict[int, Member] = {}
        self.have_met = False
        try:
            self.listener = Listener(nodes.addresses[0], port, secret, self._admit, timing.answer_s)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise ValueError(
                f"MASTER_PORT: {nodes.name(0)} cannot listen on port {port}, choose a free one: {reason}"
            ) from None
        threading.Thread(target=self._beat, daemon=True).start()

    def rendezvous(self, facts: dict[str, str], timeout_s: float, decide: Callable[[], Start]) -> Start | Failure:
        failure = self._check_facts(facts, timeout_s)
        if failure:
            self._refuse(failure)
            return failure
        try:
            start = decide()
        except ValueError as error:
            self._refuse(Failure(message=f"{self.nodes.name(0)}: {error}", exit_code=2))
            raise
        self._send(kind="start", **dataclasses.asdict(start))
        return start

    def _refuse(self, failure: Failure) -> None:
        self._post(failure)
        self._leave(self.timing.leave_s)

    def _check_facts(self, facts: dict[str, str], timeout_s: float) -> Failure | None:
        """Waits for all nodes' facts; returns a Failure if a node is missing or its facts differ from node 0's."""
        others, deadline_s = range(1, len(self.nodes)), time.monotonic() + timeout_s
        with self.state:
            while missing := [i for i in others if i not in self.members or self.members[i].facts is None]:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    names = ", ".join(map(self.nodes.name, missing))
                    return Failure(message=f"{names} did not come within {timeout_s:g} s: start infer.sh there too")
                self.state.wait(min(left_s, 0.2))
            self.have_met = True
            found = {index: self.members[index].facts or {} for index in others}
        for index, theirs in found.items():
            for key in [*facts, *theirs]:
                texts = key, theirs.get(key, "absent"), facts.get(key, "absent")
                if texts[1] != texts[2]:
                    what, there, here = (clean(text, MAX_FACT) for text in texts)
                    where = f"{there} on {self.nodes.name(index)}, {here} on node 0"
                    return Failure(message=f"{what} must be the same on all nodes: {where}", exit_code=2)
        return None

    def _admit(self, channel: Channel, message: dict[str, Any]) -> None:
        """Admits or refuses a node, then handles its messages until it disconnects."""
        with contextlib.suppress(OSError, ProtocolError):
            hello = parse(message, "hello")
            index, ips = hello["index"], " ".join(self.nodes.addresses)
            member = None
            with self.state:
                if hello["ips"] == ips and 0 < index < len(self.nodes) and index not in self.members:
                    channel.send({"kind": "welcome"})
                    member = self.members[index] = Member(channel)
            if member is None:
                channel.send({"kind": "refused", "ips": ips})
            else:
                self._read(index, member)
        channel.close()

    def _read(self, index: int, member: Member) -> None:
        try:
            while not member.is_done:
                message = parse(member.channel.receive(self.timing.lost_after_s), "facts", "beat", "failure", "done")
                with self.state:
                    member.heard_s = time.monotonic()
                    if message["kind"] == "facts":
                        member.facts = parse_facts(message)
                    elif message["kind"] == "failure":
                        self._post(parse_failure(message))
                    member.is_done = message["kind"] == "done"
                    self.state.notify_all()
        finally:
            with self.state:
                member.is_connected = False
                if not self.have_met:  # the node may be restarted
                    del self.members[index]
                self.state.notify_all()

    def _send(self, **message: Any) -> None:
        with self.state:
            members = [member for member in self.members.values() if member.is_connected]
        for member in members:
            with contextlib.suppress(OSError):  # a lost connection is detected by the heartbeat timeout
                member.channel.send(message)

    def _check_timeouts(self, now_s: float) -> None:
        for index, member in self.members.items():
            if not member.is_done and now_s - member.heard_s > self.timing.lost_after_s:
                self._post(self._lost(index))
        super()._check_timeouts(now_s)

    def _post(self, failure: Failure) -> None:
        with self.state:
            self.cause = self.cause or failure
            self.state.notify_all()

    def _leave(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        if self.cause:
            self._send(kind="end", **dataclasses.asdict(self.cause))
        with self.state:
            while any(member.is_connected for member in self.members.values()) and time.monotonic() < deadline_s:
                self.state.wait(0.1)
            self.has_left = True
        self.listener.close()


class Follower(JobOfSeveral):
    """Side of every other node of a multi-node job: a client of node 0."""

    def __init__(self, nodes: Nodes, port: int, secret: bytes, timeout_s: float, timing: Timing):
        """Raises TimeoutError if node 0 does not answer, ValueError if another program answers."""
        super().__init__(nodes, timing)
        self.channel = connect(nodes, port, secret, timeout_s, timing)
        self.heard_s = time.monotonic()
        self.is_connected = True
        self.start: Start | None = None
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def rendezvous(self, facts: dict[str, str], timeout_s: float, decide: Callable[[], Start]) -> Start | Failure:
        self._send(kind="facts", facts=facts)
        deadline_s = time.monotonic() + timeout_s + self.timing.answer_s
        with self.state:
            while self.start is None and self.cause is None:
                now_s = time.monotonic()
                if not self.is_connected or now_s > min(deadline_s, self.heard_s + self.timing.lost_after_s):
                    raise TimeoutError(f"{self.nodes.name(0)} ended before all nodes had met")
                self.state.wait(0.2)
            outcome = self.cause or self.start
            assert outcome is not None
        if self.cause:
            self._leave(self.timing.leave_s)
        return outcome

    def _read(self) -> None:
        with contextlib.suppress(OSError, ProtocolError):
            while True:
                message = parse(self.channel.receive(self.timing.lost_after_s), "start", "beat", "end")
                with self.state:
                    self.heard_s = time.monotonic()
                    if message["kind"] == "start":
                        self.start = parse_start(message)
                    elif message["kind"] == "end":
                        self.cause = self.cause or parse_failure(message)
                    self.state.notify_all()
        with self.state:
            self.is_connected = False
            self.state.notify_all()

    def _send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # a lost connection is detected by the heartbeat timeout
            self.channel.send(message)

    def _check_timeouts(self, now_s: float) -> None:
        if now_s - self.heard_s > self.timing.lost_after_s:
            self.cause = self.cause or self._lost(0)
        super()._check_timeouts(now_s)

    def _post(self, failure: Failure) -> None:
        self._send(kind="failure", **dataclasses.asdict(failure))  # node 0 replies with the job's cause

    def _leave(self, timeout_s: float) -> None:
        self._send(kind="done")
        deadline_s = time.monotonic() + timeout_s
        with self.state:
            while self.is_connected and time.monotonic() < deadline_s:  # wait until node 0 has read the message
                self.state.wait(0.1)
            self.has_left = True
        self.channel.close()


def open_job(nodes: Nodes, port: int, secret: bytes, timeout_s: float, timing: Timing = TIMING) -> Job:
    """Opens the job on this node: node 0 listens on `port`, the others connect within `timeout_s` seconds.

    Raises ValueError if node 0 cannot listen on `port` or another program answers, TimeoutError if node 0 does not.
    """
    if len(nodes) == 1:
        return Job(nodes, timing)
    if nodes.index == 0:
        return Coordinator(nodes, port, secret, timing)
    return Follower(nodes, port, secret, timeout_s, timing)
