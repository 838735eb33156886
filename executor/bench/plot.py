# SPDX-License-Identifier: Apache-2.0
"""Bar chart of tpot (time per output token) from `latency` reports: bars by batch size, each with its floor.

All reports must be of one device and one model. The title shows what all rows have in common, the legend what differs
(mode, dtype, ranks, prompt length, ...). Results of other systems can come from a file of the same form: "device",
"model_name" and a list "results" of system, exe_mode, batch_size and tpot_ms: {"p50": ...}, or {"mean": ...} if only
that was measured.
"""

import argparse
import math
import textwrap
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from executor.utils.arguments import ArgumentParser
from executor.utils.files import check_output
from executor.utils.reading import read_json_object, refusing
from executor.utils.report import cell_text
from executor.utils.text import one_line, quoted

Row = dict[str, Any]
LAYOUT = ("attn_tp_size", "moe_tp_size", "embed_tp_size", "lmhead_tp_size")
IDENTITY = ("exe_mode", "dtype", "quantization", "world_size", "prompt_tokens")  # in the title, or in every series name
DETAILS = (*LAYOUT, "new_tokens", "commit")  # in series names that would be equal otherwise
TEXTS = {
    "world_size": "{} rank{s}",
    "prompt_tokens": "{} token{s} in",
    "new_tokens": "{} token{s} out",
    "commit": "commit {}",
    **{name: name + " {}" for name in LAYOUT},
}
LARGEST = 1e9  # batch size or time in ms; a larger value is a mistake
BAR_INCHES = 0.62
MAX_INCHES = 200.0
LEGEND_WIDTH = 34  # characters per line


def run(command_line: list[str]) -> None:
    parser = ArgumentParser(prog="python -m executor.bench plot", description=__doc__)
    parser.add_argument("reports", nargs="+", metavar="REPORT", help="JSON files")
    parser.add_argument("--exe-mode", help="draw only rows of this mode")
    parser.add_argument("--output", required=True, type=picture, metavar="FILE", help="PNG file")
    arguments = parser.parse_args(command_line)
    check_matplotlib()
    check_output("--output", arguments.output, map(Path, arguments.reports))
    reports = {file: read_report(file) for file in arguments.reports}
    rows = [row for file, report in reports.items() for row in rows_of(report, file)]
    rows = [row for row in rows if arguments.exe_mode in (None, row["exe_mode"])]
    if not rows:
        raise ValueError(
            f"--exe-mode: {quoted(arguments.exe_mode)} matches no row of {one_line(', '.join(reports), 200)}"
        )
    draw(rows, arguments.output, [shared(reports, "model_name"), shared(reports, "device")])


def read_report(file: str) -> dict[str, Any]:
    """Reads and checks a report; ValueError if its rows cannot be drawn."""
    report = read_json_object(Path(file))
    with refusing(file, "not a report of latencies"):
        if not isinstance(report.get("results"), list) or not report["results"]:
            raise ValueError('"results" is not a list of rows')
        for number, row in enumerate(report["results"]):
            check_row(row, f"results[{number}]")
    return report


def check_row(row: Any, where: str) -> None:
    """Raises ValueError if a field that is drawn is missing from a row or invalid."""
    if not isinstance(row, dict) or not isinstance(row.get("tpot_ms"), dict):
        raise ValueError(f"{where} is not a row with system, exe_mode, batch_size and tpot_ms")
    for key in ("system", "exe_mode"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f"{where}.{key}: {quoted(row.get(key))} is not a name")
    if type(row.get("batch_size")) is not int or not 1 <= row["batch_size"] <= LARGEST:
        raise ValueError(f"{where}.batch_size: {quoted(row.get('batch_size'))} is not a number of sequences")
    for key, value in (("tpot_ms", tpot_ms(row)), ("floor_ms", row.get("floor_ms", 1))):
        if type(value) not in (int, float) or not 0 < value <= LARGEST or not math.isfinite(value):
            raise ValueError(f"{where}.{key}: {quoted(value)} is not a time in ms")
    if not isinstance(row.get("layout", {}), dict):
        raise ValueError(f"{where}.layout: expected tp sizes by name, got {quoted(row['layout'])}")


def shared(reports: dict[str, dict[str, Any]], key: str) -> str:
    """Value of `key` common to all reports, "" if none has it; ValueError if they differ."""
    (first, expected), *others = [(file, report.get(key)) for file, report in reports.items()]
    for file, value in others:
        if value != expected:
            raise ValueError(
                f"{one_line(file, 120)}: {key} is {quoted(value)}, but {quoted(expected)} in {one_line(first, 120)}: "
                "a plot shows one model on one kind of device"
            )
    return shown(expected) if expected is not None else ""


def rows_of(report: dict[str, Any], file: str = "") -> list[Row]:
    """Rows of a report, each with the report's commit and file name, and its layout flattened."""
    about = {"commit": report.get("commit"), "report": file}
    return [{**row, **row.get("layout", {}), **about} for row in report["results"]]


def picture(name: str) -> Path:
    """Argument type: name of a PNG file."""
    if not name.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{name}: the plot is a PNG file, name it {name}.png")
    return Path(name)


def check_matplotlib() -> None:
    """Raises ValueError if matplotlib is missing; called before the measurement."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("a plot needs matplotlib: python -m pip install matplotlib") from None


def draw(rows: list[Row], file: Path, heading: Iterable[str]) -> None:
    """Writes a PNG: a group of bars per batch size, a bar per series, a line at its floor.

    The title is `heading` (model, device), then what all rows have in common.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    common, names = name_series(rows)
    batch_sizes = sorted({row["batch_size"] for row in rows})
    series = sorted(dict.fromkeys(names), key=lambda name: not name.startswith("ours"))
    positions, centres = bar_positions(rows, names, batch_sizes, series)
    width = min(MAX_INCHES, max(4.0, BAR_INCHES * (len(rows) + len(batch_sizes))) + 3.2)
    figure = Figure(figsize=(width, 4.8), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(series):
        own = [number for number, found in enumerate(names) if found == name]
        values = [tpot_ms(rows[number]) for number in own]
        colour = colormaps["tab10"](index) if len(series) <= 10 else colormaps["turbo"](index / len(series))
        label = textwrap.fill(name, LEGEND_WIDTH)
        bars = axes.bar([positions[number] for number in own], values, 0.92, label=label, color=colour)
        axes.bar_label(bars, [cell_text(float(value)) for value in values], fontsize=8)
    floors = [(position, row["floor_ms"]) for position, row in zip(positions, rows, strict=True) if "floor_ms" in row]
    if floors:
        lefts, rights = ([place + sign * 0.46 for place, _ in floors] for sign in (-1, 1))
        label = "floor (bytes / read rate)"
        axes.hlines([floor for _, floor in floors], lefts, rights, colors="black", linewidth=2, label=label)
    axes.set_xticks(centres, [f"batch {size}" for size in batch_sizes])
    axes.set_ylabel("tpot, ms per token")
    lines = [", ".join(part for part in parts if part) for parts in (heading, common)]
    axes.set_title("\n".join(line for line in lines if line), fontsize=11)
    axes.margins(y=0.08)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(file, dpi=120, metadata={"Software": None})


def bar_positions(
    rows: list[Row], names: list[str], batch_sizes: list[int], series: list[str]
) -> tuple[list[float], list[float]]:
    """x position of each row's bar, and the centre of each batch size's group; groups have no gaps."""
    positions, centres, left = [0.0] * len(rows), [], 0.0
    for size in batch_sizes:
        group = [number for number, row in enumerate(rows) if row["batch_size"] == size]
        for offset, number in enumerate(sorted(group, key=lambda number: series.index(names[number]))):
            positions[number] = left + offset
        centres.append(left + (len(group) - 1) / 2)
        left += len(group) + 1
    return positions, centres


def name_series(rows: list[Row]) -> tuple[list[str], list[str]]:
    """Properties common to all rows, and each row's series name, unique within a batch size."""
    texts = {key: [property_text(key, row) for row in rows] for key in (*IDENTITY, *DETAILS)}
    common = [texts[key][0] for key in IDENTITY if len(set(texts[key])) == 1]
    parts = [[shown(row["system"])] for row in rows]
    for key in IDENTITY:
        if len(set(texts[key])) > 1:
            extend(parts, texts[key])
    for row, own in zip(rows, parts, strict=True):
        own += ["mean"] if row["tpot_ms"].get("p50") is None else []
    for key in DETAILS:
        variants: dict[tuple[str, ...], set[str]] = {}
        for own, text in zip(parts, texts[key], strict=True):
            variants.setdefault(tuple(own), set()).add(text)
        extend(parts, [t if len(variants[tuple(own)]) > 1 else "" for own, t in zip(parts, texts[key], strict=True)])
    several = len({row.get("report") for row in rows}) > 1
    for distinction in ([shown(row["report"]) for row in rows] if several else [""] * len(rows), None):
        found = [(tuple(own), row["batch_size"]) for own, row in zip(parts, rows, strict=True)]
        twice = {name for (name, _), count in Counter(found).items() if count > 1}
        marks = distinction or [f"({found[: number + 1].count(own)})" for number, own in enumerate(found)]
        extend(parts, [mark if name in twice else "" for (name, _), mark in zip(found, marks, strict=True)])
    return common, [", ".join(own) for own in parts]


def extend(parts: list[list[str]], texts: list[str]) -> None:
    for own, text in zip(parts, texts, strict=True):
        if text:
            own.append(text)


def property_text(key: str, row: Row) -> str:
    value = row.get(key)
    if value is None:
        return ""
    return TEXTS.get(key, "{}").format(shown(value), s="" if value == 1 else "s")


def shown(value: Any) -> str:
    """Escapes a value to one short line that matplotlib shows literally and does not hide from the legend."""
    return one_line(value, 70).lstrip("_").replace("$", r"\$")


def tpot_ms(row: Row) -> Any:
    """Median tpot in ms if available, as in the tables, else the mean."""
    median = row["tpot_ms"].get("p50")
    return row["tpot_ms"].get("mean") if median is None else median
