# SPDX-License-Identifier: Apache-2.0
"""tests/conftest.py in pytest sessions of its own, and what tests/run.sh passes to pytest."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import conftest

TESTS = """
import pytest

@pytest.mark.parametrize("device", ["cpu", "npu"])
def test_device(device):
    if device == "npu":
        pytest.skip("no NPU here")

@pytest.mark.xfail
def test_expected_to_fail():
    assert False
"""
SKIPPED = "test_some.py::test_device[npu]"
WAYS = {"alone": ["-p", "no:xdist"], "workers": ["-n", "2", "--dist", "loadgroup"]}


def run(folder: Path, *options: str, files: dict[str, str], allowed: str = "", ci: str = "true"):
    """Runs a session with this conftest.py on the given test files."""
    shutil.copy(Path(__file__).with_name("conftest.py"), folder)
    (folder / "allowed_skips.txt").write_text(allowed)
    for name, text in files.items():
        (folder / name).write_text(text)
    command = [sys.executable, "-m", "pytest", *options]
    return subprocess.run(command, cwd=folder, env=os.environ | {"CI": ci}, capture_output=True, text=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("ci", "allowed", "exit_code", "printed"),
    [
        ("", "", 0, "1 passed, 1 skipped, 1 xfailed"),
        ("true", f"# comment\n\n{SKIPPED} | needs an NPU\n", 0, "1 passed, 1 skipped, 1 xfailed"),
        ("true", "test_some.py::test_dev* | needs an NPU\n", 0, "1 passed, 1 skipped, 1 xfailed"),
        ("true", "test_other.py::* | needs an NPU\n", 1, f"{SKIPPED} | Skipped: no NPU here"),
        ("true", f"{SKIPPED}\n", 4, "allowed_skips.txt:1: "),
    ],
)
def test_strict_skips(tmp_path: Path, way: str, ci: str, allowed: str, exit_code: int, printed: str) -> None:
    result = run(tmp_path, *WAYS[way], files={"test_some.py": TESTS}, allowed=allowed, ci=ci)
    assert result.returncode == exit_code, result.stdout
    assert printed in result.stdout + result.stderr


@pytest.mark.parametrize("way", WAYS)
def test_skipped_files_count(tmp_path: Path, way: str) -> None:
    """Each of them, also if several are skipped at the same line, and along with tests that run."""
    files = {"needs.py": "import pytest\ndef needs_npu():\n    pytest.skip('no NPU', allow_module_level=True)\n"}
    files |= {f"test_{name}.py": "import needs\nneeds.needs_npu()\n" for name in "abc"}
    files |= {"test_d.py": "import pytest\npytest.importorskip('no_such_module')\n", "test_some.py": TESTS}
    result = run(tmp_path, *WAYS[way], files=files, allowed=f"{SKIPPED} | needs an NPU\ntest_b.py | needs one\n")
    assert result.returncode == 1, result.stdout
    listed = re.findall(r"^(test_\w+\.py) \| .*no.such.module|^(test_\w+\.py) \| Skipped: no NPU$", result.stdout, re.M)
    assert sorted(filter(None, sum(listed, ()))) == ["test_a.py", "test_c.py", "test_d.py"]


def test_files_of_a_group_stay_on_one_worker(tmp_path: Path) -> None:
    """Files with a module fixture, and files of one mark; other tests are distributed."""
    writing = """
import os, pytest, time

@pytest.mark.parametrize("index", range(4))
def test_some(index):
    time.sleep(0.05)
    with open(f"{__name__}.txt", "a") as file:
        file.write(os.environ["PYTEST_XDIST_WORKER"] + " ")
"""
    fixture = "@pytest.fixture(scope='module', autouse=True)\ndef made():\n    open('made.txt', 'a').write('x')\n"
    mark = "pytestmark = pytest.mark.xdist_group('alone')\n"
    files = {"shared": writing + fixture, "one": writing + mark, "other": writing + mark}
    result = run(tmp_path, *WAYS["workers"], files={f"test_{name}.py": text for name, text in files.items()})
    assert result.returncode == 0 and "12 passed" in result.stdout, result.stdout
    assert (tmp_path / "made.txt").read_text() == "x"
    workers = {name: set((tmp_path / f"test_{name}.txt").read_text().split()) for name in files}
    assert {name: len(found) for name, found in workers.items()} == {"shared": 1, "one": 1, "other": 1}
    assert workers["one"] == workers["other"]
    result = run(tmp_path, *WAYS["workers"], "test_free.py", files={"test_free.py": writing})
    assert result.returncode == 0 and len(set((tmp_path / "test_free.txt").read_text().split())) == 2, result.stdout


@pytest.mark.parametrize(
    ("cores", "files", "workers"), [(2, 10, 3), (1, 10, 0), (1.5, 10, 0), (64, 100, 8), (8, 6, 3), (2, 3, 0)]
)
def test_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: float, files: int, workers: int) -> None:
    """One more than usable cores; none for few files or one core. For a folder, files or node ids."""
    monkeypatch.delenv("PYTEST_XDIST_AUTO_NUM_WORKERS", raising=False)
    monkeypatch.setattr(conftest, "usable_cores", lambda: cores)
    names = [f"test_{number}.py" for number in range(files)]
    for name in names:
        (tmp_path / name).touch()
    for selected in (["."], names, [f"{name}::test_{index}" for name in names for index in range(3)]):
        config = pytest.Config(
            pytest.PytestPluginManager(),
            invocation_params=pytest.Config.InvocationParams(args=selected, plugins=None, dir=tmp_path),
        )
        config.args = selected
        assert conftest.pytest_xdist_auto_num_workers(config) == workers


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ([], ["-n", "auto", "--dist", "loadgroup"]),
        (["-n", "0", "tests/ops"], ["-n", "auto", "--dist", "loadgroup", "-n", "0", "tests/ops"]),  # the last holds
        (["-p", "no:xdist", "-k", "two words"], ["-p", "no:xdist", "-k", "two words"]),
        (["-pno:xdist"], ["-pno:xdist"]),
    ],
)
def test_run_sh(tmp_path: Path, given: list[str], passed: list[str]) -> None:
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
case "$*" in
"-m pytest"*) shift 2; printf '%s\\n' "$@" ;;
"-m "*) ;;
*) exec "{sys.executable}" "$@" ;;
esac
"""
    )
    python.chmod(0o755)
    command = ["bash", Path(__file__).with_name("run.sh"), *given]
    result = subprocess.run(command, env=os.environ | {"PYTHON": str(python)}, capture_output=True, text=True)
    assert (result.returncode, result.stdout.splitlines()) == (0, passed), result.stderr
