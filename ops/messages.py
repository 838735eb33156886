# SPDX-License-Identifier: Apache-2.0
"""What the launchers of a job's nodes tell each other, and how strictly it is read."""

from dataclasses import dataclass
from typing import Any

from ops.channel import Stranger

MAX_TEXT = 1000  # characters of a message
MAX_FACT = 120  # characters of a fact that is quoted in one

FAILURE = {"message": str, "exit_code": int, "is_consequence": bool}
# kind of a message -> the types of its fields
FIELDS: dict[str, dict[str, type]] = {
    "hello": {"index": int, "ips": str},
    "welcome": {},
    "refused": {"ips": str},
    "facts": {"facts": dict},
    "start": {"port": int, "run_name": str},
    "beat": {},
    "failure": FAILURE,  # of the node that says it
    "end": FAILURE,  # of the job, by node 0
    "done": {},
}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why the job ends; the message names rank and node. A consequence is a failure that another rank's may explain."""

    message: str
    exit_code: int = 1
    is_consequence: bool = False


@dataclass(frozen=True, kw_only=True)
class Start:
    """What node 0 decides before ranks start: the port of the ranks' store, the name of the result folder."""

    port: int
    run_name: str = ""  # none is wanted


def parse(message: dict[str, Any], *kinds: str) -> dict[str, Any]:
    """The message, if it is one of these kinds and has their fields and no others. Raises Stranger if it is not."""
    kind = message.get("kind")
    if not isinstance(kind, str) or kind not in kinds or message.keys() != {"kind", *FIELDS[kind]}:
        raise Stranger
    if any(type(message[name]) is not expected for name, expected in FIELDS[kind].items()):
        raise Stranger
    return message


def parse_failure(message: dict[str, Any]) -> Failure:
    if message["exit_code"] not in (1, 2):
        raise Stranger
    return Failure(
        message=clean(message["message"]), exit_code=message["exit_code"], is_consequence=message["is_consequence"]
    )


def parse_facts(message: dict[str, Any]) -> dict[str, str]:
    if any(type(value) is not str for value in message["facts"].values()):
        raise Stranger
    return message["facts"]


def parse_start(message: dict[str, Any]) -> Start:
    if not 0 < message["port"] < 65536:
        raise Stranger
    return Start(port=message["port"], run_name=clean(message["run_name"], MAX_FACT))


def clean(text: str, limit: int = MAX_TEXT) -> str:
    """At most `limit` characters of what another process says, control characters escaped."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text[:limit]
    )[:limit]
