# SPDX-License-Identifier: Apache-2.0
"""Draws the time between tokens of `latency` reports, batch by batch, each bar with its floor.

Other systems' figures may come from a file of the same form: a list "results" of system, exe_mode, batch_size and
tpot_ms: {"mean": ...}.
"""

import argparse
import math
from pathlib import Path
from typing import Any

from executor.utils.arguments import ArgumentParser
from executor.utils.files import check_output
from executor.utils.reading import read_json_object, refusing

Rows = list[dict[str, Any]]
GROUP_WIDTH = 0.84  # of the distance between two batch sizes


def run(command_line: list[str]) -> None:
    parser = ArgumentParser(prog="python -m executor.bench plot", description=__doc__)
    parser.add_argument("reports", nargs="+", metavar="REPORT", help="JSON files")
    parser.add_argument("--exe-mode", help="draw only rows of this mode")
    parser.add_argument("--output", required=True, type=picture, metavar="FILE", help="PNG file")
    arguments = parser.parse_args(command_line)
    check_matplotlib()
    check_output("--output", arguments.output, map(Path, arguments.reports))
    reports = [read_report(file) for file in arguments.reports]
    rows = [row for report in reports for row in report["results"]]
    rows = [row for row in rows if arguments.exe_mode in (None, row["exe_mode"])]
    if not rows:
        raise ValueError(f"--exe-mode: {arguments.exe_mode!r} is the mode of no row of {', '.join(arguments.reports)}")
    draw(rows, arguments.output, next((report["device"] for report in reports if "device" in report), ""))


def read_report(file: str) -> dict[str, Any]:
    report = read_json_object(Path(file))
    with refusing(file, "not a report of latencies"):
        if not report["results"]:
            raise ValueError("it has no row")
        for row in report["results"]:
            series_of(row)
            if not all(math.isfinite(value) for value in (row["batch_size"], row["tpot_ms"]["mean"])):
                raise ValueError("batch_size or tpot_ms is not finite")
    return report


def picture(name: str) -> Path:
    """The name of a PNG file."""
    if not name.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{name}: pictures are PNG, name it {name}.png")
    return Path(name)


def check_matplotlib() -> None:
    """ValueError if nothing can be drawn: to be found out before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("a plot needs matplotlib: python -m pip install matplotlib") from None


def draw(rows: Rows, file: Path, title: str) -> None:
    """Writes a PNG: a group of bars for each batch size, a bar for each system and mode, a line where its floor is."""
    from matplotlib.figure import Figure

    batch_sizes = sorted({row["batch_size"] for row in rows})
    series = sorted({series_of(row): None for row in rows}, key=lambda name: not name.startswith("ours"))
    width = GROUP_WIDTH / len(series)
    figure = Figure(figsize=(2 + 1.6 * len(batch_sizes), 4.5), layout="constrained")
    axes = figure.subplots()
    floors = []
    for index, name in enumerate(series):
        own = [row for row in rows if series_of(row) == name]
        places = [batch_sizes.index(row["batch_size"]) - GROUP_WIDTH / 2 + (index + 0.5) * width for row in own]
        bars = axes.bar(places, [row["tpot_ms"]["mean"] for row in own], width * 0.92, label=name)
        axes.bar_label(bars, fmt="{:.3g}", fontsize=8)
        floors += [(place, row["floor_ms"]) for place, row in zip(places, own, strict=True) if "floor_ms" in row]
    if floors:
        lefts, rights = ([place + sign * width / 2 for place, _ in floors] for sign in (-1, 1))
        axes.hlines(
            [floor for _, floor in floors],
            lefts,
            rights,
            colors="black",
            linewidth=2,
            label="floor (bytes / read rate)",
        )
    axes.set_xticks(range(len(batch_sizes)), [f"batch {size}" for size in batch_sizes])
    axes.set_ylabel("ms a token (tpot, mean)")
    axes.set_title(title)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=120, metadata={"Software": None})


def series_of(row: dict[str, Any]) -> str:
    prompt = f", {row['prompt_tokens']} tokens in" if row.get("prompt_tokens") else ""
    return f"{row['system']}, {row['exe_mode']}{prompt}"
