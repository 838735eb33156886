# SPDX-License-Identifier: Apache-2.0
"""Files that results go to."""

from pathlib import Path


def check_writable(file: Path) -> None:
    """OSError if it cannot be written; leaves it as it is."""
    existed = file.exists()
    file.open("a").close()
    if not existed:
        file.unlink(missing_ok=True)  # another rank may have been faster


def replace(file: Path, text: str) -> None:
    """Writes the file so that there is always a whole one, the old or the new."""
    if file.exists() and not file.is_file():  # a device
        file.write_text(text, encoding="utf-8")
        return
    file = file.resolve()
    part = file.with_name(f"{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)
