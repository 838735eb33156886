# SPDX-License-Identifier: Apache-2.0
"""Command line parsing with one-line errors."""

import argparse
import sys
from typing import NoReturn

from executor.launch.terminal import print_error


class ArgumentParser(argparse.ArgumentParser):
    """argparse.ArgumentParser without abbreviated options, and with one-line errors, exit code 2."""

    def __init__(self, **settings: object):
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **settings,  # type: ignore[arg-type]
        )

    def error(self, message: str) -> NoReturn:
        if message.endswith("expected one argument"):
            message += "; one that begins with - is given as --option=-..."
        print_error(f"{message} (--help lists the options)")
        sys.exit(2)


def positive(text: str) -> int:
    """Argument type: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, at least 1")
    return int(text)
