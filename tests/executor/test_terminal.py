# SPDX-License-Identifier: Apache-2.0
"""Terminal output never ends or blocks a program. Each program runs as a process with its own streams."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from executor.launch import terminal

PRINTING = """
import logging, sys
from executor.launch.terminal import print_error, resilient_terminal
from executor.utils.logging_utils import setup_logging
with resilient_terminal():
    setup_logging("INFO", 0)
    for number in range(LINES):
        print("\\xe9 \\u6771\\u4eac \\U0001f3ad", number)
        logging.info("\\u6771\\u4eac %d", number)
        print("\\ud83d", file=sys.stderr, flush=True)
    open(sys.argv[1], "w").write("all done")
"""


def program(lines: int) -> list[str]:
    return [sys.executable, "-c", PRINTING.replace("LINES", str(lines))]


@pytest.mark.parametrize("encoding", ["gbk", "ascii", "latin-1", "utf-8", "utf-16"])
def test_any_encoding(encoding, tmp_path):
    done = subprocess.run(
        [*program(3), tmp_path / "file"], env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True
    )
    assert done.returncode == 0 and (tmp_path / "file").read_text() == "all done"
    text = done.stdout.decode(encoding)
    assert len(text.splitlines()) == 3 and text.splitlines()[2].endswith(" 2") and b"Traceback" not in done.stderr
    if encoding == "gbk":
        assert "東京" in text and "?" in text


def test_a_locale_without_utf8(tmp_path):
    environment = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PATH": os.environ["PATH"]}
    done = subprocess.run([*program(3), tmp_path / "file"], env=environment, capture_output=True)
    assert done.returncode == 0 and (tmp_path / "file").exists() and done.stdout.count(b"? ??") == 3


@pytest.mark.parametrize("closed", ["stdout", "stderr", "both"])
def test_a_closed_pipe(closed, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    streams = {name: writer if closed in (name, "both") else subprocess.DEVNULL for name in ("stdout", "stderr")}
    done = subprocess.run([*program(3000), tmp_path / "file"], **streams)
    os.close(writer)
    assert done.returncode == 0 and (tmp_path / "file").exists()


@pytest.mark.parametrize("closing", [">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_descriptors_that_are_not_there(closing, tmp_path):
    """A file opened later must not reuse a standard descriptor and receive the output."""
    command = f'exec "$@" {closing}'
    done = subprocess.run(["sh", "-c", command, "sh", *program(3), tmp_path / "file"], capture_output=True)
    assert done.returncode == 0 and (tmp_path / "file").read_text() == "all done"


def test_a_reader_that_pauses_holds_nothing_up(tmp_path):
    """Printing far more than the pipe buffer without a reader does not block the program."""
    process = subprocess.Popen([*program(6000), tmp_path / "file"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    deadline_s = time.monotonic() + 30
    while not (tmp_path / "file").exists() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert (tmp_path / "file").exists() and process.poll() is None
    assert len(process.stdout.read().splitlines()) == 6000 and process.wait() == 0


def test_dropped_output_is_counted(monkeypatch):
    monkeypatch.setattr(terminal, "MAX_QUEUED", 10)
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream, os.fdopen(reader) as read:
        out = terminal.Terminal(stream, terminal.Writer())
        for _ in range(10000):
            out.write("x" * 99 + "\n")
        pieces = [read.readline() for _ in range(10)]
        out.writer.drain(0.1)
        dropped = received = 0  # in several parts if the writer gets to run in between
        while dropped <= 8000 and received < 2000:
            line = read.readline()
            received += not line.startswith("[")
            dropped += int(line[1:].split()[0]) if line.startswith("[") else 0
        assert pieces[0] == "x" * 99 + "\n" and dropped > 8000


BAR = """
import sys
from tqdm import tqdm
from executor.launch.terminal import print_error, resilient_terminal
with resilient_terminal():
    for _ in tqdm(range(3)):
        pass
    progress = tqdm(total=3)
    progress.update()
    print_error("a\\nb \\x1b[31m" + "x" * 1000)
"""


def test_error_starts_on_a_new_line():
    done = subprocess.run([sys.executable, "-c", BAR], capture_output=True, text=True)
    [line] = [line for line in done.stderr.splitlines() if "error" in line]
    assert line.startswith("error: a b \\x1b[31mxxx") and len(line) < 500


EARLY = """
import os, runpy, signal, sys
sys.argv = ["-m"]
runpy.run_module("executor.utils.known_names")
os.kill(os.getpid(), getattr(signal, NAME))
"""
LIBRARY = "import signal, executor; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signal_during_import_prints_no_traceback(name):
    code = EARLY.replace("NAME", repr(name))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == f"error: interrupted by {name}\n"
    assert subprocess.run([sys.executable, "-c", LIBRARY]).returncode == 0


def test_other_programs_keep_their_signal_handlers(tmp_path):
    """sys.argv[0] is "-m" during the import, as for commands of this package."""
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "__init__.py").write_text("from executor import SamplingParams")
    (tmp_path / "program" / "__main__.py").write_text(LIBRARY)
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    done = subprocess.run([sys.executable, "-m", "program"], env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0


COMMAND = """
import sys, time
from executor.launch.command import run_command
def body():
    print("ready", flush=True)
    while True:
        time.sleep(0.1)  # a signal just before a long sleep would wait for its end
sys.exit(run_command(body))
"""


CONVERTING = """
import os, signal, sys
from executor.launch.command import run_command
def body():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        raise ERROR("a library turned it into another error")
sys.exit(run_command(body))
"""


@pytest.mark.parametrize("error", ["ModuleNotFoundError", "ValueError"])
def test_interrupt_that_a_library_converts_is_an_interrupt(error):
    """Lazy imports do that: an interrupt inside one surfaces as an import error."""
    done = subprocess.run([sys.executable, "-c", CONVERTING.replace("ERROR", error)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "error: interrupted by SIGINT\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_command_names_the_signal(number):
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1 and err == f"error: interrupted by {number.name}\n"


def test_a_signal_does_not_wait_for_a_reader_that_pauses(tmp_path: Path):
    code = COMMAND.replace('print("ready", flush=True)', f"print('x' * 10**6); open({str(tmp_path / 'file')!r}, 'w')")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while not (tmp_path / "file").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 1


def test_nohup_is_respected(tmp_path: Path):
    command = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", sys.executable, "-c", COMMAND]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.kill()
    process.wait()
