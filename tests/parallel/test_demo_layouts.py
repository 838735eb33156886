# SPDX-License-Identifier: Apache-2.0
"""Tests that infer.sh with the demo's two-rank YAML files generates the tokens of a single process."""

import json

import pytest

from tests.jobs import Job


def tokens(job: Job, result) -> list[list[int]]:
    assert job.end(120) == 0, job.text
    return [json.loads(line)["token_ids"] for line in result.read_text().splitlines()[:-1]]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> list[list[int]]:
    folder = tmp_path_factory.mktemp("one")
    result = folder / "result.jsonl"
    with Job(folder / "terminal", "model_config.dtype=float32", options=("--output", str(result))) as job:
        return tokens(job, result)


@pytest.mark.parametrize("name", ["demo_2ep", "demo_2dp_2ep"])
def test_two_ranks(name, one_process, tmp_path):
    result = tmp_path / "result.jsonl"
    options = ("--yaml", name, "--output", str(result))
    with Job(tmp_path / "terminal", "model_config.dtype=float32", options=options) as job:
        assert tokens(job, result) == one_process
        assert "tpot p50 ms" in job.text
