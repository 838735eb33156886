# SPDX-License-Identifier: Apache-2.0
"""Tests the address of the ranks' store and root-cause detection for failed ranks."""

import socket
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from executor.launch.ranks import first_failure, open_store, read_report


def listening_at(port: int) -> list[str]:
    return [
        entry.laddr.ip
        for entry in psutil.Process().net_connections("tcp")
        if entry.status == psutil.CONN_LISTEN and entry.laddr.port == port
    ]


def test_store_listens_at_its_own_address_alone() -> None:
    with socket.create_server(("127.0.0.3", 0)) as free:
        port = free.getsockname()[1]
    store = open_store("127.0.0.3", port, 5)
    store.set("a", "b")
    assert store.get("a") == b"b" and store.port == port
    assert listening_at(port) == ["127.0.0.3"]


def test_store_takes_the_next_free_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert port < open_store("127.0.0.1", port, 5).port < port + 100


def test_store_takes_any_port_behind_the_last() -> None:
    with socket.socket() as last:
        last.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        last.bind(("127.0.0.4", 65535))
        last.listen()
        assert 0 < open_store("127.0.0.4", 65535, 5).port < 65535
    assert 0 < open_store("127.0.0.4", 65536, 5).port < 65536


def test_store_cannot_listen() -> None:
    with pytest.raises(ValueError, match="IPs: cannot listen on 192.0.2.1: Cannot assign requested address$"):
        open_store("192.0.2.1", 29500, 5)


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


def test_report_of_a_rank_is_read_strictly() -> None:
    message, exit_code, is_consequence = read_report({"message": "\x1b[2J\n" + "x" * 5000, "exit_code": 2})
    assert message.startswith(r"\x1b[2J\nxxx") and len(message) == 1000 and (exit_code, is_consequence) == (2, False)
    for report in ({"exit_code": 0, "message": "a"}, {"exit_code": 77, "message": "a"}, {"message": {}}, [], None):
        assert read_report(report) is None


UNPICKLING = ("gather_object", "broadcast_object", "scatter_object", "send_object", "recv_object")
UNPICKLING += ("import pickle", "pickle.load", "torch.load", "import marshal", "import shelve")


@pytest.mark.parametrize("word", UNPICKLING)
def test_nothing_from_other_processes_is_unpickled(word: str) -> None:
    root = Path(__file__).resolve().parents[2]
    files = [file for room in ("ops", "models", "executor") for file in (root / room).rglob("*.py")]
    assert len(files) > 50 and not [file for file in files if word in file.read_text(encoding="utf-8")]
