# SPDX-License-Identifier: Apache-2.0
"""Measures speed: `python -m executor.bench COMMAND --help` shows what a command takes."""

import importlib
import os
import sys

from executor.command import run_command
from executor.rank import forget_rank, join
from executor.utils.arguments import ArgumentParser

COMMANDS = {
    "latency": "time to the first token and time of each further one",
    "throughput": "tokens a second of many prompts, offline",
    "kernels": "each operation alone against its floor",
    "plot": "a picture of reports of latency",
    "host-time": "what the host adds to an eager decode step's vendor calls on an NPU",
}


def main() -> int:
    """A command is a module beside this one; its `run` takes the rest of the command line."""
    listed = "".join(f"\n  {name:12}{what}" for name, what in COMMANDS.items())
    parser = ArgumentParser(prog="python -m executor.bench", description=f"{__doc__}\n\ncommands:{listed}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")

    def body() -> int:
        command = parser.parse_args(sys.argv[1:2]).command
        if os.environ.get("WORLD_SIZE", "1") == "1":
            forget_rank()
        join()  # before a command imports torch
        importlib.import_module(f"executor.bench.{command.replace('-', '_')}").run(sys.argv[2:])
        return 0

    return run_command(body)


if __name__ == "__main__":
    sys.exit(main())
