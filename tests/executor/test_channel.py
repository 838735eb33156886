# SPDX-License-Identifier: Apache-2.0
"""Tests framing, authentication and limits on unauthenticated peers over real sockets."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from executor.launch.channel import (
    GREETING,
    MAX_BYTES,
    MAX_FIRST_BYTES,
    MAX_STRANGERS,
    Channel,
    Listener,
    ProtocolError,
    WrongSecret,
    greet,
    read,
)

ANSWER_S = 0.5


class Host:
    """A listener that records the first messages of authenticated nodes."""

    def __init__(self) -> None:
        self.joined: list[tuple[Channel, dict[str, Any]]] = []
        self.listener = Listener("127.0.0.1", 0, b"secret", lambda *joined: self.joined.append(joined), ANSWER_S)
        self.port = self.listener.socket.getsockname()[1]

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=5)

    def join(self, secret: bytes = b"secret") -> Channel:
        channel = greet(self.connect(), secret, False, 5)
        channel.send({"kind": "hello"})
        return channel

    def wait(self, condition: Any) -> None:
        deadline_s = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < deadline_s
            time.sleep(0.01)

    def serves_a_node(self) -> bool:
        count = len(self.joined)
        channel = self.join()
        self.wait(lambda: len(self.joined) == count + 1)
        self.joined[-1][0].send({"kind": "welcome"})
        return channel.receive(5) == {"kind": "welcome"}


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.listener.close()


def pair(first: bytes = b"secret", second: bytes = b"secret") -> tuple[Channel, Channel, socket.socket, socket.socket]:
    """Client and server channels after the handshake, and their sockets."""
    client, server = connected()
    found: dict[str, Channel] = {}
    thread = threading.Thread(target=lambda: found.update(server=greet(server, second, True, 5)))
    thread.start()
    found["client"] = greet(client, first, False, 5)
    thread.join()
    return found["client"], found["server"], client, server


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        return client, listener.accept()[0]


def frame_of(channel: Channel, message: dict[str, Any]) -> bytes:
    """The bytes of the channel's next frame."""
    ours, theirs = socket.socketpair()
    writer, channel.writer = channel.writer, ours
    channel.send(message)
    channel.writer = writer
    ours.close()
    return theirs.recv(1 << 20)


def test_messages_arrive_in_both_directions() -> None:
    client, server, *_ = pair()
    for number in range(3):
        client.send({"number": number})
        server.send({"number": -number, "text": "ü\x1b" * number})
        assert server.receive(1) == {"number": number}
        assert client.receive(1) == {"number": -number, "text": "ü\x1b" * number}


def test_large_message_arrives_and_a_larger_one_is_not_sent() -> None:
    client, server, *_ = pair()
    client.send({})
    assert server.receive(1) == {}
    text = "x" * (MAX_BYTES - 20)
    sender = threading.Thread(target=client.send, args=({"text": text}, 10))
    sender.start()
    assert server.receive(10) == {"text": text}
    sender.join()
    with pytest.raises(ValueError, match="longer than"):
        client.send({"text": "x" * MAX_BYTES})


def replayed(client: Channel, server: Channel, raw: socket.socket) -> None:
    frame = frame_of(client, {"a": 1})
    raw.sendall(frame)
    assert server.receive(1) == {"a": 1}
    raw.sendall(frame)


def left_out(client: Channel, server: Channel, raw: socket.socket) -> None:
    frame_of(client, {"a": 1})
    raw.sendall(frame_of(client, {"a": 2}))


def changed(client: Channel, server: Channel, raw: socket.socket) -> None:
    raw.sendall(frame_of(client, {"a": 1}).replace(b"1", b"2"))


def of_another_connection(client: Channel, server: Channel, raw: socket.socket) -> None:
    raw.sendall(frame_of(pair()[0], {"a": 1}))


def reflected(client: Channel, server: Channel, raw: socket.socket) -> None:
    raw.sendall(frame_of(server, {"a": 1}))


def of_another_secret(client: Channel, server: Channel, raw: socket.socket) -> None:
    client.key = b"another key"
    client.send({"a": 1})


def too_long(client: Channel, server: Channel, raw: socket.socket) -> None:
    raw.sendall((MAX_FIRST_BYTES + 1).to_bytes(4, "big") + bytes(100))


def empty(client: Channel, server: Channel, raw: socket.socket) -> None:
    raw.sendall(bytes(36))
    server.received = 1  # later it does not mean a wrong secret


def no_object(client: Channel, server: Channel, raw: socket.socket) -> None:
    client.send([1])  # type: ignore[arg-type]


def no_json(client: Channel, server: Channel, raw: socket.socket) -> None:
    forge(client, raw, b"{")


def nested_deeply(client: Channel, server: Channel, raw: socket.socket) -> None:
    forge(client, raw, b"[" * 50_000)


def forge(client: Channel, raw: socket.socket, body: bytes) -> None:
    raw.sendall(len(body).to_bytes(4, "big") + client._mac(b"client", 0, body) + body)


FORGERIES = [replayed, left_out, changed, of_another_connection, reflected, of_another_secret, too_long, empty]
FORGERIES += [no_object, no_json, nested_deeply]


@pytest.mark.parametrize("forgery", FORGERIES)
def test_what_is_not_the_next_message_is_refused(forgery: Any) -> None:
    client, server, raw, _ = pair()
    forgery(client, server, raw)
    with pytest.raises(ProtocolError):
        server.receive(1)


def test_node_with_another_secret_is_told_so(host: Host) -> None:
    with pytest.raises(WrongSecret):
        host.join(b"other").receive(5)
    assert host.serves_a_node() and len(host.joined) == 1


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET / HTTP/1.0\r\n\r\n",
        bytes(range(256)) * 300,
        GREETING,
        GREETING + bytes(32) + b"\xff" * 4,  # a length of 4 GiB
        GREETING + bytes(32) + (MAX_FIRST_BYTES).to_bytes(4, "big") + bytes(32) + b"{",
        GREETING + bytes(32) + b"\0\0\0\2" + bytes(32) + b"{}",
    ],
    ids=["silent", "http", "garbage", "greeting", "huge length", "promised more", "no MAC"],
)
def test_stranger_is_dropped_in_time(host: Host, said: bytes) -> None:
    with host.connect() as connection:
        connection.sendall(said)
        start_s = time.monotonic()
        try:
            while connection.recv(1 << 16):
                pass
        except ConnectionError:
            pass
        assert time.monotonic() - start_s < 3 * ANSWER_S
    assert host.serves_a_node() and len(host.joined) == 1


def test_slow_drip_is_dropped_in_time(host: Host) -> None:
    with host.connect() as connection:
        start_s = time.monotonic()
        with pytest.raises(ConnectionError):
            for byte in GREETING + bytes(32) + b"\0\0\1\0" + bytes(60):
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - start_s < 3 * ANSWER_S
    assert host.serves_a_node()


def test_flood_keeps_no_node_out_and_costs_little() -> None:
    host = Host()
    host.listener.timeout_s = 30  # only eviction frees a slot
    before, threads = psutil.Process().memory_info().rss, threading.active_count()
    header = GREETING + bytes(32) + MAX_FIRST_BYTES.to_bytes(4, "big") + bytes(32)
    crowd = []
    for _ in range(300):
        crowd.append(host.connect())
        crowd[-1].sendall(header + bytes(MAX_FIRST_BYTES - 1))
    assert host.serves_a_node()
    host.wait(lambda: len(host.listener.strangers) <= MAX_STRANGERS)
    assert threading.active_count() - threads <= MAX_STRANGERS + 2
    assert psutil.Process().memory_info().rss - before < 20 << 20
    host.listener.close()
    for connection in crowd:
        connection.close()


def test_crowd_of_one_address_shuts_out_itself_alone() -> None:
    host = Host()
    host.listener.timeout_s = 30
    slow = socket.create_connection(("127.0.0.1", host.port), source_address=("127.0.0.2", 0))
    crowd = [host.connect() for _ in range(2 * MAX_STRANGERS)]
    host.wait(lambda: len(host.listener.strangers) == MAX_STRANGERS)
    channel = greet(slow, b"secret", False, 5)
    channel.send({"kind": "hello"})
    host.wait(lambda: host.joined)
    host.listener.close()
    for connection in crowd:
        connection.close()


def test_greeting_of_something_else() -> None:
    for said in (b"SSH-2.0-OpenSSH_9.2p1 Debian", b"HTTP/1.1 400 Bad Request\r\n", b"\0" * 100):
        client, server = connected()
        server.sendall(said)
        with pytest.raises(ProtocolError):
            greet(client, b"", False, 5)


def test_end_while_waiting() -> None:
    client, server, *_ = pair()
    threading.Timer(0.1, client.close).start()
    with pytest.raises(OSError):
        server.receive(5)


def test_read_keeps_its_deadline() -> None:
    client, server = connected()
    client.sendall(b"ab")
    with pytest.raises(TimeoutError):
        read(server, 3, time.monotonic() + 0.1)


def test_frames_show_no_secret() -> None:
    client, *_ = pair()
    frame = frame_of(client, {"a": 1})
    assert frame[:4] == (8).to_bytes(4, "big") and json.loads(frame[36:]) == {"a": 1}
    assert b"secret" not in frame and client.key not in frame
