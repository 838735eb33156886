# SPDX-License-Identifier: Apache-2.0
"""Tests rendezvous and failure propagation, with threads as launchers, and other programs at node 0's port."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from executor.launch.channel import Channel, greet
from executor.launch.cluster import Coordinator, Follower, open_job
from executor.launch.messages import Failure, Start, clean
from executor.launch.nodes import Nodes, Timing

ADDRESSES = ("127.0.0.1", "127.0.0.2")
TWO_NODES = [Nodes(addresses=ADDRESSES, index=index) for index in range(2)]
FAST = Timing(beat_s=0.1, lost_after_s=2, answer_s=0.5, strange_s=0.8)
SECRET = b"secret"
START = Start(port=29501, run_name="20261130/142233")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def wait_for(condition: Callable[[], Any], timeout_s: float = 5) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


class Pair:
    """Two nodes after rendezvous, with failure detection; `ended` collects the outcome of each."""

    def __init__(self, timing: Timing = FAST):
        port = free_port()
        self.head = Coordinator(TWO_NODES[0], port, SECRET, timing)
        self.guest = Follower(TWO_NODES[1], port, SECRET, 5, timing)
        self.ended: dict[int, Failure] = {}
        with ThreadPoolExecutor(2) as pool:
            met = pool.map(lambda job: job.rendezvous({"a": "1"}, 5, lambda: START), (self.head, self.guest))
        assert list(met) == [START, START]
        for index, job in enumerate((self.head, self.guest)):
            job.watch(lambda failure, index=index: self.ended.update({index: failure}))

    def finish(self, index: int, failure: Failure | None) -> None:
        """Runs a launcher's `finish` in a thread."""
        job = (self.head, self.guest)[index]
        threading.Thread(target=job.finish, args=(failure,), daemon=True).start()

    def wait_for_end(self, timeout_s: float = 5) -> list[Failure]:
        wait_for(lambda: len(self.ended) == 2, timeout_s)
        return [self.ended[0], self.ended[1]]


@pytest.fixture
def two() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.head._leave(0)
    pair.guest._leave(0)


def both_meet(facts: list[dict[str, str]], nodes: list[Nodes] = TWO_NODES, secrets: tuple[bytes, bytes] = (SECRET,) * 2,
              decide: Callable[[], Start] = lambda: START) -> list[Start | Failure | Exception]:  # fmt: skip
    """Returns the rendezvous outcome of each node."""
    port = free_port()

    def one(index: int) -> Start | Failure | Exception:
        try:
            return open_job(nodes[index], port, secrets[index], 2, FAST).rendezvous(facts[index], 2, decide)
        except (ValueError, TimeoutError) as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, range(2)))


def test_one_node_has_nobody_to_meet() -> None:
    job = open_job(Nodes(addresses=ADDRESSES[:1], index=0), 1, b"", 0, FAST)
    threads = threading.active_count()
    assert job.rendezvous({}, 0, lambda: START) == START
    job.watch(lambda failure: pytest.fail("nobody else can fail"))
    assert job.finish(None) is None and job.finish(Failure(message="a")) == Failure(message="a")
    assert threading.active_count() == threads


def test_several_nodes_need_the_port_itself() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ValueError, match=rf"^MASTER_PORT: node 0 \(127.0.0.1\) cannot listen on port {port}, "):
            open_job(TWO_NODES[0], port, SECRET, 5)


def test_node_0_listens_at_its_own_address_alone() -> None:
    head = Coordinator(TWO_NODES[0], free_port(), SECRET, FAST)
    address, port = head.listener.socket.getsockname()
    assert address == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port))
    head._leave(0)


def test_node_0_does_not_come() -> None:
    port = free_port()
    with pytest.raises(TimeoutError, match=rf"node 0 \(127.0.0.1\) did not answer on port {port} within 0.3 s"):
        open_job(TWO_NODES[1], port, SECRET, 0.3, FAST)


def test_node_1_does_not_come() -> None:
    failure = Coordinator(TWO_NODES[0], free_port(), SECRET, FAST).rendezvous({}, 0.3, lambda: START)
    assert failure == Failure(message="node 1 (127.0.0.2) did not come within 0.3 s: start infer.sh there too")


def test_nodes_that_agree() -> None:
    assert both_meet([{"a": "1"}, {"a": "1"}]) == [START, START]
    assert both_meet([{}, {}], secrets=(b"", b"")) == [START, START]  # without a secret on both sides


@pytest.mark.parametrize(
    ("theirs", "named"),
    [
        ({"a": "1", "b": "3"}, "b must be the same on all nodes: 3 on node 1 (127.0.0.2), 2 on node 0"),
        ({"a": "1"}, "b must be the same on all nodes: absent on node 1 (127.0.0.2), 2 on node 0"),
        ({"a": "1", "b": "2", "c": "3"}, "c must be the same on all nodes: 3 on node 1 (127.0.0.2), absent on node 0"),
        ({"a": "1", "b": "\x1b\n"}, r"b must be the same on all nodes: \x1b\n on node 1 (127.0.0.2), 2 on node 0"),
    ],
)
def test_nodes_that_differ(theirs: dict[str, str], named: str) -> None:
    assert both_meet([{"a": "1", "b": "2"}, theirs]) == [Failure(message=named, exit_code=2)] * 2


def test_node_0_cannot_make_what_the_job_needs() -> None:
    def decide() -> Start:
        raise ValueError("output_dir: no")

    refused, told = both_meet([{}, {}], decide=decide)
    assert str(refused) == "output_dir: no"
    assert told == Failure(message="node 0 (127.0.0.1): output_dir: no", exit_code=2)


def test_node_of_another_job() -> None:
    stranger = Nodes(addresses=("127.0.0.1", "127.0.0.9"), index=1)
    waiting, refused = both_meet([{}, {}], [TWO_NODES[0], stranger])
    assert "node 1 (127.0.0.2) did not come" in waiting.message
    assert isinstance(refused, ValueError) and "its IPs are 127.0.0.1 127.0.0.2, here they are" in str(refused)


def test_node_with_another_secret() -> None:
    waiting, refused = both_meet([{}, {}], secrets=(SECRET, b""))
    assert "node 1 (127.0.0.2) did not come" in waiting.message
    assert isinstance(refused, ValueError) and "has another JOB_SECRET" in str(refused)


def test_node_that_was_started_before(two: Pair) -> None:
    port = two.head.listener.socket.getsockname()[1]
    with pytest.raises(ValueError, match="or was started before"):
        open_job(TWO_NODES[1], port, SECRET, 1, FAST)
    assert not two.ended


def test_node_that_left_before_all_had_met_may_come_again() -> None:
    port = free_port()
    head = Coordinator(TWO_NODES[0], port, SECRET, FAST)
    Follower(TWO_NODES[1], port, SECRET, 1, FAST).channel.close()
    wait_for(lambda: not head.members)
    guest = Follower(TWO_NODES[1], port, SECRET, 1, FAST)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda job: job.rendezvous({}, 2, lambda: START), (head, guest))) == [START, START]


def test_node_0_ends_before_all_have_met() -> None:
    port = free_port()
    head = Coordinator(TWO_NODES[0], port, SECRET, FAST)
    guest = Follower(TWO_NODES[1], port, SECRET, 1, FAST)
    threading.Timer(0.2, lambda: head.members[1].channel.close()).start()
    with pytest.raises(TimeoutError, match=r"node 0 \(127.0.0.1\) ended before all nodes had met"):
        guest.rendezvous({}, 5, lambda: START)


SERVICES: dict[str, Callable[[socket.socket], None]] = {
    "silent": lambda connection: time.sleep(5),
    "closing": lambda connection: None,
    "http": lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"),
    "ssh": lambda connection: (connection.sendall(b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n"), time.sleep(5)),
    "garbage": lambda connection: connection.sendall(bytes(range(256)) * 100),
    "drip": lambda connection: [(connection.sendall(b"m"), time.sleep(0.1)) for _ in range(50)],
    "echo": lambda connection: [connection.sendall(connection.recv(4096)) for _ in range(9)],
}


def serve(listener: socket.socket, service: Callable[[socket.socket], None]) -> None:
    def talk(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            service(connection)

    with contextlib.suppress(OSError):
        while True:
            threading.Thread(target=talk, args=(listener.accept()[0],), daemon=True).start()


@pytest.mark.parametrize("service", SERVICES)
def test_foreign_service_at_the_port(service: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener, SERVICES[service]), daemon=True).start()
        port, start_s = listener.getsockname()[1], time.monotonic()
        with pytest.raises(ValueError, match=rf"^MASTER_PORT: what \w+ at port {port} of node 0 \(127.0.0.1\) is not"):
            open_job(TWO_NODES[1], port, SECRET, 60, FAST)
        assert time.monotonic() - start_s < 4


def test_failure_of_a_node_ends_both(two: Pair) -> None:
    failure = Failure(message="rank 3 on node 1 (127.0.0.2): killed by SIGKILL")
    two.finish(1, failure)
    assert two.wait_for_end() == [failure] * 2


def test_first_failure_is_the_jobs(two: Pair) -> None:
    first, second = Failure(message="first", exit_code=2), Failure(message="second")
    two.finish(0, first)
    two.finish(1, second)
    ended = two.wait_for_end()
    assert ended[0] == ended[1] and ended[0] in (first, second)


def test_consequence_waits_for_its_cause(two: Pair) -> None:
    cause = Failure(message="cause")
    two.finish(0, Failure(message="peer is gone", is_consequence=True))
    time.sleep(0.5)
    assert not two.ended
    two.finish(1, cause)
    assert two.wait_for_end() == [cause] * 2


def test_consequence_without_a_cause_is_the_cause_at_last(two: Pair) -> None:
    failure = Failure(message="peer is gone", is_consequence=True)
    two.finish(1, failure)
    assert two.wait_for_end(10) == [failure] * 2


@pytest.mark.parametrize("silent", [0, 1])
def test_node_that_is_no_longer_heard_of(two: Pair, silent: int) -> None:
    job, other = (two.head, two.guest)[silent], 1 - silent
    job._send = lambda **message: None  # like a network partition
    wait_for(lambda: other in two.ended, 10)
    lost = f"node {silent} ({ADDRESSES[silent]}) is lost: nothing was heard of it for 2 s"
    assert two.ended[other].message == lost


def test_nodes_whose_ranks_ended_well(two: Pair) -> None:
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda job: job.finish(None), (two.guest, two.head))) == [None, None]
    time.sleep(0.3)
    assert not two.ended


def test_node_that_has_left_is_not_lost(two: Pair) -> None:
    assert two.guest.finish(None) is None
    time.sleep(2.5)  # longer than lost_after_s
    assert not two.ended and two.head.finish(None) is None


def say(port: int, message: dict[str, Any], secret: bytes = SECRET, index: int = 1) -> Channel:
    """A node that sends a valid hello, then an arbitrary message."""
    channel = greet(socket.create_connection(("127.0.0.1", port)), secret, False, 5)
    channel.send({"kind": "hello", "index": index, "ips": " ".join(ADDRESSES)})
    assert channel.receive(5) == {"kind": "welcome"}
    channel.send(message)
    return channel


WRONG_MESSAGES = [
    {"kind": "failure", "message": "a", "exit_code": 0, "is_consequence": False},
    {"kind": "failure", "message": "a", "exit_code": True, "is_consequence": False},
    {"kind": "failure", "message": "a", "exit_code": 1.0, "is_consequence": False},
    {"kind": "failure", "message": "a", "exit_code": -1, "is_consequence": False},
    {"kind": "failure", "message": 1, "exit_code": 1, "is_consequence": False},
    {"kind": "failure", "message": "a", "exit_code": 1, "is_consequence": 1},
    {"kind": "failure", "message": "a", "exit_code": 1},
    {"kind": "failure", "message": "a", "exit_code": 1, "is_consequence": False, "more": 1},
    {"kind": "end", "message": "a", "exit_code": 1, "is_consequence": False},
    {"kind": "facts", "facts": {"a": 1}},
    {"kind": "facts", "facts": ["a"]},
    {"kind": "start", "port": 1, "run_name": ""},
    {"kind": ["beat"]},
    {"kind": "cause"},
    {},
]


@pytest.mark.parametrize("message", WRONG_MESSAGES, ids=str)
def test_node_0_takes_no_other_message(message: dict[str, Any]) -> None:
    head = Coordinator(TWO_NODES[0], free_port(), SECRET, FAST)
    channel = say(head.listener.socket.getsockname()[1], message)
    with pytest.raises(OSError):
        while channel.receive(2)["kind"] == "beat":
            pass
    assert head.cause is None and not head.members
    head._leave(0)


class FalseCoordinator:
    """A server at node 0's port that knows the secret and sends arbitrary messages."""

    def __init__(self, *messages: dict[str, Any]):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.talk, args=(messages,), daemon=True).start()

    def talk(self, messages: tuple[dict[str, Any], ...]) -> None:
        channel = greet(self.listener.accept()[0], SECRET, True, 5)
        channel.receive(5)
        for message in ({"kind": "welcome"}, *messages):
            channel.send(message)
        with contextlib.suppress(OSError):
            while True:
                channel.receive(5)


@pytest.mark.parametrize(
    "message",
    [
        {"kind": "end", "message": "all is well", "exit_code": 0, "is_consequence": False},
        {"kind": "start", "port": 0, "run_name": ""},
        {"kind": "start", "port": 65536, "run_name": ""},
        {"kind": "start", "port": "1", "run_name": ""},
        {"kind": "start", "port": 1},
        {"kind": "cause", "message": "a", "exit_code": 1, "is_consequence": False},
    ],
    ids=str,
)
def test_other_nodes_take_no_other_message(message: dict[str, Any]) -> None:
    guest = Follower(TWO_NODES[1], FalseCoordinator(message).port, SECRET, 1, FAST)
    with pytest.raises(TimeoutError, match="ended before all nodes had met"):
        guest.rendezvous({}, 1, lambda: START)


def test_nobody_ends_well_on_anothers_word(two: Pair) -> None:
    two.head._send(kind="end", message="all is well", exit_code=0, is_consequence=False)
    wait_for(lambda: 1 in two.ended, 10)  # node 0 is considered lost
    assert two.ended[1].exit_code == 1


def test_text_of_others_is_bounded_and_has_no_control_characters(two: Pair) -> None:
    two.finish(1, Failure(message="\x1b]0;title\x07\r\nerror: \u202e\x9b" + "x" * 100_000))
    for failure in two.wait_for_end():
        assert failure.message.isprintable() and len(failure.message) <= 1000
        assert failure.message.startswith(r"\x1b]0;title\x07\r\nerror: \u202e\x9b")


def test_clean() -> None:
    assert clean("größe 大 x", 100) == "größe 大 x" and clean("\udcff\x00", 100) == r"\udcff\x00"
    assert clean("\x1b" * 10, 7) == r"\x1b\x1"


def test_strangers_do_not_disturb_nodes_that_work(two: Pair) -> None:
    port = two.head.listener.socket.getsockname()[1]
    crowd = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
    for connection in crowd[::2]:
        with contextlib.suppress(OSError):
            connection.sendall(b"\xff" * 5000)
    time.sleep(1)
    assert not two.ended
    two.finish(0, Failure(message="a"))
    assert two.wait_for_end() == [Failure(message="a")] * 2
