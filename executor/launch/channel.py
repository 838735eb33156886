# SPDX-License-Identifier: Apache-2.0
"""Authenticated message channel over TCP between the launchers of a job's nodes.

Handshake: each side sends a greeting and a nonce. All later data is framed: body length (4 bytes), HMAC-SHA256
(32 bytes), body (a JSON object). The connection key is derived from the job's secret and both nonces; the MAC covers
the direction and sequence number of a frame, so frames cannot be replayed, reflected or used on another connection.
An unauthenticated peer can occupy one thread for a few seconds and at most `MAX_FIRST_BYTES` of memory.
"""

import contextlib
import hmac
import json
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

GREETING = b"moe-job-nodes/1\n"
NONCE_BYTES = 32
LENGTH_BYTES = 4
MAC_BYTES = 32
MAX_BYTES = 4 << 20  # maximum body size
MAX_FIRST_BYTES = 64 << 10  # maximum size of the first body, which authenticates its sender
WRONG_MAC = bytes(LENGTH_BYTES + MAC_BYTES)  # reply to a first frame with a wrong MAC
MAX_STRANGERS = 32  # concurrent unauthenticated connections
SEND_S = 2.0


class ProtocolError(Exception):
    """Unauthenticated peer: it does not speak this protocol or does not know the job's secret."""


class WrongSecret(ProtocolError):
    """Secret mismatch, as reported by the peer."""


class Channel:
    """One end of a connection. `send` is thread-safe; only one thread may call `receive`."""

    def __init__(self, connection: socket.socket, key: bytes, from_server: bool):
        self.connection = connection
        self.writer = connection.dup()  # a second socket object, so that sends and receives have separate timeouts
        self.key = key
        self.labels = (b"server", b"client") if from_server else (b"client", b"server")  # in the MACs: sent, received
        self.sent = self.received = 0
        self.lock = threading.Lock()

    def send(self, message: dict[str, Any], timeout_s: float = SEND_S) -> None:
        """Sends a message. Raises OSError and closes the connection on timeout."""
        body = json.dumps(message).encode()
        if len(body) > MAX_BYTES:
            raise ValueError(f"a message of {len(body)} bytes is longer than the {MAX_BYTES} that nodes take")
        with self.lock:
            frame = len(body).to_bytes(LENGTH_BYTES, "big") + self._mac(self.labels[0], self.sent, body) + body
            self.sent += 1
            try:
                self.writer.settimeout(timeout_s)
                self.writer.sendall(frame)
            except OSError:  # the frame may be partly sent: the stream is unusable
                self.close()
                raise

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """Receives the next message. Raises OSError on timeout or a closed connection, ProtocolError on an invalid
        frame, WrongSecret if the peer reports that the secrets differ."""
        deadline_s = time.monotonic() + timeout_s
        header = read(self.connection, LENGTH_BYTES + MAC_BYTES, deadline_s)
        if header == WRONG_MAC and self.received == 0:
            raise WrongSecret
        length = int.from_bytes(header[:LENGTH_BYTES], "big")
        if not 0 < length <= (MAX_BYTES if self.received else MAX_FIRST_BYTES):
            raise ProtocolError
        body = read(self.connection, length, deadline_s)
        if not hmac.compare_digest(header[LENGTH_BYTES:], self._mac(self.labels[1], self.received, body)):
            raise ProtocolError
        self.received += 1
        try:
            message = json.loads(body)
        except (ValueError, RecursionError):
            raise ProtocolError from None
        if not isinstance(message, dict):
            raise ProtocolError
        return message

    def close(self) -> None:
        """Closes the connection; a blocked `receive` raises OSError."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
        self.writer.close()

    def _mac(self, label: bytes, number: int, body: bytes) -> bytes:
        return hmac.digest(self.key, label + number.to_bytes(8, "big") + body, "sha256")


def read(connection: socket.socket, count: int, deadline_s: float) -> bytes:
    """Reads exactly `count` bytes. Raises TimeoutError at the deadline, ConnectionError at end of stream."""
    data = bytearray()
    while len(data) < count:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("it says nothing" if not data else "it says too little")
        connection.settimeout(left_s)
        part = connection.recv(min(count - len(data), 1 << 16))
        if not part:
            raise ConnectionError("it closes the connection")
        data += part
    return bytes(data)


def greet(connection: socket.socket, secret: bytes, from_server: bool, timeout_s: float) -> Channel:
    """Performs the handshake, greetings and nonces; the MAC of the first frame then proves whether the secrets match.

    Raises ProtocolError on an unexpected greeting, OSError on timeout.
    """
    deadline_s = time.monotonic() + timeout_s
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.settimeout(timeout_s)
    own = secrets.token_bytes(NONCE_BYTES)
    if not from_server:
        connection.sendall(GREETING + own)
    if read(connection, len(GREETING), deadline_s) != GREETING:
        raise ProtocolError
    theirs = read(connection, NONCE_BYTES, deadline_s)
    if from_server:
        connection.sendall(GREETING + own)
    nonces = theirs + own if from_server else own + theirs
    return Channel(connection, hmac.digest(secret, GREETING + nonces, "sha256"), from_server)


class Listener:
    """Accepts connections at one address and passes on those whose first message is authenticated.

    join(channel, message): called for each of these, in a thread per connection.
    """

    def __init__(
        self,
        address: str,
        port: int,
        secret: bytes,
        join: Callable[[Channel, dict[str, Any]], None],
        timeout_s: float,
    ):
        """Binds the port; raises OSError if it is in use. timeout_s: for the greeting and the first message."""
        self.secret = secret
        self.join = join
        self.timeout_s = timeout_s
        self.strangers: dict[socket.socket, threading.Thread] = {}  # in order of arrival
        self.lock = threading.Lock()
        self.socket = socket.create_server((address, port), backlog=128)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # unblocks accept()
        self.socket.close()

    def _accept(self) -> None:
        while self.socket.fileno() != -1:
            try:
                connection, _ = self.socket.accept()
            except OSError:  # connection aborted by the peer, or too many open files
                time.sleep(0.05)
                continue
            thread = threading.Thread(target=self._welcome, args=(connection,), daemon=True)
            with self.lock:
                self.strangers[connection] = thread
            thread.start()
            with self.lock:
                evicted = self._evict() if len(self.strangers) > MAX_STRANGERS else None
            if evicted is not None:
                evicted.join(self.timeout_s)

    def _evict(self) -> threading.Thread:
        """Closes the oldest connection of the address with the most connections, so that it cannot block others."""
        addresses = {connection: peer_address(connection) for connection in self.strangers}
        crowded = Counter(addresses.values()).most_common(1)[0][0]
        connection = next(connection for connection, address in addresses.items() if address == crowded)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        return self.strangers[connection]

    def _welcome(self, connection: socket.socket) -> None:
        channel = message = None
        with contextlib.suppress(OSError, ProtocolError):
            channel = greet(connection, self.secret, True, self.timeout_s)
            try:
                message = channel.receive(self.timeout_s)
            except ProtocolError:
                connection.sendall(WRONG_MAC)
        with self.lock:
            del self.strangers[connection]
        if channel is None:
            connection.close()
        elif message is None:
            channel.close()
        else:
            self.join(channel, message)


def peer_address(connection: socket.socket) -> str:
    try:
        return connection.getpeername()[0]
    except OSError:  # peer disconnected
        return ""
