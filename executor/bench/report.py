# SPDX-License-Identifier: Apache-2.0
"""Benchmark report: progress bar, tables, and a JSON file updated after each measurement."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from executor.utils.files import check_output, replace
from executor.utils.report import commit, is_first_rank, text_of, versions


class Report:
    """Collects results; rank 0 prints and saves them.

    The file is replaced atomically after each measurement, so that a later failure keeps finished results. The tables
    are printed at the end, also after an error, unless the launcher ends a job of several ranks first.
    """

    def __init__(self, output: Path | None, measurements: int, tables: Callable[["Report"], str]):
        """tables: returns the text to print. ValueError if `output` cannot be written."""
        if output and is_first_rank():
            check_output("--output", output)
        self.output = output
        self.measurements = measurements
        self.tables = tables
        self.content: dict[str, Any] = {}
        self.results: list[dict[str, Any]] = []
        self.progress: tqdm[Any] | None = None

    def begin(self, **circumstances: Any) -> None:
        """Sets the entries that identify the run; starts the progress bar."""
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
        """Adds the rows of one measurement. RuntimeError if a value is not finite."""
        assert self.progress is not None, "begin() comes first"
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
