# SPDX-License-Identifier: Apache-2.0
"""Output files: early checks for writability, atomic replacement."""

import os
from pathlib import Path

import pytest

from executor.utils.files import check_output, replace


def test_check_does_not_change_the_file(tmp_path):
    kept, new = tmp_path / "kept", tmp_path / "new"
    kept.write_text("results")
    for file in (kept, new):
        check_output("--output", file)
    assert kept.read_text() == "results" and not new.exists()


def test_a_check_does_not_end_what_reads_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="cannot be written"):
        check_output("--output", pipe)  # no reader
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    check_output("--output", pipe)
    with pytest.raises(BlockingIOError):  # b"" would be EOF
        os.read(reader, 1)


@pytest.mark.parametrize("name", [".", "no/such/folder/file", "/proc/file"])
def test_unwritable_output_is_rejected(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^--output: {name} cannot be written: "):
        check_output("--output", Path(name))


def test_replacement_follows_symbolic_links(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(file)
    for text in ("first", "second"):
        replace(link, text)
        assert file.read_text() == text and link.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "file"
    replace(file, "whole")
    write_text = Path.write_text

    def disk_is_full(path, text, encoding):
        write_text(path, text[:2], encoding=encoding)
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", disk_is_full)
    with pytest.raises(OSError, match="no space"):
        replace(file, "another")
    assert file.read_text() == "whole" and list(tmp_path.iterdir()) == [file]


def test_write_without_room_for_a_temporary_file(tmp_path):
    file = tmp_path / ("n" * 253)  # no longer name is possible
    replace(file, "text")
    assert file.read_text() == "text"
    replace(Path("/dev/null"), "text")
    assert Path("/dev/null").is_char_device()
