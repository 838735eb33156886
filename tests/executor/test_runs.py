# SPDX-License-Identifier: Apache-2.0
"""Runs as real processes: finished results survive any termination; concurrent runs are independent."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from executor.config import REPOSITORY
from tests.jobs import wait_for

PROMPTS = 6


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    """The demo checkpoint on PROMPTS prompts, two at a time; results go below tmp_path/out."""
    lines = [json.dumps({"text": f"{number} é 東京 🎭"}) + "\n" for number in range(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    file = tmp_path / "demo.yaml"
    file.write_text(
        f"model_name: d\nmodel_path: {REPOSITORY}/models/qwen3_moe/demo\ndevice: cpu\noutput_dir: {tmp_path}/out\n"
        f"data_config:\n  dataset: jsonl\n  dataset_path: {tmp_path}/prompts.jsonl\n  chat_template: False\n"
        "  batch_size: 2\n  max_new_tokens: 4\n  ignore_eos: True\n"
    )
    return file


def start(yaml_file: Path, *options: str, **streams) -> subprocess.Popen:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": streams.pop("encoding", "utf-8")}
    return subprocess.Popen(
        [sys.executable, "-m", "executor.infer", "--yaml_file_path", yaml_file, *options],
        cwd=REPOSITORY,
        env=environment,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams,
    )


def result_files(tmp_path: Path) -> list[Path]:
    return [file for file in (tmp_path / "out").rglob("result.jsonl") if "latest" not in file.parts]


def indices(file: Path) -> list[int | None]:
    text = file.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line).get("index") for line in text.splitlines()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_has_finished_survives_a_signal(number, yaml_file, tmp_path):
    output = tmp_path / "copy.jsonl"
    process = start(yaml_file, "--output", str(output), "--set", "data_config.max_new_tokens=400")
    wait_for(lambda: output.exists() or process.poll() is not None, 90)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    [file] = result_files(tmp_path)
    found = indices(file)
    assert 1 <= len(found) < PROMPTS and None not in found and len(set(found)) == len(found)
    assert indices(output) == found
    if number != signal.SIGKILL:
        assert process.returncode == 1
        assert err.decode().splitlines()[-2:] == [
            f"{len(found)} of {PROMPTS} results: {file}, {output}",
            f"error: interrupted by {number.name}",
        ]


def test_two_runs_at_once_and_terminals_that_fail(yaml_file, tmp_path):
    """One writes to a pipe without reader, one to a terminal with an ASCII encoding."""
    reader, writer = os.pipe()
    os.close(reader)
    output = tmp_path / "copy.jsonl"
    output.write_text("old")
    processes = [
        start(yaml_file, "--output", str(output), stdout=writer, stderr=writer),
        start(yaml_file, encoding="gbk"),
    ]
    os.close(writer)
    out, _ = processes[1].communicate(timeout=120)
    assert [process.wait(120) for process in processes] == [0, 0]
    assert "東京" in out.decode("gbk") and "?" in out.decode("gbk")
    files = result_files(tmp_path)
    assert len(files) == 2 and len({file.parent.parent for file in files}) == 1
    for file in [*files, output]:
        assert sorted(indices(file)[:-1]) == list(range(PROMPTS)) and indices(file)[-1] is None
    assert (files[0].parent.parent / "latest").resolve() in [file.parent for file in files]


def handles(process: subprocess.Popen, number: int) -> bool:
    """Returns whether the process has a handler of a signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_early_interrupt_prints_no_traceback(yaml_file, tmp_path):
    """As soon as it handles signals, and later: while importing, loading, or running."""
    for delay_s in (0, 2.5):
        process = start(yaml_file, "--set", "data_config.max_new_tokens=4000")
        wait_for(lambda: handles(process, signal.SIGTERM), 30)  # noqa: B023
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 1 and b"Traceback" not in err
        assert err.decode().splitlines()[-1] == "error: interrupted by SIGINT"
