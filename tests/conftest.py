# SPDX-License-Identifier: Apache-2.0
"""pytest-xdist scheduling; with CI=true, skips that are not in tests/allowed_skips.txt fail the session.

Without a GPU Triton kernels run in the interpreter, which must be selected before triton is imported.
"""

import glob
import os
import re
import sys
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import pytest

HAS_GPU = bool(glob.glob("/dev/nvidia[0-9]*"))
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

ALLOWED_SKIPS = Path(__file__).with_name("allowed_skips.txt")
MAX_WORKERS = 8  # each holds torch and models, and launches ranks
FILES_OF_A_WORKER = 2  # importing torch in a worker pays off only for more files


def usable_cores() -> float:
    """Number of cores of the CPU affinity, or of the control group's quota if that is less."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else min(cores, int(quota) / int(period))


def selected_files(arguments: Iterable[str]) -> set[Path]:
    """Test files selected by pytest's positional arguments."""
    paths = {Path(argument.partition("::")[0]) for argument in arguments}
    return {file for path in paths for file in (path.rglob("test_*.py") if path.is_dir() else [path])}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Workers of `-n auto`: one more than usable cores, as some wait for jobs that they started; none for one core or
    few files, where one process is as fast. None leaves it to xdist."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    paths = [str(config.invocation_params.dir / argument) for argument in config.args]
    cores = int(usable_cores())
    workers = min(cores + 1, MAX_WORKERS, len(selected_files(paths)) // FILES_OF_A_WORKER)
    return workers if cores > 1 and workers > 1 else 0


@cache
def group_of(file: str) -> str | None:
    """Scheduling group of a test file: its xdist_group mark, or itself if it has a module or class fixture.

    Where there is a GPU, the files that use it share one worker, as they need its memory.

    Parsed from the text: xdist's controller does not import the files, and node ids have no marks.
    """
    if HAS_GPU and re.search(r"cuda|gpu", Path(file).name):
        return "gpu"
    text = Path(file).read_text(encoding="utf-8")
    if mark := re.search(r"\bxdist_group\([^)]*?[\"'](.+?)[\"']", text):
        return mark[1]
    return file if re.search(r"\bscope=[\"'](module|class)[\"']", text) else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadgroup`: files of one group stay on one worker; other tests are distributed individually."""
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = config.rootpath / nodeid.partition("::")[0]
            return group_of(str(file)) or nodeid

    return GroupScheduling(config, log) if config.option.dist == "loadgroup" else None


def pytest_collection_finish() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" and "triton.runtime.interpreter" in sys.modules:
        from tests.interpreter import make_faster

        make_faster(sys.modules["triton.runtime.interpreter"])


def read_allowed_skips(path: Path) -> list[str]:
    """Parses the node id patterns of `NODE_ID | REASON` lines; ValueError for a line without a reason."""
    patterns = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip() and not line.startswith("#"):
            pattern, _, reason = line.partition(" | ")
            if not reason.strip():
                raise ValueError(f"{path.name}:{number}: '{line}' gives no reason; write NODE_ID | REASON")
            patterns.append(pattern.strip())
    return patterns


class StrictSkips:
    """Pytest plugin that fails the session and lists skips that are not allowed.

    Under xdist it runs in the controller, on the workers' reports. xdist merges reports of files skipped at the same
    line, so workers send the list of skipped files.
    """

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
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["unlisted_skips"] = self.unlisted
        elif self.unlisted and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: object) -> None:
        found = getattr(node, "workeroutput", {}).get("unlisted_skips", {})
        self.unlisted |= {node_id: reason for node_id, reason in found.items() if "::" not in node_id}

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.unlisted:
            terminalreporter.section(f"skipped, but not listed in {ALLOWED_SKIPS.name}", red=True)
            for node_id, reason in sorted(self.unlisted.items()):
                terminalreporter.line(f"{node_id} | {reason}")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "xdist_group(name): files of one group run sequentially on one worker")
    if os.environ.get("CI") == "true":
        try:
            config.pluginmanager.register(StrictSkips(read_allowed_skips(ALLOWED_SKIPS)), "strict_skips")
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None
