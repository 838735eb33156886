# SPDX-License-Identifier: Apache-2.0
"""The nodes of a job, seen from the launcher of each: they meet, and tell each other what failed.

The launcher of node 0 listens at MASTER_PORT, those of the other nodes connect. One node has nobody to talk to. None
ends well on another's word: that its own ranks have ended well is what only the node itself can know.
"""

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from ops.channel import Channel, Listener, Stranger
from ops.messages import MAX_FACT, Failure, Start, clean, parse, parse_facts, parse_failure, parse_start
from ops.nodes import TIMING, Nodes, Timing, connect


class Job:
    """A node's view of the job. This one is of a job on one node; `open_job` makes those of several."""

    def __init__(self, nodes: Nodes, timing: Timing):
        self.nodes = nodes
        self.timing = timing

    def meet(self, facts: dict[str, str], timeout_s: float, decide: Callable[[], Start]) -> Start | Failure:
        """Returns once all nodes are there what node 0 decides, or a Failure, the same on each, if a node is missing or
        has other facts than node 0. Raises TimeoutError if node 0 ends, and there what `decide` raises."""
        return decide()

    def watch(self, end: Callable[[Failure], NoReturn]) -> None:
        """From here on `end` is called, in a thread, when any node fails or is no longer heard of."""

    def finish(self, failure: Failure | None) -> Failure | None:
        """Takes what became of this node's ranks. Returns what became of the job, if `end` is not called before."""
        return failure


class JobOfSeveral(Job):
    def __init__(self, nodes: Nodes, timing: Timing):
        super().__init__(nodes, timing)
        self.state = threading.Condition()  # guards what follows, notified when it changes
        self.failure: Failure | None = None  # of this node, since failed_s
        self.failed_s = 0.0
        self.is_posted = False
        self.cause: Failure | None = None  # the job's first failure
        self.has_left = False

    def watch(self, end: Callable[[Failure], NoReturn]) -> None:
        def wait_for_cause() -> None:
            with self.state:
                while self.cause is None and not self.has_left:
                    self.state.wait(self.timing.beat_s / 4)
                    self._look_at_the_clock(time.monotonic())
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
            while not self.has_left:  # as a rule the watch ends the process first
                self.state.wait(self.timing.beat_s)
        return self.cause or failure

    def _beat(self) -> None:
        while not self.has_left:
            self._send(kind="beat")
            time.sleep(self.timing.beat_s)

    def _look_at_the_clock(self, now_s: float) -> None:
        """Posts what has become due; called with `state` held."""
        # What caused a consequence is posted by its own node, or is that node's loss: that comes first.
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
        """Makes it the cause, if it is the first one."""
        raise NotImplementedError

    def _leave(self, timeout_s: float) -> None:
        """To be called last: says what is to be said and waits until it is heard."""
        raise NotImplementedError


class Member:
    """Another node, as node 0 knows it."""

    def __init__(self, channel: Channel):
        self.channel = channel
        self.facts: dict[str, str] | None = None
        self.heard_s = time.monotonic()
        self.is_connected = True
        self.is_done = False


class Head(JobOfSeveral):
    """The job in node 0."""

    def __init__(self, nodes: Nodes, port: int, secret: bytes, timing: Timing):
        """Raises ValueError if it cannot listen at `port`."""
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

    def meet(self, facts: dict[str, str], timeout_s: float, decide: Callable[[], Start]) -> Start | Failure:
        failure = self._judge(facts, timeout_s)
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

    def _judge(self, facts: dict[str, str], timeout_s: float) -> Failure | None:
        """What node 0 has against the others."""
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
        """Takes a node in, or refuses it, and reads what it says until it leaves."""
        with contextlib.suppress(OSError, Stranger):
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
                if not self.have_met:  # it may be started again
                    del self.members[index]
                self.state.notify_all()

    def _send(self, **message: Any) -> None:
        with self.state:
            members = [member for member in self.members.values() if member.is_connected]
        for member in members:
            with contextlib.suppress(OSError):  # what it means when nothing reaches a node, the clock decides
                member.channel.send(message)

    def _look_at_the_clock(self, now_s: float) -> None:
        for index, member in self.members.items():
            if not member.is_done and now_s - member.heard_s > self.timing.lost_after_s:
                self._post(self._lost(index))
        super()._look_at_the_clock(now_s)

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


class Guest(JobOfSeveral):
    """The job in a node other than node 0."""

    def __init__(self, nodes: Nodes, port: int, secret: bytes, timeout_s: float, timing: Timing):
        """Raises TimeoutError if node 0 does not answer, ValueError if something else does."""
        super().__init__(nodes, timing)
        self.channel = connect(nodes, port, secret, timeout_s, timing)
        self.heard_s = time.monotonic()
        self.is_connected = True
        self.start: Start | None = None
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def meet(self, facts: dict[str, str], timeout_s: float, decide: Callable[[], Start]) -> Start | Failure:
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
        with contextlib.suppress(OSError, Stranger):
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
        with contextlib.suppress(OSError):  # what it means when nothing reaches node 0, the clock decides
            self.channel.send(message)

    def _look_at_the_clock(self, now_s: float) -> None:
        if now_s - self.heard_s > self.timing.lost_after_s:
            self.cause = self.cause or self._lost(0)
        super()._look_at_the_clock(now_s)

    def _post(self, failure: Failure) -> None:
        self._send(kind="failure", **dataclasses.asdict(failure))  # node 0 answers with the cause

    def _leave(self, timeout_s: float) -> None:
        self._send(kind="done")
        deadline_s = time.monotonic() + timeout_s
        with self.state:
            while self.is_connected and time.monotonic() < deadline_s:  # until node 0 has read it
                self.state.wait(0.1)
            self.has_left = True
        self.channel.close()


def open_job(nodes: Nodes, port: int, secret: bytes, timeout_s: float, timing: Timing = TIMING) -> Job:
    """This node's view of the job: node 0 listens at `port`, the others connect to it within `timeout_s`.

    Raises ValueError if the port is not node 0's to use, TimeoutError if node 0 does not come.
    """
    if len(nodes) == 1:
        return Job(nodes, timing)
    if nodes.index == 0:
        return Head(nodes, port, secret, timing)
    return Guest(nodes, port, secret, timeout_s, timing)
