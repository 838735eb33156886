# SPDX-License-Identifier: Apache-2.0
"""The level of torchrun's own log, and what a log line may hold."""

import logging
import os
from pathlib import Path

import pytest

from executor.launch.launcher import torchrun_log_level
from executor.utils.logging_utils import setup_logging


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", "CRITICAL"),
        ("info", "INFO"),
        ("WARNING", "WARNING"),
        ("abc", "CRITICAL"),
        ("10", "CRITICAL"),
        ("\x1b", "CRITICAL"),
    ],
)
def test_level_of_torchrun(given: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGLEVEL", given)
    assert torchrun_log_level() == expected == os.environ["LOGLEVEL"]
    logging.getLogger("tests.of.torchrun").setLevel(expected)


def test_level_of_torchrun_that_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGLEVEL", "x")  # so that the variable is restored
    monkeypatch.delenv("LOGLEVEL")
    assert torchrun_log_level() == "CRITICAL" == os.environ["LOGLEVEL"]


def test_control_characters_are_escaped_in_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LOG_LEVEL", raising=False)
    root = logging.getLogger()
    handlers, level, raises = list(root.handlers), root.level, logging.raiseExceptions
    root.handlers = []  # else they would be closed
    try:
        setup_logging("INFO", 0, tmp_path / "log")
        logging.getLogger("tests").warning("%s has no tokenizer", "a\x1b[31m\rb é 🎭")
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers, logging.raiseExceptions = handlers, raises
        root.setLevel(level)
    for text in (capfd.readouterr().err, (tmp_path / "log").read_text()):
        assert text.endswith("tests: a\\x1b[31m\\x0db é 🎭 has no tokenizer\n") and text.count("\n") == 1
