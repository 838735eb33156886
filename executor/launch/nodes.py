# SPDX-License-Identifier: Apache-2.0
"""Node addresses, heartbeat and timeout settings, and the connection to node 0."""

import socket
import time
from dataclasses import dataclass

from executor.launch.channel import Channel, ProtocolError, WrongSecret, greet
from executor.launch.messages import MAX_FACT, clean, parse


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """Addresses of all nodes in node-rank order, and the index of this node."""

    addresses: tuple[str, ...]
    index: int

    def __len__(self) -> int:
        return len(self.addresses)

    def name(self, index: int) -> str:
        return f"node {index} ({self.addresses[index]})"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Timeouts and heartbeat interval, in seconds. The launcher sends the heartbeats, not the ranks: a rank that holds
    the GIL for minutes (loading, compiling) is not considered lost, and the launcher sees at once when a rank dies."""

    beat_s: float = 1.0
    lost_after_s: float = 15.0  # several times the delay of a heartbeat on an overloaded machine
    answer_s: float = 5.0  # timeout of the handshake
    strange_s: float = 20.0  # retry timeout while something other than this job answers on node 0's port

    @property
    def leave_s(self) -> float:
        """Timeout in seconds for the other nodes to receive the job's outcome from node 0."""
        return 3 * self.beat_s


TIMING = Timing()


def connect(nodes: Nodes, port: int, secret: bytes, timeout_s: float, timing: Timing) -> Channel:
    """Connects to node 0, retrying until it admits this node. Raises ValueError and TimeoutError as `open_job`."""
    deadline_s, there = time.monotonic() + timeout_s, f"port {port} of {nodes.name(0)}"
    strange_until_s: float | None = None  # deadline of these retries
    while True:
        connection = None
        try:
            connection = socket.create_connection((nodes.addresses[0], port), timeout=timing.answer_s)
            return introduce(connection, nodes, secret, timing)
        except ProtocolError as error:
            known = "has another JOB_SECRET" if isinstance(error, WrongSecret) else "is not this job"
            raise ValueError(
                f"MASTER_PORT: what answers at {there} {known}: give all nodes the same JOB_SECRET, and "
                "each job a port of its own"
            ) from None
        except OSError as error:
            reason = error.strerror or str(error)
        now_s = time.monotonic()
        if connection is None:
            strange_until_s = None
        else:
            connection.close()
            strange_until_s = min(strange_until_s or now_s + timing.strange_s, deadline_s)
        if strange_until_s and now_s >= strange_until_s:
            raise ValueError(f"MASTER_PORT: what listens at {there} is not this job ({reason}): give each its own port")
        if now_s > deadline_s:
            raise TimeoutError(
                f"{nodes.name(0)} did not answer on port {port} within {timeout_s:g} s ({reason}): start infer.sh "
                "there too, and check for a firewall between them"
            )
        time.sleep(0.2)


def introduce(connection: socket.socket, nodes: Nodes, secret: bytes, timing: Timing) -> Channel:
    """Performs the handshake with node 0 and returns the channel.

    Raises ValueError if node 0 refuses this node, ProtocolError if the peer is not node 0, OSError if it
    does not answer.
    """
    own_ips = " ".join(nodes.addresses)
    channel = greet(connection, secret, False, timing.answer_s)
    channel.send({"kind": "hello", "index": nodes.index, "ips": own_ips})
    answer = parse(channel.receive(timing.answer_s), "welcome", "refused")
    if answer["kind"] == "welcome":
        return channel
    channel.close()
    raise ValueError(
        f"MASTER_PORT: the job at that port of {nodes.name(0)} is not this one, or was started before: its IPs are "
        f"{clean(answer['ips'], MAX_FACT)}, here they are {own_ips}; give all nodes the same IPs, and each job a port"
    )
