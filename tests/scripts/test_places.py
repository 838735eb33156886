# SPDX-License-Identifier: Apache-2.0
"""infer.sh at any repository path, called in any way, from any current directory."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.scripts.launching import ROOT, infer, refused, set_traps, shell, sprung, started

# Paths of the script and ways to call it


DEFAULT = "models/qwen3_moe/config/demo.yaml"


@pytest.mark.parametrize("cdpath", ["", "/tmp:.."])
@pytest.mark.parametrize("called", ["file", "chain", "relative", "folder/qwen3_moe/infer.sh", "parent/r/{script}"])
def test_links_to_the_script(repo: Path, tmp_path: Path, called: str, cdpath: str) -> None:
    script = "models/qwen3_moe/infer.sh"
    links = tmp_path / "x/my links"
    for decoy in (tmp_path, tmp_path / "x"):  # the neighbours of a link are not the repository
        (decoy / "executor/scripts").mkdir(parents=True)
        for name in ("set_env.sh", "function.sh"):
            (decoy / "executor/scripts" / name).write_text("echo the wrong scripts; exit 3\n")
    links.mkdir()
    (links / "file").symlink_to(repo / script)
    (links / "relative").symlink_to(f"../../{repo.name}/{script}")
    (links / "chain").symlink_to("relative")
    (links / "folder").symlink_to(repo / "models")
    (links / "parent").mkdir()
    (links / "parent/r").symlink_to(repo)
    for cwd in (links, Path("/")):
        path = os.path.relpath(links / called.format(script=script), cwd)
        report = started(shell("bash", path, cwd=cwd, CDPATH=cdpath))
        assert report["argv"] == ["--yaml_file_path", str(repo / DEFAULT)]
        assert report["executor"] == str(repo / "executor/launch/__main__.py")


@pytest.mark.parametrize("name", ["two\nlines", "end\n", "-dash", "a'\"$HOME*", "é 中文", "\x1b[31m"])
def test_unusual_repository_paths(repo: Path, tmp_path: Path, name: str) -> None:
    moved = repo.rename(tmp_path / name)
    report = started(shell("bash", "-c", 'exec bash "$0"', f"./{name}/models/qwen3_moe/infer.sh", cwd=tmp_path))
    assert report["argv"] == ["--yaml_file_path", str(moved / DEFAULT)]
    assert report["executor"] == str(moved / "executor/launch/__main__.py")
    assert "YAML file: 'nope'" in refused(infer(moved, "--yaml", "nope"))


def test_colon_in_the_repository_path(repo: Path, tmp_path: Path) -> None:
    assert "has a colon" in refused(infer(repo.rename(tmp_path / "a:b")))


def test_script_found_by_path(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/infer.sh").symlink_to(repo / "models/qwen3_moe/infer.sh")
    for folder in (tmp_path / "bin", repo / "models/qwen3_moe"):
        path = f"{folder}:{os.environ['PATH']}"
        assert started(shell("bash", "infer.sh", "--yaml", "other", cwd=Path("/"), PATH=path))["argv"][1].startswith(
            "/"
        )


def test_sourced_script_does_not_change_the_shell(repo: Path) -> None:
    script = "models/qwen3_moe/infer.sh"
    command = f'before="$-"; source {script} --yaml other; echo "$? $0 $-" | sed "s/$before/same/"'
    result = shell("bash", "-c", command, "me", cwd=repo, STUB_EXIT_CODE="7")
    report, after = result.stdout.splitlines()
    assert json.loads(report)["argv"][1].endswith("/other.yaml") and after == "7 me same", result


@pytest.mark.parametrize("other", ["dash", "busybox", "bash"])
def test_other_shells_are_rejected(repo: Path, tmp_path: Path, other: str) -> None:
    (tmp_path / "bin").mkdir()
    sh = tmp_path / "bin/sh"
    sh.symlink_to(shutil.which(other) or shutil.which("bash"))
    script = repo / "models/qwen3_moe/infer.sh"
    is_bash = sh.resolve().name == "bash"  # then unset BASH_VERSION
    sourced = shell(sh, "-c", f"unset BASH_VERSION; . '{script}'; echo \"status $?\"", cwd=repo)
    assert sourced.stdout == "status 2\n" and "run: bash infer.sh" in sourced.stderr
    if not is_bash:
        assert "run: bash infer.sh" in refused(shell(sh, script, cwd=repo))


def test_bash_as_sh(repo: Path) -> None:
    assert started(shell("bash", "--posix", "models/qwen3_moe/infer.sh", cwd=repo))["argv"][1] == str(repo / DEFAULT)


def test_script_without_its_repository(repo: Path, tmp_path: Path) -> None:
    script = repo / "models/qwen3_moe/infer.sh"
    for trap in ("executor/scripts", "x/executor/scripts"):
        (tmp_path / "a/b/c" / trap).mkdir(parents=True)
        for name in ("set_env.sh", "function.sh"):
            (tmp_path / "a/b/c" / trap / name).write_text("echo a foreign script; exit 3\n")
    copy = tmp_path / "a/b/infer.sh"
    shutil.copy(script, copy)
    assert "it is not inside its repository" in refused(shell("bash", copy, cwd=tmp_path))
    piped = shell("bash", cwd=tmp_path / "a/b/c", stdin=script.read_text())
    assert "it is not inside its repository" in refused(piped)


# The current directory


@pytest.fixture
def old_python(tmp_path: Path) -> Path:
    """This Python with the features of Python 3.10 only."""
    script = tmp_path / "python3.10"
    script.write_text(f'#!/bin/sh\nunset PYTHONSAFEPATH\nexec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return script


@pytest.mark.parametrize(
    ("arguments", "paths"),
    [(["-c", "import colorsys"], ""), (["-m", "executor.launch"], ""), (["-c", "import colorsys"], ":")],
)
def test_traps_are_effective(tmp_path: Path, arguments: list[str], paths: str) -> None:
    """Which ones depends on what this Python imports by itself."""
    traps = set_traps(tmp_path / "shared")
    shell(sys.executable, *arguments, cwd=traps, PYTHONPATH=paths)
    assert sprung(traps)


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("paths", ["", ":", "/nowhere:", ":/nowhere", "/a:::/b::"])
def test_nothing_of_the_current_folder_is_executed(
    repo: Path, tmp_path: Path, old_python: Path, paths: str, is_old: bool
) -> None:
    knows_safe_path = sys.version_info >= (3, 11) and not is_old
    (repo / "executor/launch/__main__.py").write_text(
        "import json, os, random, re, subprocess, sys\n"
        + ("subprocess.run([sys.executable, '-m', 'colorsys'], check=True)\n" if knows_safe_path else "")
        + "print(json.dumps([sys.path, os.environ['PYTHONPATH'].split(':'), sys.argv]))\n"
    )
    traps = set_traps(tmp_path / "shared")
    lists = {"PYTHONPATH": paths, "LD_LIBRARY_PATH": paths} if paths else {}
    python = old_python if is_old else sys.executable
    searched, exported, argv = started(infer(repo, cwd=traps, PYTHON=str(python), **lists))
    assert sprung(traps) == []
    for folders in (searched, exported):
        assert folders[0] == str(repo) and not {"", ".", str(traps)} & set(folders)
    assert argv == [str(repo / "executor/launch/__main__.py"), f"--yaml_file_path={repo / DEFAULT}"]


def test_user_folders_stay_in_pythonpath(repo: Path, tmp_path: Path) -> None:
    (repo / "executor/launch/__main__.py").write_text("import json, os\nprint(json.dumps(dict(os.environ)))\n")
    found = started(infer(repo, PYTHONPATH=":/a b::lib:", LD_LIBRARY_PATH="/x::/y"))
    assert found["PYTHONPATH"] == f"{repo}:/a b:lib" and found["LD_LIBRARY_PATH"] == "/x:/y"
    assert "LD_LIBRARY_PATH" not in started(infer(repo)) or os.environ.get("LD_LIBRARY_PATH")


def test_multi_rank_job_in_a_folder_of_traps(tmp_path: Path, old_python: Path) -> None:
    """The real launcher and ranks, with all their imports, without PYTHONSAFEPATH."""
    traps = set_traps(tmp_path / "shared")
    sizes = ("world_size=2", "parallel_config.attn_tp_size=2", "parallel_config.moe_tp_size=2")
    settings = [part for value in ("device=cpu", "data_config.max_new_tokens=2", *sizes) for part in ("--set", value)]
    result = infer(ROOT, *settings, "--output", str(tmp_path / "out.jsonl"), cwd=traps, OMP_NUM_THREADS="1",
                   PYTHON=str(old_python))  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "summary" in json.loads((tmp_path / "out.jsonl").read_text().splitlines()[-1])
    assert sprung(traps) == []
