# SPDX-License-Identifier: Apache-2.0
"""Evaluations of a checkpoint: `python -m executor.evaluate COMMAND --help` lists the options of a command."""

import importlib
import os
import sys

from executor.launch.command import run_command
from executor.launch.rank import forget_rank, set_up_rank
from executor.utils.arguments import ArgumentParser

COMMANDS = {"perplexity": "perplexity and bits per byte of a text"}


def main() -> int:
    """Runs a command: a module of this package, whose `run` takes the remaining arguments."""
    listed = "".join(f"\n  {name:12}{what}" for name, what in COMMANDS.items())
    parser = ArgumentParser(prog="python -m executor.evaluate", description=f"{__doc__}\n\ncommands:{listed}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")

    def body() -> int:
        command = parser.parse_args(sys.argv[1:2]).command
        if os.environ.get("WORLD_SIZE", "1") == "1":
            forget_rank()
        set_up_rank()  # before torch is imported
        importlib.import_module(f"executor.evaluate.{command}").run(sys.argv[2:])
        return 0

    return run_command(body)


if __name__ == "__main__":
    sys.exit(main())
