# SPDX-License-Identifier: Apache-2.0
"""Output files: early checks and atomic replacement."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path


def check_output(option: str, file: Path, inputs: Iterable[Path] = ()) -> None:
    """Raises ValueError that names the option if the file is not writable or one of `inputs`; does not change it."""
    try:
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            file.unlink()
        except FileExistsError:  # O_NONBLOCK: a pipe without reader is an error instead of blocking
            descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):  # a pipe stays open: closing it is EOF to its reader
            os.close(descriptor)
        same = next((path for path in inputs if is_same(file, path)), None)
    except (OSError, ValueError) as error:  # ValueError: a null byte
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{option}: {file} cannot be written: {reason}") from None
    if same is not None:
        raise ValueError(f"{option}: {file} is {same}, which this run reads: choose another file")


def is_same(file: Path, other: Path) -> bool:
    """Returns whether both paths are the same regular file."""
    try:
        found, there = file.stat(), other.stat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and os.path.samestat(found, there)


def files_in(folder: Path) -> list[Path]:
    """Files in a folder; the path itself if it is a file; empty if it does not exist."""
    try:
        return list(folder.iterdir()) if folder.is_dir() else [folder]
    except OSError:
        return []


def replace(file: Path, text: str) -> None:
    """Replaces the file atomically; writes in place if it is a device or the folder takes no temporary file."""
    file = file.resolve()
    part = file.with_name(f"{file.name}.part")
    if (file.exists() and not file.is_file()) or not can_be_made(part):  # a device, or no temporary file can be created
        file.write_text(text, encoding="utf-8")
        return
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def can_be_made(file: Path) -> bool:
    try:
        file.touch()
    except OSError:
        return False
    return True
