# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: `python -m executor.bench COMMAND --help` lists the options of a command."""

import importlib
import os
import sys

from executor.launch.command import run_command
from executor.launch.rank import forget_rank, set_up_rank
from executor.utils.arguments import ArgumentParser

COMMANDS = {
    "latency": "time to first token and time per output token",
    "throughput": "offline throughput of many prompts, in tokens per second",
    "arrivals": "requests that arrive while others run: throughput, pauses, cached prefixes",
    "kernels": "each operation alone, against its roofline floor",
    "plot": "a bar chart of latency reports",
    "host-time": "host overhead of an eager decode step on an NPU",
}


def main() -> int:
    """Runs a command: a module of this package, whose `run` takes the remaining arguments."""
    listed = "".join(f"\n  {name:12}{what}" for name, what in COMMANDS.items())
    parser = ArgumentParser(prog="python -m executor.bench", description=f"{__doc__}\n\ncommands:{listed}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")

    def body() -> int:
        command = parser.parse_args(sys.argv[1:2]).command
        if os.environ.get("WORLD_SIZE", "1") == "1":
            forget_rank()
        set_up_rank()  # before torch is imported
        importlib.import_module(f"executor.bench.{command.replace('-', '_')}").run(sys.argv[2:])
        return 0

    return run_command(body)


if __name__ == "__main__":
    sys.exit(main())
