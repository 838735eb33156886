# SPDX-License-Identifier: Apache-2.0
"""Logging set-up: rank 0 on the terminal, every rank in its file."""

import logging
import re

import pytest

from executor.utils.logging_utils import setup_logging

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR) \[rank (\d+)\] some\.name: (.*)")


@pytest.fixture(autouse=True)
def loggers_as_before(monkeypatch):
    monkeypatch.delenv("LOG_LEVEL", raising=False)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers = handlers
    root.setLevel(level)


def say_everything() -> None:
    for level in ("debug", "info", "warning", "error"):
        getattr(logging.getLogger("some.name"), level)("a %s", level)


@pytest.mark.parametrize("rank", [0, 3])
def test_rank_0_logs_to_the_terminal_and_all_ranks_to_files(rank, tmp_path, capsys):
    file = tmp_path / "log.log"
    setup_logging("INFO", rank, file)
    say_everything()
    written = [LINE.fullmatch(line).groups() for line in file.read_text().splitlines()]
    assert written == [(level, str(rank), f"a {level.lower()}") for level in ("INFO", "WARNING", "ERROR")]
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == (file.read_text() if rank == 0 else "")


@pytest.mark.parametrize(
    ("setting", "variable", "lines"),
    [("DEBUG", None, 4), ("ERROR", None, 1), ("INFO", "WARNING", 2), ("ERROR", "debug", 4)],
)
def test_environment_variable_overrides_setting(setting, variable, lines, tmp_path, monkeypatch):
    if variable:
        monkeypatch.setenv("LOG_LEVEL", variable)
    setup_logging(setting, 1, tmp_path / "log")
    say_everything()
    assert len((tmp_path / "log").read_text().splitlines()) == lines


@pytest.mark.parametrize("value", ["LOUD", "10", "NOTSET"])
def test_unknown_level(value, monkeypatch):
    monkeypatch.setenv("LOG_LEVEL", value)
    with pytest.raises(ValueError, match=f"^LOG_LEVEL: '{value}' is not one of DEBUG, INFO, WARNING, ERROR$"):
        setup_logging("INFO", 0)


def test_new_run_replaces_handlers_and_file(tmp_path, capsys):
    for _ in range(2):
        setup_logging("INFO", 0, tmp_path / "log")
        logging.getLogger("some.name").info("once")
    assert len((tmp_path / "log").read_text().splitlines()) == 1
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_library_log_levels(tmp_path):
    setup_logging("DEBUG", 1, tmp_path / "log")
    logging.getLogger("urllib3.x").info("chatter")
    logging.getLogger("urllib3.x").warning("matters")
    assert "chatter" not in (tmp_path / "log").read_text() and "matters" in (tmp_path / "log").read_text()
