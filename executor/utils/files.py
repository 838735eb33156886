# SPDX-License-Identifier: Apache-2.0
"""Files that results go to."""

from pathlib import Path


def check_output(option: str, file: Path) -> None:
    """ValueError that names the option if the file cannot be written; leaves it as it is."""
    try:
        if file.exists():
            file.open("a").close()
        else:
            file.touch()
            file.unlink()
    except OSError as error:
        raise ValueError(f"{option}: {file} cannot be written: {error.strerror}") from None


def replace(file: Path, text: str) -> None:
    """Writes the file so that there is always a whole one, the old or the new."""
    file = file.resolve()
    part = file.with_name(f"{file.name}.part")
    if (file.exists() and not file.is_file()) or not can_be_made(part):  # a device, or nothing may stand beside it
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
