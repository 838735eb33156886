# SPDX-License-Identifier: Apache-2.0
"""Percentiles, text tables, JSON reports, and the commit and versions that identify a run."""

import importlib.metadata
import json
import os
import subprocess
from collections.abc import Sequence
from typing import Any

from executor import __version__
from executor.config import REPOSITORY


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p90 and p99 with linear interpolation; None without values."""
    if not values:
        return {"p50": None, "p90": None, "p99": None}
    import torch

    ordered = torch.tensor(values, dtype=torch.float64).sort().values  # torch.quantile refuses more than 2^24 values
    places = torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64) * (len(ordered) - 1)
    below, above = ordered[places.floor().long()], ordered[places.ceil().long()]
    points = below.lerp(above, places.frac())
    return dict(zip(("p50", "p90", "p99"), (round(point, 4) for point in points.tolist()), strict=True))


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Text table with aligned columns; numbers with two decimals, None as a dash."""
    texts = [[str(cell) for cell in header]] + [[cell_text(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in texts) for column in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in texts]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def cell_text(cell: Any) -> str:
    if cell is None:
        return "-"
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)


def versions() -> dict[str, str]:
    """Installed versions of the libraries that determine results and speed."""
    found = {"recipe": __version__}
    for name in ("torch", "transformers", "safetensors", "triton", "torch_npu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Git commit, with "-dirty" for uncommitted changes; "unknown" outside a checkout."""
    try:
        described = subprocess.run(
            ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def text_of(content: dict[str, Any]) -> str:
    """Serializes the report to JSON; RuntimeError for a non-finite number, which indicates a failed measurement."""
    try:
        return json.dumps(content, indent=1, allow_nan=False)
    except ValueError as error:
        raise RuntimeError(f"a measured figure is not a finite number: {error}") from error


def is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"
