# SPDX-License-Identifier: Apache-2.0
"""The checks of outcomes detect every kind of violation."""

from pathlib import Path

import pytest

from tests.hostile.case import Case, Outcome
from tests.hostile.generated import FAMILIES, generated_cases
from tests.hostile.named import named_cases

LOG = "2026-01-02 03:04:05,678 INFO [rank 0] executor.llm: ready\n"
SUMMARY = '{"summary": {}}\n'
LINE = '{"index": 0, "token_ids": [1]}\n'


@pytest.mark.parametrize(
    ("outcome", "named"),
    [
        (Outcome(None, "", "", []), "still ran"),
        (Outcome(1, "", "error: x\n", []), "exit code 1"),
        (Outcome(-9, "", "", []), "exit code -9"),
        (Outcome(2, "", "", []), "not one line"),
        (Outcome(2, "", "error: a\nerror: b\n", []), "not one line"),
        (Outcome(2, "", "wrong\n", []), "not one line"),
        (Outcome(2, "", "error: " + "a" * 500, []), "not one line"),
        (Outcome(2, "", "Traceback (most recent call last):\nerror: a\n", []), "a traceback"),
        (Outcome(2, "", "error: \x1b[31m\n", []), "control characters"),
        (Outcome(2, "", "error: a\n", ["out/x"]), "a refused run created"),
        (Outcome(2, "", LOG[:-1] + "a" * 2000 + "\nerror: a\n", []), "a line of 2"),
        (Outcome(0, "", "", []), "0 files of results"),
    ],
)
def test_violation_is_detected(outcome, named, tmp_path):
    assert named in "; ".join(outcome.faults(tmp_path))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (LINE, "incomplete"),
        (SUMMARY, "incomplete"),
        (LINE + SUMMARY[:-1], "incomplete"),
        (LINE + SUMMARY[:-4], "not JSON lines"),
        ('{"token_ids": [], "x": NaN}\n' + SUMMARY, "not JSON lines"),
        ("", "not JSON lines"),
        (LINE + SUMMARY, ""),
    ],
)
def test_violation_in_results_is_detected(text, named, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/result.jsonl").write_text(text)
    faults = Outcome(0, "", LOG, ["out/result.jsonl"]).faults(tmp_path)
    assert faults == [] if not named else named in faults[0]


def test_error_after_log_lines_is_valid(tmp_path):
    assert Outcome(2, "", LOG + "error: prompts.json: no such file\n", []).faults(tmp_path) == []


def test_cases_are_determined_by_the_seed(base: Path):
    first, again, other = (generated_cases(seed, base) for seed in (1, 1, 2))
    assert first == again and first != other
    assert len(first) == sum(count for count, _ in FAMILIES.values()) >= 1000


def test_reproduction_has_command_and_files(tmp_path):
    case = Case("x", {"run.yaml": b"a: " + b"b" * 1000}, ("--set", "device=gpu"))
    text = case.reproduction(tmp_path)
    assert f"cd {tmp_path}" in text and "'device=gpu'" in text and "run.yaml: b'a: bbb" in text and len(text) < 1000


def test_names_of_cases_are_unique():
    names = [case.name for case in named_cases()]
    assert len(names) == len(set(names))
