# SPDX-License-Identifier: Apache-2.0
"""The predicted times in the documents follow from the calls that a decode step makes."""

import re

import pytest

from executor.config import REPOSITORY
from tests.npu import predicted_times
from tests.npu.predicted_times import ROWS, Step, record_steps, table_rows
from tests.npu.wheels import VERSIONS, wheel
from tests.parallel.ranks import run_ranks

PAGES = [REPOSITORY / "docs" / name for name in ("npu.md", "npu.zh.md")]


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    path = wheel(VERSIONS[0])
    if path is None:
        pytest.skip(f"torch_npu {VERSIONS[0]}: no wheel in the cache and no package index")
    return run_ranks(1, record_steps, tmp_path_factory.mktemp("predicted"), path)[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_table_is_the_prediction(steps, page):
    rows = re.findall(r"^\|`qwen3_\w+`\|\d+\|\d+/\d+\|.+\|$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert ["|".join(row.split("|")[:7]) + "|" for row in rows] == table_rows(steps)


def test_the_counts_are_those_of_the_shapes(steps):
    """Collectives: the embedding, and after attention and experts of each layer; the bytes by hand."""
    layer = 2048 * (32 + 2 * 4) * 128 + 32 * 128 * 2048 + 128 * 2048 + 8 * 3 * 768 * 2048
    cache = 1024 * 2 * 4 * 128
    read = 2 * (48 * (layer + cache) + 151936 * 2048)
    for which in (0, 1):
        one, two, sixteen = (steps[(*row, 1)][which] for row in ROWS)
        assert one.collectives == 0
        assert two.collectives == 1 + 2 * 48 and sixteen.collectives == 1 + 2 * 94
        assert one.read_bytes == pytest.approx(read, rel=1e-3)
        assert one.launches == pytest.approx(48 * one.layer_launches, abs=20)
        assert sixteen.launches == pytest.approx(94 * sixteen.layer_launches, abs=20)


def test_the_formula():
    step = Step(layers=48, layer_launches=16, launches=1000, collectives=100, read_bytes=2.2e9)
    assert step.graph_ms == pytest.approx(2 + 4 + 1.5) and step.eager_ms == pytest.approx(1100 * 0.016)
    assert step._replace(launches=1, collectives=0).eager_ms == pytest.approx(2.004)
    assert step._replace(layers=94).graph_ms == pytest.approx(9.4)  # the host updates the graph


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_assumptions_are_named(page):
    text = page.read_text(encoding="utf-8")
    for name in ("KERNEL_US", "COLLECTIVE_US", "HOST_US", "UPDATE_US"):
        assert f"{getattr(predicted_times, name)} us" in text
    assert f"{predicted_times.BANDWIDTH / 1e12} TB/s" in text and f"{predicted_times.CACHED_TOKENS:,}" in text
