# SPDX-License-Identifier: Apache-2.0
"""infer.sh: options, selection of Python, environment, creation of .venv."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.scripts.launching import infer, refused, set_traps, sprung, started


def add_package(python: Path, name: str, version: str = "1.0") -> None:
    """Installs an empty package with a version for `python`."""
    site_packages = next(python.parents[1].glob("lib/python*/site-packages"))
    (site_packages / name).mkdir()
    (site_packages / name / "__init__.py").touch()
    (site_packages / f"{name}-{version}.dist-info").mkdir()
    (site_packages / f"{name}-{version}.dist-info/METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    )


# Options


def test_default_yaml(repo: Path, tmp_path: Path) -> None:
    shadow = tmp_path / "elsewhere/executor"
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").touch()
    (shadow / "launch.py").write_text("raise SystemExit('the wrong executor')")
    report = started(infer(repo, cwd=shadow.parent))
    assert report["argv"] == ["--yaml_file_path", str(repo / "models/qwen3_moe/config/demo.yaml")]
    assert report["executor"] == str(repo / "executor/launch/__main__.py")


def test_edited_default(repo: Path) -> None:
    script = repo / "models/qwen3_moe/infer.sh"
    script.write_text(script.read_text().replace("YAML_FILE_NAME=demo.yaml", "YAML_FILE_NAME=other.yaml"))
    assert started(infer(repo))["argv"][1].endswith("/other.yaml")
    script.write_text(script.read_text().replace("YAML_FILE_NAME=other.yaml", "YAML_FILE_NAME=gone.yaml"))
    assert "YAML_FILE_NAME: no such YAML file: 'gone.yaml'" in refused(infer(repo))


@pytest.mark.parametrize("name", ["other", "other.yaml", "models/qwen3_moe/config/other", "{repo}/mine.yaml", "mine"])
def test_yaml_by_name_and_path(repo: Path, name: str) -> None:
    (repo / "mine.yaml").touch()
    path = Path(started(infer(repo, "--yaml", name.format(repo=repo)))["argv"][1])
    expected = "mine.yaml" if "mine" in name else "models/qwen3_moe/config/other.yaml"
    assert (repo / path).resolve() == repo / expected


def test_paths_are_relative_to_the_caller(repo: Path, tmp_path: Path) -> None:
    cwd = tmp_path / "where I am"
    cwd.mkdir()
    (cwd / "a b.yaml").touch()
    argv = started(infer(repo, "--yaml", "./a b.yaml", "--output", "out dir/x.jsonl", cwd=cwd))["argv"]
    assert argv == ["--yaml_file_path", "./a b.yaml", "--output", "out dir/x.jsonl"]


def test_set_values_are_passed_verbatim(repo: Path) -> None:
    values = ["a.b=two words", "a.c=[1, 'x', \"y\"]", "a.d=$HOME `id` \\n *", "a.e=", "a.f={k: -1}"]
    flags = [argument for value in values for argument in ("--set", value)]
    assert started(infer(repo, *flags))["argv"][2:] == flags
    assert started(infer(repo, *(f"--set={value}" for value in values)))["argv"][2:] == flags


def test_values_that_begin_with_a_dash_are_values(repo: Path) -> None:
    (repo / "-x.yaml").touch()
    given = started(infer(repo, "--yaml", "-x.yaml", "--set", "-x=1", "--output", "-"))["given"]
    assert given == ["--yaml_file_path=-x.yaml", "--set=-x=1", "--output=-"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--yml", "demo"], "unknown option '--yml'"),
        (["demo.yaml"], "unknown option 'demo.yaml'"),
        (["--yaml"], "--yaml needs an argument"),
        (["--yaml="], "--yaml needs an argument"),
        (["--set", "--output", "x"], "--set needs an argument"),
        (["--set", "a.b=1", "--output"], "--output needs an argument"),
        (["--yaml", "nope"], "--yaml: no such YAML file: 'nope' (in models/qwen3_moe/config: demo.yaml other.yaml)"),
        (["--yaml", "models"], "no such YAML file: 'models'"),
        (["--yaml", "no\n\x1b[31m\x7f\x9bpe"], r"no such YAML file: 'no\x0a\x1b[31m\x7f\x9bpe'"),
        (["--yaml", "没有/é 🎭"], "no such YAML file: '没有/é 🎭'"),
        (["--yaml", "no" * 10_000], "--yaml: no such YAML file: 'nono"),
        (["--" + "x\t" * 60_000], r"unknown option '--x\x09x"),
        ([os.fsdecode(b"--\xff\xc3")], "unknown option '--"),
    ],
)
def test_invalid_options(repo: Path, arguments: list[str], named: str) -> None:
    assert named in refused(infer(repo, *arguments))


def test_help(repo: Path) -> None:
    result = infer(repo, "--help")
    assert result.returncode == 0 and "--output FILE" in result.stdout and "demo.yaml other.yaml" in result.stdout


@pytest.mark.parametrize("code", [1, 2, 77])
def test_exit_code_is_that_of_the_executor(repo: Path, code: int) -> None:
    assert infer(repo, STUB_EXIT_CODE=str(code)).returncode == code


def test_nodes_of_set_env(repo: Path) -> None:
    assert started(infer(repo))["nodes"] == ["127.0.0.1", "29500", "120", ""]
    set_env = repo / "executor/scripts/set_env.sh"
    set_env.write_text(set_env.read_text().replace("IPs=('127.0.0.1')", "IPs=('10.0.0.1' head)"))
    assert started(infer(repo, MASTER_PORT="4000"))["nodes"] == ["10.0.0.1 head", "4000", "120", ""]
    assert started(infer(repo, NODE_IPS="a b", RENDEZVOUS_TIMEOUT_S="5"))["nodes"] == ["a b", "29500", "5", ""]
    set_env.write_text(set_env.read_text() + "job_secret='two words'\n")
    assert started(infer(repo))["nodes"][3] == "two words"
    assert started(infer(repo, JOB_SECRET="another"))["nodes"][3] == "another"


# Selection of Python


def test_active_python(repo: Path, tmp_path: Path) -> None:
    """`python` if it works, else `python3`."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text("#!/bin/sh\nexit 127\n")
    (tmp_path / "bin/python").chmod(0o755)
    # Not a symbolic link: that would lose this environment's packages.
    (tmp_path / "bin/python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "bin/python3").chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    assert started(infer(repo, PYTHON="", PATH=path))["python"] == sys.executable


@pytest.mark.parametrize("python", ["no-such-python", "/bin/true", "/bin/echo", "/bin/false"])
def test_no_python(repo: Path, python: str) -> None:
    assert f"(tried: {python})" in refused(infer(repo, PYTHON=python))


def test_npu_machine_never_installs(repo: Path, bare_python: Path, tmp_path: Path) -> None:
    (tmp_path / "davinci0").touch()
    add_package(bare_python, "transformers")
    line = refused(infer(repo, PYTHON=str(bare_python), NPU_DEVICE_GLOB=str(tmp_path / "davinci*")))
    assert "lacks torch safetensors pyyaml tokenizers tqdm psutil" in line
    assert not (repo / ".venv").exists()


def test_npu_machine_gets_cann_environment(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "davinci0").touch()
    (tmp_path / "cann").mkdir()
    # Like CANN's own script, it uses unset variables.
    (tmp_path / "cann/set_env.sh").write_text('export STUB_EXIT_CODE="4$UNSET"\n')
    set_env = repo / "executor/scripts/set_env.sh"
    set_env.write_text(set_env.read_text() + f"cann_path='{tmp_path}/cann'\n")
    npu = {"NPU_DEVICE_GLOB": str(tmp_path / "davinci*")}
    assert infer(repo, **npu).returncode == 4
    assert infer(repo).returncode == 0
    (tmp_path / "cann").rename(tmp_path / "moved")
    assert f"cann_path: no set_env.sh in '{tmp_path}/cann'" in refused(infer(repo, **npu))


@pytest.mark.parametrize("layout", ["cann", "ascend-toolkit/latest"])
def test_cann_is_found_at_its_default_path(repo: Path, tmp_path: Path, layout: str) -> None:
    (tmp_path / "davinci0").touch()
    folder = tmp_path / "Ascend" / layout
    folder.mkdir(parents=True)
    (folder / "set_env.sh").write_text("export ASCEND_HOME_PATH=found STUB_EXIT_CODE=4\n")
    home = {"NPU_DEVICE_GLOB": str(tmp_path / "davinci*"), "HOME": str(tmp_path)}
    found = infer(repo, **home)
    assert found.returncode == 4 and " ASCEND_HOME_PATH=found " in found.stderr
    assert infer(repo, **home, ASCEND_HOME_PATH="set up").returncode == 0


def test_npu_machine_gets_settings_that_the_user_can_override(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "davinci0").touch()
    npu = {"NPU_DEVICE_GLOB": str(tmp_path / "davinci*"), "JEMALLOC": ""}
    (repo / "executor/launch/__main__.py").write_text("import json, os\nprint(json.dumps(dict(os.environ)))\n")
    (tmp_path / "davinci1").touch()
    given = {"HCCL_OP_EXPANSION_MODE": "HOST", "TASK_QUEUE_ENABLE": "", "ASCEND_RT_VISIBLE_DEVICES": "1"}
    given |= {"HCCL_BUFFSIZE": "512"}
    result = infer(repo, **given, **npu)
    expected = {
        "ASCEND_RT_VISIBLE_DEVICES": "1",
        "HCCL_BUFFSIZE": "512",
        "HCCL_OP_EXPANSION_MODE": "HOST",
        "HCCL_CONNECT_TIMEOUT": "1200",
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
        "TASK_QUEUE_ENABLE": "",
    }
    assert started(result).items() >= expected.items()
    line = " ".join(f"{name}={value}" for name, value in expected.items())
    assert result.stderr == f"NPU environment: device_files=2 {line}\n"
    assert not started(infer(repo)).keys() & expected.keys() and not infer(repo).stderr


def test_npu_machine_gets_no_setting_that_depends_on_the_product(repo: Path, tmp_path: Path) -> None:
    """The mode of collectives is set for each process group, and its largest timeout depends on the mode."""
    (tmp_path / "davinci0").touch()
    (repo / "executor/launch/__main__.py").write_text("import json, os\nprint(json.dumps(dict(os.environ)))\n")
    names = started(infer(repo, NPU_DEVICE_GLOB=str(tmp_path / "davinci*"), JEMALLOC="")).keys()
    assert not {"HCCL_OP_EXPANSION_MODE", "HCCL_EXEC_TIMEOUT"} & names and "HCCL_CONNECT_TIMEOUT" in names


def test_npu_machine_preloads_jemalloc(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "davinci0").touch()
    library = next(Path("/").glob("lib*/*/libm.so.6"), None) or next(Path("/").glob("lib*/libm.so.6"))
    npu = {"NPU_DEVICE_GLOB": str(tmp_path / "davinci*")}
    assert f" LD_PRELOAD={library}" in infer(repo, JEMALLOC=str(library), **npu).stderr
    assert "no such file: '/nonexistent.so'" in refused(infer(repo, JEMALLOC="/nonexistent.so", **npu))


def test_installed_torch_is_never_replaced(repo: Path, bare_python: Path) -> None:
    add_package(bare_python, "torch", "2.9.0a0+vendor")
    add_package(bare_python, "yaml")
    (repo / "tqdm").mkdir()  # a folder of that name in the current directory is not the package
    line = refused(infer(repo, PYTHON=str(bare_python)))
    assert (
        f"run: {bare_python} -m pip install 'transformers>=5.0,<6' 'safetensors' 'tokenizers' 'tqdm' 'psutil'" in line
    )
    assert not (repo / ".venv").exists()


def test_old_torch(repo: Path, bare_python: Path) -> None:
    add_package(bare_python, "torch", "2.7.1+cu128")
    assert "is 2.7.1+cu128; torch>=2.8 is needed" in refused(infer(repo, PYTHON=str(bare_python)))


def test_newer_torch_of_a_platform(repo: Path, bare_python: Path) -> None:
    """An NPU platform may bring a torch that requirements.txt does not name yet."""
    add_package(bare_python, "torch", "2.14.0+cpu")
    for name in ("transformers", "safetensors", "yaml", "tokenizers", "tqdm", "psutil"):
        add_package(bare_python, name)
    assert started(infer(repo, PYTHON=str(bare_python)))["python"] == str(bare_python)


# .venv


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Empty wheels for requirements.txt, including a torch that is too new, so that pip needs no network."""
    folder = tmp_path_factory.mktemp("wheels")
    versions = [("torch", "2.9.1"), ("torch", "2.14.0"), ("transformers", "5.1.0"), ("tokenizers", "0.22.0")]
    versions += [(name, "1.0") for name in ("safetensors", "pyyaml", "tqdm", "psutil")]
    for name, version in versions:
        info = f"{name}-{version}.dist-info"
        requires = "Requires-Dist: tokenizers\n" if name == "transformers" else ""
        with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{'yaml' if name == 'pyyaml' else name}/__init__.py", "")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    return folder


def test_venv_is_created_once_and_completely(repo: Path, bare_python: Path, wheels: Path, tmp_path: Path) -> None:
    traps = set_traps(tmp_path / "shared")

    def run(python: Path, find_links: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        pip = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(find_links)}
        return infer(repo, PYTHON=str(python), cwd=traps, **pip)

    stopping = tmp_path / "python"  # is killed while it creates the environment
    stopping.write_text(
        f'#!/bin/sh\n[ "$3" != venv ] || {{ touch "$4/half_made"; kill -KILL $$; }}\nexec "{bare_python}" "$@"\n'
    )
    stopping.chmod(0o755)
    stopped = run(stopping)
    assert stopped.returncode == 1 and "could not make" in stopped.stderr.splitlines()[-1]
    assert (repo / ".venv/half_made").exists()

    made = run(bare_python, wheels)
    assert started(made)["python"] == str(repo / ".venv/bin/python")
    assert "torch is not installed: making" in made.stderr and "torch-2.9.1" in made.stderr
    assert not (repo / ".venv/half_made").exists()

    again = run(bare_python)
    assert started(again)["python"] == str(repo / ".venv/bin/python") and not again.stderr
    assert sprung(traps) == []


def test_foreign_venv_is_not_changed(repo: Path, bare_python: Path) -> None:
    venv.create(repo / ".venv", symlinks=True)
    assert "was not made by this script" in refused(infer(repo, PYTHON=str(bare_python)))
    for name in ["torch", "transformers", "safetensors", "yaml", "tokenizers", "tqdm", "psutil"]:
        add_package(repo / ".venv/bin/python", name, "3.0")
    assert started(infer(repo, PYTHON=str(bare_python)))["python"] == str(repo / ".venv/bin/python")
