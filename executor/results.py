# SPDX-License-Identifier: Apache-2.0
"""Where a run's results go: a folder of its own, and files of JSON lines that hold each result once it is written."""

import contextlib
import datetime
import json
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from executor.config import REPOSITORY, Settings

logger = logging.getLogger(__name__)

RUN_NAME_VARIABLE = "JOB_RUN_NAME"  # set by the launcher: its ranks share one folder
RUN_NAME = re.compile(r"\d{8}/\d{6}(_\d+)?")
LATEST = "latest"
STANDARD_STREAM = re.compile(r"/dev/stdout|/dev/stderr|/(?:dev|proc/self)/fd/(\d+)")
STANDARD_NUMBERS = {"stdout": 1, "stderr": 2}
ATTEMPTS = 10_000  # to find a name that no other run has


def run_name() -> str | None:
    """Name of the job's run folder, in a rank that a launcher started."""
    return os.environ.get(RUN_NAME_VARIABLE) if os.environ.get("WORLD_SIZE", "1") != "1" else None


class RunFolder:
    """<output_dir>/<yyyymmdd>/<model_name>_<yaml stem>/<hhmmss>: of one run, or of one job of several ranks."""

    def __init__(self, path: Path, made: list[Path]):
        """made: the folders that did not exist before, innermost first."""
        self.path = path
        self.made = made

    @property
    def name(self) -> str:
        """What another rank or node needs to find its own: "yyyymmdd/hhmmss"."""
        return f"{self.path.parent.parent.name}/{self.path.name}"

    def link_latest(self) -> None:
        """Points the link `latest` beside the folder to it."""
        link, part = self.path.parent / LATEST, self.path.parent / f".{LATEST}_{secrets.token_hex(4)}"
        try:
            part.symlink_to(self.path.name)
            part.replace(link)
        except OSError as error:
            part.unlink(missing_ok=True)
            logger.warning("%s: not set: %s", link, error.strerror)

    def discard(self) -> None:
        """Removes what a refused run has left: its folder, and those around it that were made for it."""
        if self.path in self.made and not (self.path / "result.jsonl").exists():
            shutil.rmtree(self.path, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty: another run is in it by now
                for folder in self.made[1:]:
                    folder.rmdir()


def create_run_folder(settings: Settings, yaml_file: Path, name: str | None = None) -> RunFolder:
    """Makes the folder of a run that starts now, which no other run has; with `name`, adopts the job's.

    Raises ValueError where it cannot be made.
    """
    if name is not None and not RUN_NAME.fullmatch(name):
        raise ValueError(f"{RUN_NAME_VARIABLE}: {name!r} is not of the form yyyymmdd/hhmmss")
    now = f"{datetime.datetime.now():%Y%m%d/%H%M%S}" if name is None else name
    date, time = now.split("/")
    parent = Path("res" if settings.output_dir is None else settings.output_dir)
    try:
        root = REPOSITORY / parent if settings.output_dir is None else parent.expanduser().absolute()
        parent = root / date / f"{settings.model_name}_{yaml_file.stem}"
        return make_folder(parent, time, exclusive=name is None)
    except (OSError, ValueError, RuntimeError) as error:  # a null byte, a home that does not exist
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"output_dir: {parent / time} cannot be made: {reason}; set output_dir to a folder that can be written"
        ) from None


def make_folder(parent: Path, name: str, exclusive: bool) -> RunFolder:
    number = 1
    for _ in range(ATTEMPTS):
        path = parent / (name if number == 1 else f"{name}_{number}")
        missing = [path, *(folder for folder in path.parents if not folder.exists())]
        try:
            parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()
            return RunFolder(path, missing)
        except FileExistsError:
            if not parent.is_dir() or not (exclusive or path.is_dir()):
                raise
            if not exclusive:
                return RunFolder(path, [])
            number += 1
        except FileNotFoundError:  # a refused run has just removed the parent that was made for it
            continue
    raise OSError(f"{parent} does not stay")


class LineFile:
    """A file that is made, or replaces an existing one, with its first line; each line is on disk before the next.

    No line is ever torn: one that cannot be written whole is taken back. A file that is deleted meanwhile is restored.
    """

    def __init__(self, path: Path):
        self.path = path
        self.descriptor: int | None = None
        self.size = 0

    def write(self, line: bytes) -> None:
        """Appends a line. Raises OSError, after which the file holds the lines before it."""
        part = None
        if self.descriptor is None:
            self.descriptor, part = self._open()
        elif is_deleted(self.descriptor):
            self._restore(self.descriptor)
        written = 0
        try:
            while written < len(line):
                written += os.write(self.descriptor, line[written:])
            if part is not None:
                part.replace(self.path.resolve())
        except OSError:
            with contextlib.suppress(OSError):  # no regular file
                os.ftruncate(self.descriptor, self.size)
            if part is not None:
                part.unlink(missing_ok=True)
            raise
        self.size += len(line)

    def close(self) -> Path:
        """Returns where the file is now, should somebody have moved it. Raises OSError if it cannot be restored."""
        if self.descriptor is None:
            return self.path
        if is_deleted(self.descriptor):
            self._restore(self.descriptor)
        here = self.path
        with contextlib.suppress(OSError):
            if not here.exists():
                here = Path(os.readlink(f"/proc/self/fd/{self.descriptor}"))
        os.close(self.descriptor)
        self.descriptor = None
        return here

    def _open(self) -> tuple[int, Path | None]:
        """Opens a new file, returned, that is to take the old one's place; the old one itself where that cannot be."""
        standard = STANDARD_STREAM.fullmatch(str(self.path))
        if standard:  # opened anew it would have a position of its own
            return os.dup(int(standard[1] or STANDARD_NUMBERS[self.path.name])), None
        target = self.path.resolve()
        if not self.path.exists() or self.path.is_file() and not os.path.ismount(target):
            part = target.with_name(f".{secrets.token_hex(4)}.part")
            with contextlib.suppress(OSError):  # the folder may not take new files
                descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
                if target.exists():
                    shutil.copymode(target, part)
                return descriptor, part
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC, 0o666), None

    def _restore(self, deleted: int) -> None:
        """Writes what was written so far into a new file of the same name, or of one beside it that is free."""
        number, target = 1, self.path
        target.parent.mkdir(parents=True, exist_ok=True)
        while target.exists():
            number += 1
            target = self.path.with_name(f"{self.path.stem}_{number}{self.path.suffix}")
        self.descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        logger.warning("%s was deleted while it was written: what it held is in %s", self.path, target)
        self.path = target
        position = 0
        while part := os.pread(deleted, 1 << 20, position):
            position += os.write(self.descriptor, part)
        os.close(deleted)


def is_deleted(descriptor: int) -> bool:
    """Whether no name is left of the regular file that is open as `descriptor`."""
    found = os.fstat(descriptor)
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 0


class Results:
    """Writes each result to all files. A file that fails is given up; the run goes on while one is left."""

    def __init__(self, paths: Sequence[Path]):
        self.files = [LineFile(path) for path in paths]
        self.failures: list[str] = []
        self.count = 0

    def write(self, record: dict[str, Any]) -> None:
        """Raises OSError when no file can be written any more."""
        text = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        line = text.encode("utf-8", "backslashreplace")  # \udXXX, as JSON writes lone surrogates
        for file in list(self.files):
            try:
                file.write(line)
            except OSError as error:
                self._give_up(file, error)
        if not self.files:
            raise OSError(f"{self.failures[-1]}; {self.count} results are in it")
        self.count += 1

    def close(self) -> list[Path]:
        """Where the results are."""
        paths = []
        for file in list(self.files):
            try:
                paths.append(file.close())
            except OSError as error:
                self._give_up(file, error)
        return paths

    def _give_up(self, file: LineFile, error: OSError) -> None:
        self.files.remove(file)
        self.failures.append(f"{file.path} cannot be written: {error.strerror}")
        logger.error("%s", self.failures[-1])
