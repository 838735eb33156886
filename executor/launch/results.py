# SPDX-License-Identifier: Apache-2.0
"""Result folder of a run, and JSON Lines files without buffering: a written result survives the end of the process."""

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
from executor.launch.rank import PartialFailure

logger = logging.getLogger(__name__)

RUN_NAME_VARIABLE = "JOB_RUN_NAME"  # set by the launcher, so that its ranks share one folder
RUN_NAME = re.compile(r"\d{8}/\d{6}(_\d+)?")
LATEST = "latest"
STANDARD_STREAM = re.compile(r"/dev/stdout|/dev/stderr|/(?:dev|proc/self)/fd/(\d+)")
STANDARD_NUMBERS = {"stdout": 1, "stderr": 2}
ATTEMPTS = 10_000  # to find a free folder name


def run_name() -> str | None:
    """Name of the job's run folder, passed by the launcher; None for a single rank."""
    return os.environ.get(RUN_NAME_VARIABLE) if os.environ.get("WORLD_SIZE", "1") != "1" else None


class RunFolder:
    """Folder <output_dir>/<yyyymmdd>/<model_name>_<yaml stem>/<hhmmss> of one run, shared by its ranks."""

    def __init__(self, path: Path, made: list[Path]):
        """made: the folders that this run created, innermost first."""
        self.path = path
        self.made = made

    @property
    def name(self) -> str:
        """Identifier "yyyymmdd/hhmmss", from which other ranks and nodes derive their paths."""
        return f"{self.path.parent.parent.name}/{self.path.name}"

    def link_latest(self) -> None:
        """Updates the symbolic link `latest` beside the folder."""
        link, part = self.path.parent / LATEST, self.path.parent / f".{LATEST}_{secrets.token_hex(4)}"
        try:
            part.symlink_to(self.path.name)
            part.replace(link)
        except OSError as error:
            part.unlink(missing_ok=True)
            logger.warning("%s: not set: %s", link, error.strerror)

    def discard(self) -> None:
        """Removes the folder of a rejected run and the parents created for it."""
        if self.path in self.made and not (self.path / "result.jsonl").exists():
            shutil.rmtree(self.path, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty: another run uses it
                for folder in self.made[1:]:
                    folder.rmdir()


def create_run_folder(settings: Settings, yaml_file: Path, name: str | None = None) -> RunFolder:
    """Creates a unique folder for a run that starts now; with `name`, opens that of the job.

    Raises ValueError if it cannot be created.
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
        except FileNotFoundError:  # a rejected run has just removed the shared parent
            continue
    raise OSError(f"{parent} does not stay")


class LineFile:
    """JSON Lines file, created or replaced at the first write; lines are written through to the OS, without a buffer.

    A partially written line is truncated away. A file that is deleted during the run is restored.
    """

    def __init__(self, path: Path):
        self.path = path
        self.descriptor: int | None = None

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
            with contextlib.suppress(OSError):  # not a regular file
                os.ftruncate(self.descriptor, os.fstat(self.descriptor).st_size - written)
                os.lseek(self.descriptor, -written, os.SEEK_CUR)  # standard output may not be open for appending
            if part is not None:
                part.unlink(missing_ok=True)
            raise

    def close(self) -> Path:
        """Closes the file; returns its current path, even if it was moved. Raises OSError if it cannot be restored."""
        if self.descriptor is None:
            return self.path
        if is_deleted(self.descriptor):
            self._restore(self.descriptor)
        here = self.path
        with contextlib.suppress(OSError):
            if not here.exists() or not os.path.samestat(here.stat(), os.fstat(self.descriptor)):
                here = Path(os.readlink(f"/proc/self/fd/{self.descriptor}"))
        os.close(self.descriptor)
        self.descriptor = None
        return here

    def _open(self) -> tuple[int, Path | None]:
        """Opens a temporary file to replace the old one atomically, else the old one itself.

        Returns the descriptor, and the temporary file or None.
        """
        standard = STANDARD_STREAM.fullmatch(str(self.path))
        if standard:  # dup: a second open file description would have its own offset
            return os.dup(int(standard[1] or STANDARD_NUMBERS[self.path.name])), None
        target = self.path.resolve()
        if not self.path.exists() or self.path.is_file() and not os.path.ismount(target):
            part = target.with_name(f".{secrets.token_hex(4)}.part")
            with contextlib.suppress(OSError):  # the folder may not be writable
                descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
                if target.exists():
                    shutil.copymode(target, part)
                return descriptor, part
        # O_NONBLOCK: a pipe without reader is an error instead of blocking
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC | os.O_NONBLOCK
        descriptor = os.open(self.path, flags, 0o666)
        os.set_blocking(descriptor, True)
        return descriptor, None

    def _restore(self, deleted: int) -> None:
        """Copies the lines written so far to a new file of the same name, or of a free name beside it."""
        number, target = 1, self.path
        target.parent.mkdir(parents=True, exist_ok=True)
        while target.exists():
            number += 1
            target = self.path.with_name(f"{self.path.stem}_{number}{self.path.suffix}")
        self.descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        logger.warning("%s was deleted while it was written: its lines are in %s", self.path, target)
        self.path = target
        position = whole = 0
        try:
            while part := os.pread(deleted, 1 << 20, position):
                count = os.write(self.descriptor, part)
                if b"\n" in part[:count]:
                    whole = position + part.rindex(b"\n", 0, count) + 1
                position += count
        except OSError:
            os.ftruncate(self.descriptor, whole)
            raise
        finally:
            os.close(deleted)


def is_deleted(descriptor: int) -> bool:
    """Returns whether the regular file open as `descriptor` has been unlinked."""
    found = os.fstat(descriptor)
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 0


class Results:
    """Writes each result to several files. A file that fails is dropped; the run continues while one is left."""

    def __init__(self, paths: Sequence[Path]):
        self.files = [LineFile(path) for path in paths]
        self.failures: list[str] = []
        self.count = 0

    def write(self, record: dict[str, Any]) -> None:
        """Appends a result to every file; PartialFailure if none can be written."""
        text = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        line = text.encode("utf-8", "backslashreplace")  # \udXXX, as JSON writes lone surrogates
        for file in list(self.files):
            try:
                file.write(line)
            except OSError as error:
                self._give_up(file, error)
        if not self.files:
            raise PartialFailure(f"{self.failures[-1]}; {self.count} results are in it")
        self.count += 1

    def close(self) -> list[Path]:
        """Closes the files; returns their paths."""
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
