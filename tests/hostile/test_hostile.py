# SPDX-License-Identifier: Apache-2.0
"""Hostile inputs end with a one-line error and exit code 2, and leave no files.

HOSTILE_SEED=N generates other inputs; a failing one prints the seed and how to reproduce it.
"""

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.hostile.case import ROOT, Case, Outcome, limit_s, listing
from tests.hostile.generated import FAMILIES, generated_cases
from tests.hostile.named import named_cases

SEED = int(os.environ.get("HOSTILE_SEED", "12"))
NAMED = named_cases()
EARLY = ("run.yaml", "prompts", "--set: d", "a YAML", "jsonl", "an output")  # rejected before torch is imported
LATE = ("a good run", "config.json: 10**9 layers", "chat template: r", "index: a file that leaves")
REAL = [case for case in NAMED if case.name.startswith(EARLY + LATE)]
SCRIPTED = ("a good run", "world_size of 10**12", "an alias bomb", "--set: NaN")
BY_SCRIPT = [case for case in NAMED if case.name in SCRIPTED]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
ENVIRONMENT |= {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
HUGE_PAGES = {"PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # of which a fork copies few


@pytest.fixture(scope="module")
def outcomes(base: Path) -> dict[str, tuple[Case, Path, Outcome]]:
    """(case, folder, outcome) of all cases, run in forked children of one process."""
    cases = [*NAMED, *generated_cases(SEED, base)]
    assert len({case.name for case in cases}) == len(cases)
    (base.parent / "cases.pickle").write_bytes(pickle.dumps(cases))
    command = [sys.executable, "-m", "tests.hostile.warm", base.parent]
    subprocess.run(command, env=ENVIRONMENT | HUGE_PAGES, cwd=ROOT, check=True)
    found = pickle.loads((base.parent / "outcomes.pickle").read_bytes())
    return {case.name: (case, base.parent / str(number), found[case.name]) for number, case in enumerate(cases)}


def report(case: Case, folder: Path, outcome: Outcome) -> str:
    """Violations of a case and how to reproduce it; empty if there are none."""
    faults = outcome.faults(folder)
    if not faults:
        return ""
    stderr = "\n".join(line[:300] for line in outcome.stderr.splitlines()[-6:])
    return f"\n{case.name} (HOSTILE_SEED={SEED}): {'; '.join(faults)}\n{case.reproduction(folder)}\n{stderr}\n"


@pytest.mark.parametrize("name", [case.name for case in NAMED])
def test_named(name, outcomes):
    assert report(*outcomes[name]) == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_generated(family, outcomes):
    reports = [report(*outcomes[f"{family} {number}"]) for number in range(FAMILIES[family][0])]
    assert len([text for text in reports if text]) == 0, "".join(reports)


def test_both_exit_codes_occur(outcomes):
    codes = [outcome.code for _, _, outcome in outcomes.values()]
    assert len(codes) >= 1000 and codes.count(0) > 20 and codes.count(2) > 500


def run(case: Case, folder: Path, base: Path, command: list[str]) -> str:
    """Runs a case as a separate process; returns its violations."""
    case.write(folder, base)
    before = listing(folder)
    try:
        done = subprocess.run(
            [*command, *case.argv()],
            cwd=folder,
            env=ENVIRONMENT,
            capture_output=True,
            timeout=2 * limit_s(),  # twice, as it imports everything
            text=True,
        )
        code, stdout, stderr = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired:
        code, stdout, stderr = None, "", ""
    created = sorted(os.path.relpath(path, folder) for path in listing(folder) - before)
    return report(case, folder, Outcome(code, stdout, stderr, created))


def test_as_processes(base, tmp_path):
    assert len(REAL) >= 30
    command = [sys.executable, "-m", "executor.infer"]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        reports = list(pool.map(lambda item: run(item[1], tmp_path / str(item[0]), base, command), enumerate(REAL)))
        assert not any(reports), "".join(reports)


@pytest.mark.parametrize("case", BY_SCRIPT, ids=lambda case: case.name)
def test_by_script(case, base, tmp_path):
    script = tmp_path / "infer.sh"  # the same options, except --yaml for --yaml_file_path
    script.write_text(f'shift 2; exec bash {ROOT}/models/qwen3_moe/infer.sh --yaml ./run.yaml "$@"\n')
    assert run(case, tmp_path / "case", base, ["bash", str(script)]) == ""
