# SPDX-License-Identifier: Apache-2.0
"""Draws h100_waterfall.png from the reports beside it: what each step took off a token's time at batch 1."""

import json
from pathlib import Path

from matplotlib.figure import Figure

FOLDER = Path(__file__).resolve().parent
STEPS = [  # what was in force, report, exe_mode
    ("plain torch, eager", "h100_30b_bf16_reference.json", "eager"),
    ("plain torch,\nreplayed from a graph", "h100_30b_bf16_reference.json", "graph"),
    ("fused kernels, started early,\ntiles chosen in the whole step", "h100_30b_bf16_fused_before.json", "graph"),
    ("attention in two kernels,\ndown projection of one warp", "h100_30b_bf16_fused.json", "graph"),
]


def row_of(report: str, exe_mode: str) -> dict:
    """The row at batch 1."""
    rows = json.loads((FOLDER / report).read_text(encoding="utf-8"))["results"]
    return next(row for row in rows if (row["exe_mode"], row["batch_size"]) == (exe_mode, 1))


def main() -> None:
    """Writes the picture. The axis is logarithmic, so that equal lengths are equal factors."""
    times_ms = [row_of(report, mode)["tpot_ms"]["p50"] for _, report, mode in STEPS]
    floor_ms = row_of(*STEPS[-1][1:])["floor_ms"]
    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for index, time_ms in enumerate(times_ms):
        before_ms = times_ms[max(0, index - 1)]
        axes.barh(index, time_ms - 1, left=1, height=0.6, color="tab:blue")
        axes.barh(index, before_ms - time_ms, left=time_ms, height=0.6, color="tab:blue", alpha=0.18)
        factor = f"  ({before_ms / time_ms:.2f} times faster)" if index else ""
        axes.text(before_ms * 1.06, index, f"{time_ms:.2f}{factor}", va="center", fontsize=9)
    axes.axvline(floor_ms, color="black", linewidth=2)
    axes.text(floor_ms * 1.04, len(STEPS) - 0.3, f"floor {floor_ms:.2f}", va="bottom", fontsize=9)
    axes.set_xscale("log")
    axes.set_xlim(1, 400)
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    axes.set_xlabel("tpot p50, ms per token (logarithmic)")
    axes.set_ylim(len(STEPS) - 0.25, -0.5)
    axes.set_yticks(range(len(STEPS)), [name for name, *_ in STEPS], fontsize=9)
    axes.set_title("Qwen3-30B-A3B shape, bfloat16, batch 1, 64 tokens in, one NVIDIA H100 80GB HBM3", fontsize=10)
    figure.savefig(FOLDER / "h100_waterfall.png", dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
