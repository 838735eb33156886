# SPDX-License-Identifier: Apache-2.0
"""How nodes meet, with threads in the place of nodes, and what a launcher makes of ranks that failed."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from ops.cluster import Failure, Nodes, first_failure, meet, open_store

ADDRESSES = ("127.0.0.1", "127.0.0.2")
ONE_NODE = Nodes(addresses=ADDRESSES[:1], index=0)
TWO_NODES = [Nodes(addresses=ADDRESSES, index=index) for index in range(2)]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_one_node_takes_the_next_free_port(listener: socket.socket, capsys: pytest.CaptureFixture) -> None:
    port = listener.getsockname()[1]
    taken = open_store(ONE_NODE, port, 5).port
    assert port < taken < port + 100
    assert capsys.readouterr().err == f"port {port} is in use, this job takes {taken}\n"


def test_several_nodes_need_the_port_itself(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    with pytest.raises(ValueError, match=rf"MASTER_PORT: node 0 \(127.0.0.1\) cannot listen on port {port}, choose"):
        open_store(TWO_NODES[0], port, 5)


def test_node_0_does_not_come() -> None:
    port = free_port()
    with pytest.raises(TimeoutError, match=rf"node 0 \(127.0.0.1\) did not answer on port {port} within 0.3 s"):
        open_store(TWO_NODES[1], port, 0.3)


def test_node_1_does_not_come() -> None:
    failure = meet(open_store(TWO_NODES[0], free_port(), 0.3), TWO_NODES[0], {}, 0.3)
    assert failure == Failure(message="node 1 (127.0.0.2) did not come within 0.3 s: start infer.sh there too")


def both_meet(nodes: list[Nodes], facts: list[dict[str, str]]) -> list[Failure | None | Exception]:
    """What `meet` gives on each node."""
    port, stores = free_port(), []

    def one(index: int) -> Failure | None | Exception:
        try:
            store = open_store(nodes[index], port, 1)
            stores.append(store)  # node 0's has to outlive what node 1 reads from it
            return meet(store, nodes[index], facts[index], 1)
        except (ValueError, TimeoutError) as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, range(2)))


def test_nodes_that_agree() -> None:
    assert both_meet(TWO_NODES, [{"a": "1"}, {"a": "1"}]) == [None, None]


@pytest.mark.parametrize(
    ("theirs", "named"),
    [
        ({"a": "1", "b": "3"}, "b must be the same on all nodes: 3 on node 1 (127.0.0.2), 2 on node 0"),
        ({"a": "1"}, "b must be the same on all nodes: absent on node 1 (127.0.0.2), 2 on node 0"),
        ({"a": "1", "b": "2", "c": "3"}, "c must be the same on all nodes: 3 on node 1 (127.0.0.2), absent on node 0"),
    ],
)
def test_nodes_that_differ(theirs: dict[str, str], named: str) -> None:
    assert both_meet(TWO_NODES, [{"a": "1", "b": "2"}, theirs]) == [Failure(message=named, exit_code=2)] * 2


def test_node_of_another_job() -> None:
    stranger = Nodes(addresses=("127.0.0.1", "127.0.0.9"), index=1)
    waiting, refused = both_meet([TWO_NODES[0], stranger], [{}, {}])
    assert "node 1 (127.0.0.2) did not come" in waiting.message
    assert isinstance(refused, ValueError) and "its IPs are 127.0.0.1 127.0.0.2, here they are" in str(refused)


def failed(code: int, signal_name: str = "", **report) -> SimpleNamespace:
    return SimpleNamespace(exitcode=code, error_file_data=report, signal_name=lambda: signal_name)


def test_first_failure_is_the_cause() -> None:
    raised = failed(1, message="RuntimeError: x", exit_code=1, is_consequence=False)
    disconnected = failed(1, message="RuntimeError: peer", exit_code=1, is_consequence=True)
    killed, ended, aborted = failed(-9, "SIGKILL"), failed(-15, "SIGTERM"), failed(-6, "SIGABRT")
    for failures, message in [
        ({0: disconnected, 1: ended, 2: raised}, "rank 2 on node 0 (a): RuntimeError: x"),
        ({0: disconnected, 1: aborted, 2: killed}, "rank 2 on node 0 (a): killed by SIGKILL (out of memory?)"),
        ({1: ended, 0: disconnected}, "rank 1 on node 0 (a): killed by SIGTERM"),
        ({0: failed(3)}, "rank 0 on node 0 (a): ended with exit code 3"),
    ]:
        assert first_failure("node 0 (a)", failures).message == message
