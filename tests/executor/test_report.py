# SPDX-License-Identifier: Apache-2.0
"""Percentiles, also of more values than torch.quantile accepts."""

import torch

from executor.utils.report import percentiles


def test_percentiles_are_interpolated():
    values = torch.rand(1001, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = [round(values.quantile(part).item(), 4) for part in (0.5, 0.9, 0.99)]
    assert list(percentiles(values.tolist()).values()) == expected
    assert percentiles([1.0, 2.0]) == {"p50": 1.5, "p90": 1.9, "p99": 1.99} and percentiles([])["p50"] is None


def test_percentiles_of_many_values():
    assert percentiles([1.0] * (2**24 + 1)) == {"p50": 1.0, "p90": 1.0, "p99": 1.0}
