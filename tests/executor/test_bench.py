# SPDX-License-Identifier: Apache-2.0
"""The bench command runs, and its report has what readers of docs/results expect."""

import json
import sys

import pytest

from executor.bench.__main__ import main


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", "latency", "--yaml", "demo", "--set", "device=cpu", *arguments])
    return main()


def test_report(monkeypatch, tmp_path, capsys):
    output = tmp_path / "report.json"
    sizes = ("--prompt-tokens", "8", "--new-tokens", "3", "--repeats", "1", "--batch-size", "1", "2")
    assert run(monkeypatch, *sizes, "--peer", "transformers", "--output", str(output)) == 0
    report = json.loads(output.read_text())
    assert {"device", "commit", "command", "versions", "results"} <= set(report)
    systems = ["ours", "transformers grouped_mm", "transformers batched_mm"]
    assert [(result["system"], result["batch_size"]) for result in report["results"]] == [
        (system, batch_size) for batch_size in (1, 2) for system in systems
    ]
    for result in report["results"]:
        assert (result["prompt_tokens"], result["new_tokens"], result["dtype"]) == (8, 3, "bfloat16")
        assert (result["exe_mode"], result["quantization"], result["world_size"]) == ("eager", None, 1)
        for times in (result["ttft_ms"], result["tpot_ms"]):
            assert 0 < times["p50"] <= times["p90"] <= times["p99"]
        assert result["tok_per_s"] > 0
    assert "ours/this ttft" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(("--new-tokens", "1"), "--new-tokens"), (("--set", "data_config.batchsize=2"), "data_config.batch_size")],
)
def test_bad_input(arguments, named, monkeypatch, capsys):
    assert run(monkeypatch, *arguments) == 2
    assert named in capsys.readouterr().err
