# SPDX-License-Identifier: Apache-2.0
"""Where CI=true, a skipped test that tests/allowed_skips.txt does not list fails the session.

Without a GPU Triton's kernels run in its interpreter, which has to be said before anything imports triton.
"""

import glob
import os
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

if not glob.glob("/dev/nvidia[0-9]*"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

ALLOWED_SKIPS = Path(__file__).with_name("allowed_skips.txt")


def read_allowed_skips(path: Path) -> list[str]:
    """The node id patterns of the file's `NODE_ID | REASON` lines; ValueError for a line without a reason."""
    patterns = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip() and not line.startswith("#"):
            pattern, _, reason = line.partition(" | ")
            if not reason.strip():
                raise ValueError(f"{path.name}:{number}: '{line}' gives no reason; write NODE_ID | REASON")
            patterns.append(pattern.strip())
    return patterns


class StrictSkips:
    """Pytest plugin that collects the skips nobody allowed, then fails the session and names them."""

    def __init__(self, patterns: list[str]) -> None:
        self.patterns = patterns
        self.unlisted: dict[str, str] = {}

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        node_id = report.nodeid
        allowed = any(node_id == pattern or fnmatchcase(node_id, pattern) for pattern in self.patterns)
        if report.skipped and not hasattr(report, "wasxfail") and not allowed:
            self.unlisted[node_id] = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)

    pytest_runtest_logreport = _note
    pytest_collectreport = _note

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unlisted and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.unlisted:
            terminalreporter.section(f"skipped, but not listed in {ALLOWED_SKIPS.name}", red=True)
            for node_id, reason in sorted(self.unlisted.items()):
                terminalreporter.line(f"{node_id} | {reason}")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("CI") == "true":
        try:
            config.pluginmanager.register(StrictSkips(read_allowed_skips(ALLOWED_SKIPS)), "strict_skips")
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None
