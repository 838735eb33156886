# SPDX-License-Identifier: Apache-2.0
"""Jobs of several ranks launched by infer.sh, shared by the tests of launching and faults."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TWO_RANKS = ("world_size=2", "parallel_config.attn_tp_size=2", "parallel_config.moe_tp_size=2")
LONG = ("data_config.max_new_tokens=4000", "data_config.ignore_eos=True")
ENDS_WITHIN_S = 30  # time limit from a fault to the end of the job
STARTS_WITHIN_S = 180  # on a busy machine


class Job:
    """infer.sh of one node with the demo checkpoint on the CPU; stdout and stderr go to the file `terminal`."""

    def __init__(self, terminal: Path, *settings: str, options: tuple[str, ...] = (), namespace: str = "",
                 folder: Path | None = None, **env: str):  # fmt: skip
        self.terminal = terminal
        arguments = [argument for setting in ("device=cpu", *settings) for argument in ("--set", setting)]
        # `ip` and infer.sh both exec, so this is the launcher's process
        enter = ["ip", "netns", "exec", namespace] if namespace else []
        self.process = subprocess.Popen(
            [*enter, "bash", ROOT / "models/qwen3_moe/infer.sh", *arguments, *options],
            env=os.environ | {"PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"} | env,
            stdout=terminal.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=folder,
        )

    @property
    def text(self) -> str:
        return self.terminal.read_text()

    @property
    def last_line(self) -> str:
        return self.text.splitlines()[-1]

    def ranks(self) -> dict[int, int]:
        """Rank -> process id of the running ranks of this launcher."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"LAUNCHER_PID={self.process.pid}".encode() in environment:
                ranks = [entry for entry in environment if entry.startswith(b"RANK=")]
                found[int(ranks[0].removeprefix(b"RANK="))] = int(folder.name)
        return found

    def listening_at(self) -> dict[str, int]:
        """Address -> number of listening ports of the launcher and its ranks."""
        found: Counter[str] = Counter()
        for pid in (self.process.pid, *self.ranks().values()):
            sockets = set()
            for file in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                    sockets.add(os.readlink(file))
            for table in ("tcp", "tcp6"):  # of the process's own network namespace
                for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                    _, local, _, state, *_, inode = line.split()[:10]
                    if state == "0A" and f"socket:[{inode}]" in sockets:
                        found[address_of(local.split(":")[0])] += 1
        return found

    def wait_until_decoding(self) -> None:
        wait_for(lambda: "ready in" in self.text or self.process.poll() is not None, STARTS_WITHIN_S)
        assert self.process.poll() is None, self.text
        time.sleep(1)

    def end(self, timeout_s: float = ENDS_WITHIN_S) -> int:
        """Waits until the job ends by itself, with all ranks; returns the exit code."""
        code = self.process.wait(timeout_s)
        wait_for(lambda: not self.ranks(), 3)
        return code

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


def address_of(text: str) -> str:
    """Decodes an address of /proc/net/tcp."""
    return socket.inet_ntoa(bytes.fromhex(text)[::-1]) if len(text) == 8 else text


def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s"
        time.sleep(0.1)
