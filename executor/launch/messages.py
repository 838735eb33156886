# SPDX-License-Identifier: Apache-2.0
"""Message schema between the launchers of a job's nodes, with strict validation."""

from dataclasses import dataclass
from typing import Any

from executor.launch.channel import ProtocolError

MAX_TEXT = 1000  # maximum characters of a message
MAX_FACT = 120  # maximum characters of a fact (a setting compared between nodes) quoted in a message

FAILURE = {"message": str, "exit_code": int, "is_consequence": bool}
# kind of a message -> the types of its fields
FIELDS: dict[str, dict[str, type]] = {
    "hello": {"index": int, "ips": str},
    "welcome": {},
    "refused": {"ips": str},
    "facts": {"facts": dict},
    "start": {"port": int, "run_name": str},
    "beat": {},
    "failure": FAILURE,  # failure of the sending node
    "end": FAILURE,  # root cause of the job's failure, sent by node 0
    "done": {},
}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Failure that ends the job; the message names rank and node. is_consequence: another rank may be the cause."""

    message: str
    exit_code: int = 1
    is_consequence: bool = False


@dataclass(frozen=True, kw_only=True)
class Start:
    """Start parameters chosen by node 0: port of the ranks' TCPStore and name of the result folder."""

    port: int
    run_name: str = ""  # empty: no result folder


def parse(message: dict[str, Any], *kinds: str) -> dict[str, Any]:
    """Validates a message: one of `kinds`, with exactly its fields and types. Raises ProtocolError otherwise."""
    kind = message.get("kind")
    if not isinstance(kind, str) or kind not in kinds or message.keys() != {"kind", *FIELDS[kind]}:
        raise ProtocolError
    if any(type(message[name]) is not expected for name, expected in FIELDS[kind].items()):
        raise ProtocolError
    return message


def parse_failure(message: dict[str, Any]) -> Failure:
    if message["exit_code"] not in (1, 2):
        raise ProtocolError
    return Failure(
        message=clean(message["message"]), exit_code=message["exit_code"], is_consequence=message["is_consequence"]
    )


def parse_facts(message: dict[str, Any]) -> dict[str, str]:
    if any(type(value) is not str for value in message["facts"].values()):
        raise ProtocolError
    return message["facts"]


def parse_start(message: dict[str, Any]) -> Start:
    if not 0 < message["port"] < 65536:
        raise ProtocolError
    return Start(port=message["port"], run_name=clean(message["run_name"], MAX_FACT))


def clean(text: str, limit: int = MAX_TEXT) -> str:
    """Sanitises text from another process: control characters escaped, truncated to `limit` characters."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text[:limit]
    )[:limit]
