# SPDX-License-Identifier: Apache-2.0
"""Runs the real infer.sh in a copy of the repository with a stub executor that reports its arguments."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ["models/qwen3_moe/infer.sh", "executor/scripts/set_env.sh", "executor/scripts/function.sh"]
REPORTING_EXECUTOR = """
import json, os, sys
nodes = [os.environ[name] for name in ("NODE_IPS", "MASTER_PORT", "RENDEZVOUS_TIMEOUT_S", "JOB_SECRET")]
argv = [part for argument in sys.argv[1:] for part in argument.split("=", 1)]  # as argparse reads --option=value
print(json.dumps({"argv": argv, "given": sys.argv[1:], "executor": __file__, "python": sys.executable, "nodes": nodes}))
sys.exit(int(os.environ.get("STUB_EXIT_CODE", "0")))
"""
NO_NPU = "/nonexistent/davinci*"


def infer(repo: Path, *arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return shell("bash", repo / "models/qwen3_moe/infer.sh", *arguments, cwd=cwd or repo, **env)


def shell(*command: str | Path, cwd: Path, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    ours = ("PIP_", "PYTHON", "ASCEND_", "HCCL_", "TASK_QUEUE", "NODE_IPS", "MASTER_PORT", "RENDEZVOUS_TIMEOUT_S")
    ours += ("JOB_SECRET",)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    environment |= {"PYTHON": sys.executable, "NPU_DEVICE_GLOB": NO_NPU} | env
    return subprocess.run(
        command, cwd=cwd, env=environment, input=stdin, capture_output=True, text=True, errors="strict", timeout=240
    )


def started(result: subprocess.CompletedProcess[str]) -> dict:
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def refused(result: subprocess.CompletedProcess[str]) -> str:
    """Asserts exit code 2 before anything was started; returns the one line on stderr."""
    assert result.returncode == 2 and not result.stdout, result
    assert result.stderr.startswith("infer.sh: ") and result.stderr.count("\n") == 1, result.stderr
    assert len(result.stderr) < 500 and result.stderr[:-1].isprintable(), result.stderr
    return result.stderr


def set_traps(folder: Path) -> Path:
    """A folder that shadows every importable module with one that writes a *.mark file."""
    packages = {"executor", "torch", "pip", "venv"}
    modules = {"transformers", "yaml", "psutil", "tqdm", "numpy", "models", "ops", "sitecustomize", "usercustomize"}
    modules |= sys.stdlib_module_names
    files = [f"{name}.py" for name in modules - packages - {"encodings"}]  # without encodings Python does not start
    files += [f"{name}/{module}.py" for name in packages for module in ("__init__", "__main__", "launch", "infer")]
    scripts = [f"{where}{name}.sh" for where in ("", "executor/scripts/") for name in ("function", "set_env")]
    for name in files + scripts:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        python = "open(__file__ + '.mark', 'w').close()\n"
        (folder / name).write_text(python if name.endswith(".py") else f"touch '{folder / name}.mark'\n")
    return folder


def sprung(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.rglob("*.mark"))
