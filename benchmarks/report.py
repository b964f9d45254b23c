"""What is made of the measured rows: CSV, tables, a plot, and what `findings` has to say.

``python benchmarks/report.py results.csv --markdown FILE --plot FILE`` makes them again without
measuring; ``--summary`` is one table of the main columns, ``--machines`` sets those of several
machines side by side; ``--compare OTHER.csv`` says by how much the ratios of two runs differ.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from findings import (
    CASE,
    OURS,
    VARIED,
    Row,
    by_case,
    checks,
    comparison,
    elements,
    growth,
    sizes_of,
    slower,
)

import gpl_fast

TEXTS = (
    "machine", "torch", "gpl_fast", "commit", "sweep", "shape", "target", "net", "provider",
    "dtype", "command",
)  # fmt: skip
FIELDS = (
    "machine", "threads", "torch", "gpl_fast", "commit", "sweep", "shape", "target", "peaked",
    "net", "provider", "dtype", "rounds", "seconds_median", "seconds_p20", "seconds_p80",
    "forward_seconds", "backward_seconds", "speedup_vs_eager_fp32", "peak_mib", "saved_bytes",
    "value_error", "grad_cosine", "gflop", "conv_seconds", "conv_share", "read_seconds",
    "later_seconds", "command",
)  # fmt: skip
ROOT = Path(__file__).resolve().parent.parent


def protocol() -> Row:
    """What all rows of a run share: machine, threads, versions, commit."""
    return {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gpl_fast": gpl_fast.__version__,
        "commit": _commit(),
    }


def machine() -> str:
    """The CPU's name, with family and model where it has no number, and the widest instructions
    that bfloat16 convolutions can use."""
    name, flags = platform.processor() or platform.machine(), ""
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        info = dict(part for line in lines if len(part := line.split("\t: ", 1)) == 2)
        info = {key.strip(): value for key, value in info.items()}
        name, flags = info.get("model name", name), info.get("flags", "")
        if not any(map(str.isdigit, name)) and "cpu family" in info:  # hidden by a hypervisor
            name += f", family {info['cpu family']}, model {info['model']}"
    known = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
    best = next((flag for flag in known if flag in flags.split()), None)
    return f"{name} ({best})" if best else name


def slug() -> str:
    """The machine as a file name."""
    words = "".join(ch if ch.isalnum() else " " for ch in machine().lower()).split()
    return "-".join([*words, str(torch.get_num_threads())])


def _commit() -> str:
    def git(*args: str) -> str:
        command = ["git", "-C", str(ROOT), *args]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "--short=10", "HEAD")
    sources = ("gpl_fast", "csrc", "benchmarks/*.py")
    changed = git("status", "--porcelain", "--", *sources) if commit else ""
    return commit + "+changes" * bool(changed) or "unknown"


def write_csv(rows: list[Row], path: Path) -> None:
    """All rows, numbers in full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, FIELDS, lineterminator="\n", extrasaction="raise")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[Row]:
    """What `write_csv` wrote; None where a cell is empty."""
    with path.open(newline="") as f:
        rows: list[Row] = list(csv.DictReader(f))
    for row in rows:
        row["peaked"] = row["peaked"] == "True"
        for field in FIELDS:
            if field not in (*TEXTS, "peaked"):
                row[field] = float(row[field]) if row.get(field) else None
    return rows


# ------------------------------------------------------------------------------------------ tables


def markdown(rows: list[Row]) -> str:
    """A table for each sweep with the command that makes it, where it is not faster, the protocol.

    Memory is what one step adds; the last columns are empty where no floor was measured.
    """
    lines = []
    for sweep, some in groupby(rows, lambda row: row["sweep"]):
        lines += _sweep_table(sweep, list(some))
    lines += ["**Where it is not faster.**", *(slower(rows) or ["Nowhere here."]), ""]
    r = rows[0]
    rounds = sorted({int(row["rounds"]) for row in rows})
    lines += [
        f"{r['machine']}, {float(r['threads']):.0f} threads, torch {r['torch']}, gpl_fast "
        f"{r['gpl_fast']} at {r['commit']}; {rounds[0]} to {rounds[-1]} interleaved rounds. "
        "Peaked: logits with the entropy of a trained net. Speedup: the shortest step of "
        "eager-fp32 over the provider's. Peak: what one step adds to a fresh process, the gradient "
        "included; saved: kept for the backward, without logits, target and weights. Errors "
        "against float64 on a crop. Share: of the step that its convolutions alone take.",
    ]
    return "\n".join(lines) + "\n"


def summary(rows: list[Row]) -> str:
    """One table of all cases without percentiles, empty where nothing was measured."""
    header = ["logits", "target", "provider", "time", "speedup", "peak", "saved", "value error",
              "gradient cosine", "convolutions' share"]  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "|---|---|---|" + "--:|" * (len(header) - 3)]
    for case, some in by_case(rows):
        first = _inputs(*case)
        for row in some:
            cells = [first[0], first[1], row["provider"], *_main_cells(row, "")]
            lines.append("| " + " | ".join(cells) + " |")
            first = ["", ""]
    return "\n".join(lines)


# Of each case that machines are compared in.
COMPARED = ("gpl_fast-fp32", "gpl_fast-bf16", "eager-bf16-cl")


def machines(rows: list[Row]) -> str:
    """A line for each case, and in a column for each machine how many times as fast as eager
    float32 the providers `COMPARED` are there."""
    names = list(dict.fromkeys(row["machine"] for row in rows))
    cases: dict[tuple[Any, ...], dict[tuple[str, str], float | None]] = {}
    for row in rows:
        case = cases.setdefault(tuple(row[k] for k in CASE), {})
        case[row["machine"], row["provider"]] = row["speedup_vs_eager_fp32"]
    lines = ["| logits | target | " + " | ".join(names) + " |", "|---|---|" + "--:|" * len(names)]
    for (sweep, *case), speedups in cases.items():
        columns = ([speedups.get((name, p)) for p in COMPARED] for name in names)
        cells = [" · ".join("–" if x is None else f"{x:.1f}" for x in each) for each in columns]
        lines.append("| " + " | ".join([*_inputs(sweep, *case), *cells]) + " |")
    return "\n".join(lines)


def _inputs(sweep: str, shape: str, target: str, peaked: bool, net: str) -> list[str]:
    """The cells that say what a case is of."""
    kind = f"{target}, {'peaked' if peaked else 'flat'}" + ", training" * (sweep == "training")
    return [shape.replace("x", "×") + f", {net}" * (net != "1,1,1,1,1"), kind]


def _sweep_table(sweep: str, rows: list[Row]) -> list[str]:
    conv = any(row["conv_share"] is not None for row in rows)
    header = ["logits", "target", "provider", "time (p20–p80)", "forward", "backward", "speedup",
              "peak", "saved", "value error", "gradient cosine"] + ["share"] * conv  # fmt: skip
    lines = [f"### {sweep}", ""]
    command = f"python benchmarks/run.py --sweep {sweep}"
    lines += [f"`{command}`" if sweep != "own" else f"`{rows[0]['command']}` and its like", ""]
    lines += ["| " + " | ".join(header) + " |", "|---|---|---|" + "--:|" * (len(header) - 3)]
    for case, some in by_case(rows):
        first = _inputs(*case)
        for row in some:
            low, high = (_seconds(row[k]) for k in ("seconds_p20", "seconds_p80"))
            cells = [
                *first,
                row["provider"],
                f"{_seconds(row['seconds_median'])} ({low}–{high})",
                *(_seconds(row[k]) for k in ("forward_seconds", "backward_seconds")),
                *_main_cells(row, "n/a")[1 : None if conv else -1],
            ]
            lines.append("| " + " | ".join(cells) + " |")
            first = ["", ""]
    return [*lines, ""]


def _main_cells(row: Row, missing: str) -> list[str]:
    return [
        _seconds(row["seconds_median"]),
        text(row["speedup_vs_eager_fp32"], "{:.2f}×", missing=missing),
        text(row["peak_mib"], "{:.0f} MiB", missing=missing),
        text(row["saved_bytes"], "{:.1f} MiB", 2**-20, missing),
        text(row["value_error"], "{:.1e}", missing=missing),
        text(row["grad_cosine"], "{:.4f}", missing=missing),
        text(row["conv_share"], "{:.0%}", missing=missing),
    ]


def _seconds(s: float | None) -> str:
    if s is None:
        return "n/a"
    return f"{1e3 * s:.1f} ms" if s < 0.1 else f"{s:.3f} s" if s < 10 else f"{s:.1f} s"


def text(value: float | None, form: str, scale: float = 1, missing: str = "n/a") -> str:
    """The cell, `missing` for None."""
    return missing if value is None else form.format(value * scale)


# -------------------------------------------------------------------------------------------- plot


def plot(rows: list[Row], path: Path) -> None:
    """Seconds and peak MiB, log-log: a column for each sweep that varies one size.

    Dotted: the floors, which are the convolutions alone and a pass over the logits, by dtype, and
    the gradient's own bytes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = [name for name in VARIED if any(row["sweep"] == name for row in rows)]
    swept = [row for row in rows if row["sweep"] in columns]
    if not columns:
        return
    names = list(dict.fromkeys(row["provider"] for row in swept))
    figure, axes = plt.subplots(
        2, len(columns), figsize=(4.2 * len(columns) + 1, 7), squeeze=False, sharex="col"
    )
    for j, sweep in enumerate(columns):
        what, size_of = VARIED[sweep]
        mine = [row for row in swept if row["sweep"] == sweep]
        sizes = sorted({size_of(*sizes_of(row)) for row in mine})
        for i, field in enumerate(("seconds_median", "peak_mib")):
            axis = axes[i][j]
            for k, name in enumerate(names):
                ours = name.startswith(OURS)
                style = {"linewidth": 2.4 if ours else 1.2, "linestyle": "-" if ours else "--"}
                some = [row for row in mine if row["provider"] == name]
                _line(axis, some, lambda r, f=field: r[f], size_of, name, f"C{k}", style)
            dotted = {"linewidth": 1, "linestyle": ":"}
            if i:
                gradient = [row for row in mine if row["provider"] == names[0]]
                _line(axis, gradient, lambda r: 4 * elements(r) / 2**20, size_of,
                      "the gradient itself", "0.4", dotted)  # fmt: skip
            else:
                for dtype, grey in (("float32", "0.2"), ("bfloat16", "0.6")):
                    some = [r for r in mine if r["dtype"] == dtype and r["conv_seconds"]]
                    _line(axis, some, lambda r: r["conv_seconds"] + r["read_seconds"], size_of,
                          f"floor, {dtype}", grey, dotted)  # fmt: skip
            fixed = _fixed_sizes(mine[0], sweep)
            axis.set(title=fixed if i == 0 else None, xlabel=what if i else None)
            axis.set(ylabel=("seconds", "peak MiB")[i] if j == 0 else None)
            axis.set_xticks(sizes, list(map(str, sizes)), rotation=60, ha="right")
            axis.xaxis.minorticks_off()
            axis.grid(alpha=0.3, which="both")
        axes[0][j].legend(fontsize=7)
        axes[1][j].legend(fontsize=7)
    r = swept[0]
    peaked = "peaked" if r["peaked"] else "flat"
    figure.suptitle(
        f"forward and backward, {peaked} logits; {r['machine']}, {float(r['threads']):.0f} threads",
        fontsize=10,
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _line(
    axis: Any, rows: list[Row], value: Any, size_of: Any, name: str, color: str, style: Any
) -> None:
    points = {size_of(*sizes_of(r)): value(r) for r in rows if value(r)}
    if points:
        at = sorted(points)
        axis.loglog(at, [points[x] for x in at], marker="o", markersize=3, label=name, color=color,
                    **style)  # fmt: skip


def _fixed_sizes(row: Row, sweep: str) -> str:
    n, c, h, w = sizes_of(row)
    parts = {"N": f"{n}", "C": f"{c}", "pixels": f"{h} × {w}"}
    del parts[VARIED[sweep][0]]
    return f"{row['target']}; " + ", ".join(f"{k} = {v}" for k, v in parts.items())


def main() -> int:
    """Tables, plot and checks of rows measured before; 1 if `--compare` finds a ratio moved."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("csv", type=Path, nargs="+")
    parser.add_argument("--sweep", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--summary", action="store_true", help="one table of the main columns")
    parser.add_argument("--machines", action="store_true", help="one table of all CSVs' machines")
    parser.add_argument("--compare", type=Path, metavar="OTHER.csv")
    args = parser.parse_args()
    rows = [row for path in args.csv for row in read_csv(path)]
    if args.sweep:
        rows = [row for row in rows if row["sweep"] in args.sweep]
    if args.compare:
        found, met = comparison(rows, read_csv(args.compare))
        print(found)
        return int(not met)
    if args.machines or args.summary:
        print(machines(rows) if args.machines else summary(rows))
        return 0
    if args.markdown:
        args.markdown.write_text(markdown(rows))
    else:
        print(markdown(rows), end="")
    for line in (*growth(rows), *checks(rows)):
        print(line)
    if args.plot:
        plot(rows, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
