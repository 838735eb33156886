# SPDX-License-Identifier: Apache-2.0
"""Logging set-up: rank 0 logs to the terminal, every rank to its own file."""

import logging
import os
import sys
from pathlib import Path

from executor.utils.text import printable

LEVEL_VARIABLE = "LOG_LEVEL"
FORMAT = "%(asctime)s %(levelname)s [rank %(rank)s] %(name)s: %(message)s"


class Formatter(logging.Formatter):
    """Escapes the control characters of what is logged, such as those of a path."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def setup_logging(level: str, rank: int, file: Path | None = None) -> None:
    """Sends all loggers to the terminal (stderr, rank 0 only) and to `file`.

    `level` is DEBUG, INFO, WARNING or ERROR; the environment variable LOG_LEVEL overrides it. ValueError if that
    variable holds anything else.
    """
    level = os.environ.get(LEVEL_VARIABLE, level).upper()
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ValueError(f"{LEVEL_VARIABLE}: {level!r} is not one of DEBUG, INFO, WARNING, ERROR")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)] if rank == 0 else []
    if file is not None:
        handlers.append(logging.FileHandler(file, mode="w", encoding="utf-8"))
    logging.raiseExceptions = False  # no traceback on the terminal if a log file cannot be written
    formatter = Formatter(FORMAT, defaults={"rank": rank})
    for handler in handlers:
        handler.setFormatter(formatter)
    logging.basicConfig(level=level, handlers=handlers, force=True)
    for chatty in ("transformers", "datasets", "urllib3", "filelock", "fsspec", "httpx", "torch", "torch_npu"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLevelName(level)))


def adopt_transformers_logging() -> None:
    """Routes transformers' log to the handlers of `setup_logging`."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
