# SPDX-License-Identifier: Apache-2.0
"""Renders chat templates in a child process with limits on time and memory.

A template is untrusted code from the checkpoint. Jinja's sandbox keeps it from files and Python, but one operation of
it can take hours or all memory, and only the end of its process stops that.
"""

import contextlib
import datetime
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from executor.launch.rank import LAUNCHER_VARIABLE, RANK_VARIABLES

MEMORY_BYTES = 2 << 30  # address space of the child
MAX_ERROR = 4000  # characters
LENGTH_BYTES = 8
SERVE = "import sys; sys.path[:] = sys.argv[1:]; from executor.loading import template_process as p; p.serve()"
ERRORS: dict[str, type[Exception]] = {error.__name__: error for error in (MemoryError, RecursionError)}


class TemplateProcess:
    """The child process, started at the first use and again after one that a limit ended."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.owner = 0  # process id: a fork of this process must not share the pipes
        self.lock = threading.Lock()

    def render(self, timeout_s: float, template: str, variables: dict[str, Any], max_len: int) -> tuple[str, float]:
        """Renders `template` with `variables`; returns the text and the seconds that it took.

        Raises TypeError for variables that JSON cannot hold, TimeoutError, MemoryError, RecursionError, and ValueError
        for any other error of the template or more than `max_len` characters.
        """
        request = json.dumps([timeout_s, template, variables, max_len]).encode()
        with self.lock:
            process = self._running()
            line = b""
            try:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(len(request).to_bytes(LENGTH_BYTES, "big") + request)  # type: ignore[union-attr]
                    process.stdin.flush()  # type: ignore[union-attr]
                line = process.stdout.readline()  # type: ignore[union-attr]
            finally:
                if not line.endswith(b"\n"):  # it has ended, or this process was interrupted
                    self.process = None
                    process.kill()
                    status = process.wait()
                    for pipe in (process.stdin, process.stdout):
                        with contextlib.suppress(BrokenPipeError):  # of what is still to be written
                            pipe.close()  # type: ignore[union-attr]
        if not line.endswith(b"\n"):
            if status == -signal.SIGALRM:
                raise TimeoutError
            raise MemoryError if status == -signal.SIGKILL else ValueError(f"its process ended with status {status}")
        answer = json.loads(line)
        if "error" in answer:
            raise ERRORS.get(answer["type"], ValueError)(answer["error"])
        return answer["text"], answer["seconds"]

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is None or self.process.poll() is not None or self.owner != os.getpid():
            hidden = (LAUNCHER_VARIABLE, *RANK_VARIABLES)
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVE, *sys.path],
                env={name: value for name, value in os.environ.items() if name not in hidden},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            self.owner = os.getpid()
        return self.process


def serve() -> None:
    """Answers the requests of `TemplateProcess` on stdin with JSON lines, until the end of the file."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = MEMORY_BYTES if limit == resource.RLIM_INFINITY else min(MEMORY_BYTES, limit)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    while length := sys.stdin.buffer.read(LENGTH_BYTES):
        request = sys.stdin.buffer.read(int.from_bytes(length, "big"))
        started_s = time.monotonic()
        try:
            timeout_s, *arguments = json.loads(request)
            signal.setitimer(signal.ITIMER_REAL, timeout_s)  # SIGALRM ends the process, even within one operation
            answer = {"text": rendered(*arguments)}
        except Exception as error:
            text = str(error)
            text = text if len(text) <= MAX_ERROR else text[: MAX_ERROR // 2] + text[-MAX_ERROR // 2 :]
            answer = {"error": text or type(error).__name__, "type": type(error).__name__}
        line = json.dumps(answer | {"seconds": time.monotonic() - started_s})
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(line, flush=True)


def rendered(template: str, variables: dict[str, Any], max_len: int) -> str:
    text = compiled(template).render(variables)
    if len(text) > max_len:
        raise ValueError(f"makes {len(text)} characters, more than {max_len}")
    return text


@lru_cache
def compiled(template: str) -> jinja2.Template:
    """Compiles a template with what transformers' manual on chat templates gives them."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(template)


class Generation(Extension):
    """{% generation %}: marks the assistant's tokens in training, without effect on the text."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def to_json(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
    """Formats a value as JSON; unlike Jinja's filter it does not escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **settings)


def raise_exception(message: object) -> None:
    raise ValueError(message)


def strftime_now(text: str) -> str:
    return datetime.datetime.now().strftime(text)
