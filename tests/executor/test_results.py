# SPDX-License-Identifier: Apache-2.0
"""A folder for every run, and files of results that lose nothing that was written."""

import concurrent.futures
import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from executor.config import Settings
from executor.launch import results
from executor.launch.rank import PartialFailure
from executor.launch.results import LineFile, Results, create_run_folder

YAML = Path("some/where/tiny.yaml")


def settings(root: Path) -> Settings:
    return Settings(model_name="m", model_path="p", output_dir=str(root))


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_runs_of_one_second_have_folders_of_their_own(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: create_run_folder(settings(tmp_path / "out"), YAML), range(40)))
    paths = [folder.path for folder in folders]
    assert len(set(paths)) == 40 and {path.parent.name for path in paths} == {"m_tiny"}
    assert all(
        path.is_dir() and results.RUN_NAME.fullmatch(folder.name) for path, folder in zip(paths, folders, strict=True)
    )
    for folder in folders:
        folder.link_latest()
        assert (folder.path.parent / "latest").resolve() == folder.path
    assert len(list(paths[0].parent.iterdir())) == 41


def test_ranks_adopt_the_folder_of_their_job(tmp_path):
    first = create_run_folder(settings(tmp_path), YAML)
    for _ in range(2):
        assert create_run_folder(settings(tmp_path), YAML, first.name).path == first.path
    elsewhere = create_run_folder(settings(tmp_path / "other node"), YAML, first.name)
    assert elsewhere.path.is_dir() and elsewhere.name == first.name
    for name in ("../../etc", "20261130", "20261130/..", "20261130/142233/x", "a/b", ""):
        with pytest.raises(ValueError, match="is not of the form"):
            create_run_folder(settings(tmp_path), YAML, name)


def test_a_refused_run_leaves_nothing(tmp_path):
    kept = tmp_path / "mine"
    kept.mkdir()
    folder = create_run_folder(settings(kept / "deep" / "er"), YAML)
    (folder.path / "log_0.log").write_text("x")
    folder.discard()
    assert tree(tmp_path) == ["mine"]
    good = create_run_folder(settings(kept), YAML)
    (good.path / "result.jsonl").write_text("{}\n")
    refused = create_run_folder(settings(kept), YAML)
    before = tree(kept)
    refused.discard()
    assert tree(kept) == [name for name in before if refused.path.name not in name.split("/")]
    good.discard()
    assert (good.path / "result.jsonl").exists()


@pytest.mark.parametrize("where", ["file/out", "/proc/out", "~nobody-here/x", "x" * 300, "a\0b"])
def test_a_folder_that_cannot_be_made_names_the_key(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(ValueError, match="^output_dir: .*cannot be made: ") as raised:
        create_run_folder(dataclasses.replace(settings(tmp_path), output_dir=where), YAML)
    assert "\n" not in str(raised.value) and tree(tmp_path) == ["file"]


def test_latest_that_is_no_link_is_left_alone(tmp_path):
    folder = create_run_folder(settings(tmp_path), YAML)
    mine = folder.path.parent / "latest"
    mine.mkdir()
    (mine / "notes").touch()
    folder.link_latest()
    assert (mine / "notes").exists() and len(list(folder.path.parent.iterdir())) == 2


def test_a_file_is_replaced_at_the_first_line(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    path.chmod(0o640)
    reader = path.open()
    file = LineFile(path)
    assert path.read_text() == "old"
    file.write(b"1\n")
    assert path.read_text() == "1\n" and reader.read() == "old" and path.stat().st_mode & 0o777 == 0o640
    file.write(b"2\n")
    assert file.close() == path and path.read_text() == "1\n2\n" and tree(tmp_path) == ["out.jsonl"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    file = LineFile(tmp_path / "link")
    file.write(b"1\n")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "1\n"


def test_two_writers_of_one_path_tear_no_line(tmp_path):
    """Both write at once: the file is one's, and the other's results are in one beside it."""
    path, lines = tmp_path / "out.jsonl", [[f"{writer}" * 3000 + "\n" for _ in range(50)] for writer in "ab"]
    both = threading.Barrier(2)

    def write(own: list[str]) -> None:
        file = LineFile(path)
        for line in own:
            file.write(line.encode())
            both.wait(10)
        file.close()

    threads = [threading.Thread(target=write, args=(own,)) for own in lines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    written = [line for file in tmp_path.iterdir() for line in file.read_text().splitlines(keepends=True)]
    assert sorted(written) == sorted(sum(lines, []))


@pytest.mark.parametrize("then", ["write", "close"])
def test_a_deleted_file_is_restored(then, tmp_path):
    path = tmp_path / "run" / "result.jsonl"
    path.parent.mkdir()
    file = LineFile(path)
    file.write(b"1\n")
    shutil.rmtree(path.parent)
    if then == "write":
        file.write(b"2\n")
    assert file.close() == path and path.read_text() == ("1\n2\n" if then == "write" else "1\n")


def test_a_moved_file_is_followed(tmp_path):
    path = tmp_path / "run" / "result.jsonl"
    path.parent.mkdir()
    file = LineFile(path)
    file.write(b"1\n")
    path.parent.rename(tmp_path / "moved")
    file.write(b"2\n")
    assert file.close() == tmp_path / "moved" / "result.jsonl"
    assert (tmp_path / "moved" / "result.jsonl").read_text() == "1\n2\n"


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from executor.launch.rank import PartialFailure
from executor.launch.results import Results
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (120, 120))
results = Results([Path(name) for name in sys.argv[1:]])
for number in range(3):
    results.write({"n": number, "text": "x" * 30})
print(results.failures)
"""


def test_a_full_disk_keeps_whole_lines(tmp_path):
    """The limit on a file's size ends a write in the middle of a line, as a full disk does."""
    paths = [tmp_path / "a", tmp_path / "b"]
    done = subprocess.run([sys.executable, "-c", FULL_DISK, *paths], capture_output=True, text=True)
    assert "2 results are in it" in done.stderr.splitlines()[-1] and "File too large" in done.stderr
    for path in paths:
        lines = path.read_text().splitlines(keepends=True)
        assert [json.loads(line)["n"] for line in lines] == [0, 1] and lines[-1].endswith("\n")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 120


LONG_LINE = b"x" * 99 + b"\n"


@pytest.fixture
def limited_files():
    """No file becomes longer than 1150 bytes: eleven lines and a half."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1150, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def write_until_full(file: LineFile) -> None:
    with pytest.raises(OSError, match="too large"):
        while True:
            file.write(LONG_LINE)


def test_a_full_disk_cuts_only_the_own_last_line(limited_files, tmp_path):
    """Of a file that somebody else has shortened, or that holds more than the results, as standard output may."""
    file = LineFile(tmp_path / "shortened")
    for _ in range(5):
        file.write(LONG_LINE)
    os.truncate(tmp_path / "shortened", 0)
    write_until_full(file)
    assert (tmp_path / "shortened").read_bytes() == 11 * LONG_LINE
    for flags in (os.O_APPEND, 0):
        (tmp_path / "log").write_bytes(2 * LONG_LINE)
        descriptor = os.open(tmp_path / "log", os.O_WRONLY | flags)
        os.lseek(descriptor, 0, os.SEEK_END)
        write_until_full(LineFile(Path(f"/dev/fd/{descriptor}")))
        os.write(descriptor, b"end")
        os.close(descriptor)
        assert (tmp_path / "log").read_bytes() == 11 * LONG_LINE + b"end"


def test_a_file_is_restored_in_whole_lines(limited_files, tmp_path):
    file = LineFile(tmp_path / "a")
    for _ in range(5):
        file.write(LONG_LINE)
    (tmp_path / "a").unlink()
    resource.setrlimit(resource.RLIMIT_FSIZE, (250, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(OSError, match="too large"):
        file.write(LONG_LINE)
    assert (tmp_path / "a").read_bytes() == 2 * LONG_LINE


def test_a_file_that_is_moved_and_replaced_is_followed(tmp_path):
    file = LineFile(tmp_path / "a")
    file.write(b"1\n")
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "a").write_text("another's")
    file.write(b"2\n")
    assert file.close() == tmp_path / "b" and (tmp_path / "b").read_text() == "1\n2\n"


def test_a_pipe_without_a_reader_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    written = Results([tmp_path / "good", tmp_path / "pipe"])
    written.write({"n": 1})
    assert written.close() == [tmp_path / "good"] and "pipe cannot be written" in written.failures[0]


def test_no_file_left_ends_the_run():
    line = "^/dev/full cannot be written: No space left on device; 0 results are in it$"
    with pytest.raises(PartialFailure, match=line):
        Results([Path("/dev/full")]).write({"n": 1})


def test_a_file_that_fails_does_not_end_the_other(tmp_path):
    written = Results([tmp_path / "good", Path("/dev/full")])
    for number in range(3):
        written.write({"n": number})
    assert written.close() == [tmp_path / "good"]
    assert written.failures == ["/dev/full cannot be written: No space left on device"]
    assert len((tmp_path / "good").read_text().splitlines()) == 3


def test_numbers_that_are_not_finite_are_no_results(tmp_path):
    with pytest.raises(ValueError):
        Results([tmp_path / "a"]).write({"tpot_ms": float("nan")})


def test_pipes_and_standard_output(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    file = LineFile(tmp_path / "pipe")
    file.write(b"1\n")
    file.write(b"2\n")
    file.close()
    assert os.read(reader, 99) == b"1\n2\n"
    os.close(reader)
    code = "from executor.launch.results import *\nfile = LineFile(Path('/dev/stdout'))\n"
    code += "file.write(b'1\\n')\nfile.close()\nprint(2)"
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "1\n2\n"
