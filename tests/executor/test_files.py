# SPDX-License-Identifier: Apache-2.0
"""Files of results are found writable before they are needed, and are always whole."""

import os
from pathlib import Path

import pytest

from executor.utils.files import check_output, replace


def test_a_check_leaves_a_file_as_it_is(tmp_path):
    kept, new = tmp_path / "kept", tmp_path / "new"
    kept.write_text("results")
    for file in (kept, new):
        check_output("--output", file)
    assert kept.read_text() == "results" and not new.exists()


def test_a_check_does_not_end_what_reads_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="cannot be written"):
        check_output("--output", pipe)  # nobody reads
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    check_output("--output", pipe)
    with pytest.raises(BlockingIOError):  # "" would be the end of the file
        os.read(reader, 1)


@pytest.mark.parametrize("name", [".", "no/such/folder/file", "/proc/file"])
def test_what_cannot_be_written_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^--output: {name} cannot be written: "):
        check_output("--output", Path(name))


def test_a_file_is_replaced_where_it_lies(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(file)
    for text in ("first", "second"):
        replace(link, text)
        assert file.read_text() == text and link.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}


def test_a_file_is_whole_if_writing_ends_early(tmp_path, monkeypatch):
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


def test_a_file_that_nothing_can_stand_beside_is_written_too(tmp_path):
    file = tmp_path / ("n" * 253)  # a longer name is impossible
    replace(file, "text")
    assert file.read_text() == "text"
    replace(Path("/dev/null"), "text")
    assert Path("/dev/null").is_char_device()
