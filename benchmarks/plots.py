"""Plots of measured rows: the CPU's sweeps, a GPU's workloads.

``python benchmarks/plots.py rows.json image.png`` plots those of benchmarks/on_device.py.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from report import OURS, VARIED, Row, sizes_of

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Value = Callable[[Row], float | None]


def sweeps(rows: Sequence[Row], path: Path) -> None:
    """Seconds and peak MiB, log-log: a column for each sweep that varies one size.

    Dotted: the floors, which are the convolutions alone and a pass over the logits, by dtype, and
    the gradient's own bytes.
    """
    columns = [name for name in VARIED if any(row["sweep"] == name for row in rows)]
    if not columns:
        return
    names = dict.fromkeys(row["provider"] for row in rows if row["sweep"] in columns)
    colors = {name: f"C{k}" for k, name in enumerate(names)}
    figure, axes = plt.subplots(
        2, len(columns), figsize=(4.2 * len(columns) + 1, 7), squeeze=False, sharex="col"
    )
    for (time, memory), sweep in zip(axes.T, columns, strict=True):
        mine = [row for row in rows if row["sweep"] == sweep]
        for name, color in colors.items():
            some = [row for row in mine if row["provider"] == name]
            width, line = (2.4, "-") if name.startswith(OURS) else (1.2, "--")
            style = {"color": color, "linewidth": width, "linestyle": line}
            _line(time, some, lambda r: r["seconds_median"], name, **style)
            _line(memory, some, lambda r: r["peak_mib"], name, **style)
        for dtype, grey in (("float32", "0.2"), ("bfloat16", "0.6")):
            some = [r for r in mine if r["dtype"] == dtype and r["conv_seconds"]]
            _line(time, some, lambda r: r["conv_seconds"] + r["read_seconds"],
                  f"floor, {dtype}", color=grey, linestyle=":")  # fmt: skip
        _line(memory, mine, lambda r: math.prod(sizes_of(r)) / 2**18, "the gradient itself",
              color="0.4", linestyle=":")  # fmt: skip
        what, size_of = VARIED[sweep]
        sizes = sorted({size_of(*sizes_of(row)) for row in mine})
        time.set(title=_fixed_sizes(mine[0], what))
        memory.set(xlabel=what)
        for axis in (time, memory):
            axis.set_xticks(sizes, list(map(str, sizes)), rotation=60, ha="right")
            axis.xaxis.minorticks_off()
            axis.grid(alpha=0.3, which="both")
            axis.legend(fontsize=7)
    axes[0][0].set(ylabel="seconds")
    axes[1][0].set(ylabel="peak MiB")
    r = rows[0]
    _save(figure, f"forward and backward; {r['machine']}, {r['threads']} threads", path)


def workloads(rows: Sequence[Row], path: Path) -> None:
    """Forward and backward milliseconds of each workload and provider, and its peak memory."""
    cases = list(dict.fromkeys((row["workload"], row["target"]) for row in rows))
    figure, axes = plt.subplots(2, len(cases), figsize=(2.6 * len(cases) + 1, 7), squeeze=False)
    for (time, memory), case in zip(axes.T, cases, strict=True):
        mine = [row for row in rows if (row["workload"], row["target"]) == case]
        names = [row["provider"] for row in mine]
        forward, backward = ([1e3 * row[k] for row in mine] for k in
                             ("forward_seconds", "backward_seconds"))  # fmt: skip
        time.bar(names, forward, label="forward")
        time.bar(names, backward, bottom=forward, label="backward")
        time.set(title="\n".join(case))
        memory.bar(names, [row.get("peak_mib") or 0.0 for row in mine], color="C2")
        for axis in (time, memory):
            axis.tick_params(axis="x", labelrotation=90, labelsize=7)
    axes[0][0].set(ylabel="ms")
    axes[1][0].set(ylabel="peak MiB")
    axes[0][0].legend(fontsize=8)
    _save(figure, rows[0]["machine"], path)


def _line(axis: Any, rows: Sequence[Row], value: Value, label: str, **style: Any) -> None:
    points = {VARIED[r["sweep"]][1](*sizes_of(r)): value(r) for r in rows if value(r)}
    if points:
        at = sorted(points)
        axis.loglog(at, [points[x] for x in at], marker="o", markersize=3, label=label, **style)


def _fixed_sizes(row: Row, varied: str) -> str:
    n, c, h, w = sizes_of(row)
    parts = {"N": f"{n}", "C": f"{c}", "pixels": f"{h} × {w}"}
    del parts[varied]
    peaked = "peaked" if row["peaked"] else "flat"
    return f"{row['target']}, {peaked}; " + ", ".join(f"{k} = {v}" for k, v in parts.items())


def _save(figure: Any, title: str, path: Path) -> None:
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    found = json.loads(Path(sys.argv[1]).read_text())["rows"]
    if timed := [row for row in found if "seconds_median" in row]:
        workloads(timed, Path(sys.argv[2]))
