# SPDX-License-Identifier: Apache-2.0
"""Folder of an unfinished checkpoint, OUTPUT.partial, with which an interrupted run continues.

It holds the settings of the run, the calibration of each layer, and the checkpoint's finished files; the checkpoint
becomes OUTPUT by one rename.
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from executor.launch.rank import PartialFailure
from executor.quantize.shards import sync_folder, write_text
from executor.utils.reading import read_json_object, refusing
from executor.utils.text import one_line

logger = logging.getLogger(__name__)

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Work:
    """Paths of an unfinished checkpoint."""

    output: Path

    @property
    def folder(self) -> Path:
        return self.output.with_name(f"{self.output.name}.partial")

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def calibration(self) -> Path:
        return self.folder / "calibration"

    def begin(self, settings: dict[str, Any]) -> None:
        """Creates the folder, or checks that the run that left it had the same settings; ValueError."""
        refuse_existing(self.output)
        file = self.folder / SETTINGS
        if file.exists():
            found = read_json_object(file)
            keys = [key for key in (*settings, *found) if settings.get(key) != found.get(key)]
            if keys:
                key = keys[0]
                raise ValueError(
                    one_line(
                        f"--output: {self.folder} is from an interrupted run with another {key}"
                        f"{difference(found.get(key), settings.get(key))}: repeat that run's command, or delete it"
                    )
                )
        elif any(entry.name != f"{SETTINGS}.part" for entry in self.folder.iterdir()):
            raise ValueError(one_line(f"--output: {self.folder} is in the way: it is not from an interrupted run"))
        else:
            write_text(file, json.dumps(settings, indent=2) + "\n")
        self.checkpoint.mkdir(exist_ok=True)
        self.calibration.mkdir(exist_ok=True)

    def finish(self) -> None:
        """Makes the checkpoint the output."""
        sync_folder(self.checkpoint)
        self.checkpoint.rename(self.output)
        sync_folder(self.output.parent)
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.exists():
            logger.warning("%s", one_line(f"{self.folder} could not be deleted; it is not needed any more"))


def refuse_existing(output: Path) -> None:
    with refusing("--output"):
        exists = os.path.lexists(output)
    if exists:
        raise ValueError(one_line(f"--output: {output} exists: choose another folder, or delete it"))


def difference(found: Any, stated: Any) -> str:
    """The two values, if they are short."""
    plain = all(value is None or isinstance(value, str | int | bool) for value in (found, stated))
    return f" ({found}, now {stated})" if plain else ""


@contextmanager
def locked(work: Work) -> Iterator[None]:
    """Creates the work folder and holds an exclusive lock on it; ValueError if another run has it."""
    refuse_existing(work.output)
    with refusing("--output"):
        work.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(work.folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(one_line(f"--output: another run is writing to {work.folder}")) from None
        yield
    finally:
        os.close(descriptor)


@contextmanager
def resumable(work: Work) -> Iterator[None]:
    """Turns OSError into a one-line failure that says how to resume."""
    try:
        yield
    except OSError as error:
        where = error.filename or work.folder
        raise PartialFailure(
            one_line(f"{where}: {error.strerror or error}; what is finished is kept: the same command continues")
        ) from None
