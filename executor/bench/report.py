# SPDX-License-Identifier: Apache-2.0
"""What a command found out: how far it is, its tables, and a file that holds every result as soon as there is one."""

import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from executor.utils.files import check_output, replace
from executor.utils.report import commit, versions


class Report:
    """Results as they come; rank 0 shows and keeps them.

    The file is replaced with each measurement, so that whatever happens later leaves what was finished. The tables are
    printed when the measurements end, also when an error ends them; a job of several ranks may be ended before that.
    """

    def __init__(self, output: Path | None, measurements: int, tables: Callable[["Report"], str]):
        """`tables` makes what is printed. ValueError if `output` cannot be written."""
        if output and is_first_rank():
            check_output("--output", output)
        self.output = output
        self.measurements = measurements
        self.tables = tables
        self.content: dict[str, Any] = {}
        self.results: list[dict[str, Any]] = []
        self.progress: tqdm | None = None

    def begin(self, **circumstances: Any) -> None:
        """What identifies the run; from here on the terminal shows how far it is."""
        self.content = {
            "commit": commit(),
            "command": "python -m executor.bench " + shlex.join(sys.argv[1:]),
            "versions": versions(),
            **circumstances,
            "results": self.results,
        }
        hidden = self.measurements == 1 or not is_first_rank()
        self.progress = tqdm(total=self.measurements, desc="measurements", disable=hidden)

    def add(self, results: list[dict[str, Any]]) -> None:
        """The rows of one measurement. RuntimeError if a figure is not finite."""
        self.results += results
        self.progress.update()
        if self.output and is_first_rank():
            replace(self.output, text_of(self.content) + "\n")

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.close()
        if self.results and is_first_rank():
            print(self.tables(self))


def text_of(content: dict[str, Any]) -> str:
    """JSON, which has no number that is not finite: a figure that is none is a fault of the measurement."""
    try:
        return json.dumps(content, indent=1, allow_nan=False)
    except ValueError as error:
        raise RuntimeError(f"a measured figure is not a finite number: {error}") from error


def is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"
