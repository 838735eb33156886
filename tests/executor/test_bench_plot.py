# SPDX-License-Identifier: Apache-2.0
"""`bench plot`: title and legend, distinct series, and rejected reports."""

import json
import re
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from executor.bench.__main__ import main
from executor.config import REPOSITORY

REPORT_ROW = {"system": "ours", "exe_mode": "eager", "batch_size": 1, "tpot_ms": {"p50": 3.0, "mean": 9.0}}


def bench(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    return main()


def report_file(folder: Path, name: str, *rows: dict, **about: object) -> str:
    content = {"device": "a card", "model_name": "a model", **about, "results": [{**REPORT_ROW, **row} for row in rows]}
    (folder / name).write_text(json.dumps(content))
    return str(folder / name)


def drawn(monkeypatch, tmp_path, *files: str) -> Figure:
    """matplotlib figure that `bench plot` draws from the files."""
    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (savefig(self, *a, **k), figures.append(self)))
    assert bench(monkeypatch, "plot", *files, "--output", str(tmp_path / "plot.png")) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    return figures[0]


def names_in(figure: Figure) -> list[str]:
    return [text.get_text().replace("\n", " ") for text in figure.legends[0].get_texts()]


def test_title_axes_and_legend(monkeypatch, tmp_path):
    """Title, unit, medians with two decimals, and a legend that covers no bar."""
    common = {"dtype": "bfloat16", "world_size": 1, "prompt_tokens": 8}
    report = report_file(tmp_path, "a.json", {**common, "floor_ms": 1.0}, {**common, "batch_size": 2})
    figure = drawn(monkeypatch, tmp_path, report)
    [axes] = figure.axes
    assert axes.get_title() == "a model, a card\neager, bfloat16, 1 rank, 8 tokens in"
    assert axes.get_ylabel() == "tpot, ms per token"
    assert [bar.get_height() for bar in axes.patches] == [3.0, 3.0]
    assert [text.get_text() for text in axes.texts] == ["3.00", "3.00"]
    assert names_in(figure) == ["floor (bytes / read rate)", "ours"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["batch 1", "batch 2"]
    legend, bars = figure.legends[0].get_window_extent(), axes.get_window_extent()
    assert not legend.overlaps(bars)


@pytest.mark.parametrize(
    ("one", "other", "names"),
    [
        ({"exe_mode": "graph"}, {}, ["ours, graph", "ours, eager"]),
        ({"dtype": "bfloat16"}, {"dtype": "float32"}, ["ours, bfloat16", "ours, float32"]),
        ({"quantization": None}, {"quantization": "awq"}, ["ours", "ours, awq"]),
        ({"world_size": 1}, {"world_size": 2}, ["ours, 1 rank", "ours, 2 ranks"]),
        ({"prompt_tokens": 1}, {"prompt_tokens": 4080}, ["ours, 1 token in", "ours, 4080 tokens in"]),
        (
            {"layout": {"moe_tp_size": 2}},
            {"layout": {"moe_tp_size": 1}},
            ["ours, moe_tp_size 2", "ours, moe_tp_size 1"],
        ),
        ({"new_tokens": 3}, {"new_tokens": 65}, ["ours, 3 tokens out", "ours, 65 tokens out"]),
        ({"tpot_ms": {"mean": 4.0}}, {}, ["ours, mean", "ours"]),
        ({}, {}, ["ours, (1)", "ours, (2)"]),  # the same run repeated
        ({"system": "$x_{"}, {"system": "_hidden"}, [r"\$x_{", "hidden"]),  # no formula, not hidden
    ],
)
def test_series_names_are_unique(one, other, names, monkeypatch, tmp_path):
    figure = drawn(monkeypatch, tmp_path, report_file(tmp_path, "a.json", one, other))
    assert names_in(figure) == names
    bars = figure.axes[0].patches
    assert len(bars) == 2 and len({bar.get_facecolor() for bar in bars}) == 2
    left, right = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars)
    assert left[1] < right[0]


def test_runs_of_two_commits_are_two_series(monkeypatch, tmp_path):
    """Reports of one commit form one series if their batch sizes differ, else series are named by file."""
    files = [
        report_file(tmp_path, "a.json", {"batch_size": 1}, commit="aaa"),
        report_file(tmp_path, "b.json", {"batch_size": 2}, commit="aaa"),
        report_file(tmp_path, "c.json", {"batch_size": 2}, commit="bbb"),
    ]
    assert names_in(drawn(monkeypatch, tmp_path, *files[:2])) == ["ours"]
    assert names_in(drawn(monkeypatch, tmp_path, *files[::2])) == ["ours, commit aaa", "ours, commit bbb"]
    monkeypatch.chdir(tmp_path)
    report_file(tmp_path, "c.json", {"batch_size": 2}, commit="aaa")
    assert names_in(drawn(monkeypatch, tmp_path, "b.json", "c.json")) == ["ours, b.json", "ours, c.json"]


def test_more_series_than_colours(monkeypatch, tmp_path):
    rows = [{"prompt_tokens": tokens} for tokens in range(1, 31)]
    bars = drawn(monkeypatch, tmp_path, report_file(tmp_path, "a.json", *rows)).axes[0].patches
    assert len({bar.get_facecolor() for bar in bars}) == len(bars) == 30


@pytest.mark.parametrize(
    ("about", "row", "named"),
    [
        ({"device": "another card"}, {}, "b.json: device is 'another card', but 'a card'"),
        ({"device": None}, {}, "b.json: device is None, but 'a card'"),
        ({"model_name": "another model"}, {}, "b.json: model_name is 'another model', but 'a model'"),
        ({}, {"batch_size": 10**300}, "b.json: not a report of latencies: results[0].batch_size"),
        ({}, {"batch_size": True}, "results[0].batch_size: True is not a number"),
        ({}, {"tpot_ms": {"p50": None}}, "results[0].tpot_ms: None is not a time in ms"),
        ({}, {"tpot_ms": {"p50": float("inf")}}, "results[0].tpot_ms: inf is not a time in ms"),
        ({}, {"tpot_ms": {"p50": -1.0}}, "results[0].tpot_ms: -1.0 is not a time in ms"),
        ({}, {"tpot_ms": 3.0}, "results[0] is not a row with"),
        ({}, {"floor_ms": "1"}, "results[0].floor_ms: '1' is not a time in ms"),
        ({}, {"system": " "}, "results[0].system: ' ' is not a name"),
        ({}, {"exe_mode": ["graph"]}, "results[0].exe_mode: ['graph'] is not a name"),
        ({}, {"layout": "2tp"}, "results[0].layout: expected tp sizes by name"),
    ],
)
def test_invalid_reports(about, row, named, monkeypatch, tmp_path, capsys):
    """One-line error, no PNG."""
    files = report_file(tmp_path, "a.json", {}), report_file(tmp_path, "b.json", row, **about)
    assert bench(monkeypatch, "plot", *files, "--output", str(tmp_path / "plot.png")) == 2
    refusal = capsys.readouterr().err
    assert refusal.count("\n") == 1 and named in refusal and len(refusal) < 500
    assert not (tmp_path / "plot.png").exists()


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", '{"results": {}}', '{"results": []}', '{"results": [3]}', "[" * 9**5, "x"],
    ids=["list", "empty", "object", "no row", "no object", "deep", "no JSON"],
)
def test_file_is_not_a_report(text, monkeypatch, tmp_path, capsys):
    (tmp_path / "a.json").write_text(text)
    assert bench(monkeypatch, "plot", str(tmp_path / "a.json"), "--output", str(tmp_path / "plot.png")) == 2
    refusal = capsys.readouterr().err
    assert refusal.count("\n") == 1 and "a.json: " in refusal and len(refusal) < 500


def test_plot_options(monkeypatch, tmp_path, capsys):
    """Filter by mode; errors for a mode without rows and for missing matplotlib."""
    report = report_file(tmp_path, "a.json", {}, {"exe_mode": "graph"})
    picture = str(tmp_path / "plot.png")
    titles = []
    monkeypatch.setattr("executor.bench.plot.draw", lambda rows, *_: titles.append([row["exe_mode"] for row in rows]))
    assert bench(monkeypatch, "plot", report, "--exe-mode", "graph", "--output", picture) == 0
    assert titles == [["graph"]]
    assert bench(monkeypatch, "plot", report, "--exe-mode", "grpah", "--output", picture) == 2
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench(monkeypatch, "plot", report, "--output", picture) == 2
    refusals = capsys.readouterr().err.splitlines()
    assert len(refusals) == 2 and "--exe-mode: 'grpah'" in refusals[0] and "matplotlib" in refusals[1]


PICTURES = re.findall(  # docs/results.md states the commands that draw the committed pictures
    r"^python -m executor\.bench plot (.+)$", (REPOSITORY / "docs" / "results.md").read_text(), flags=re.MULTILINE
)


@pytest.mark.parametrize("command", PICTURES)
def test_committed_plots_are_reproducible(command, monkeypatch, tmp_path):
    *arguments, option, committed = command.split()
    assert option == "--output" and (REPOSITORY / committed).is_file()
    monkeypatch.chdir(REPOSITORY)
    assert bench(monkeypatch, "plot", *arguments, "--output", str(tmp_path / "plot.png")) == 0
