"""The rows of `run.py`: their CSV, and the tables made of them.

A CSV begins with lines "# key: value" of what its rows share: machine, versions, command.

    python benchmarks/report.py results.csv                  # every row, and where it is not faster
    python benchmarks/report.py one.csv other.csv --machines # the speedups of machines side by side
    python benchmarks/report.py results.csv --plot FILE      # the sweeps, log-log
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

import gpl_fast
from gpl_fast.tools.roofline import csv_rows

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
SHARED = ("machine", "threads", "torch", "gpl_fast", "commit", "command")
CASE = ("sweep", "shape", "target", "peaked", "net")  # what rows that are compared share
NUMBERS = (
    "rounds", "seconds_median", "seconds_p20", "seconds_p80", "forward_seconds",
    "backward_seconds", "speedup_vs_eager_fp32", "peak_mib", "saved_bytes", "value_error",
    "grad_cosine", "gflop", "conv_seconds", "read_seconds",
)  # fmt: skip
FIELDS = (*CASE, "provider", "dtype", *NUMBERS)
OURS = "gpl_fast"
# What a sweep varies, and the sizes (N, C, H, W) -> that quantity.
VARIED = {
    "classes": ("C", lambda n, c, h, w: c),
    "crop": ("pixels", lambda n, c, h, w: h * w),
    "batch": ("N", lambda n, c, h, w: n),
}


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
    if shutil.which("git") is None:
        return "unknown"

    def git(*args: str) -> str:
        command = ["git", "-C", str(ROOT), *args]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "--short=10", "HEAD")
    sources = ("gpl_fast", "csrc", "benchmarks/*.py")
    changed = git("status", "--porcelain", "--", *sources) if commit else ""
    return commit + "+changes" * bool(changed) or "unknown"


def replace_text(path: Path, text: str) -> None:
    """The file is the old or the new one, whenever it is looked at."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.replace(path)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """The rows of one run, numbers with six digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as f:
        f.writelines(f"# {key}: {rows[0][key]}\n" for key in SHARED)
        writer = csv.DictWriter(f, FIELDS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()
                             if k in FIELDS})  # fmt: skip


def read_csv(path: Path) -> list[Row]:
    """What `write_csv` wrote; None where a cell is empty."""
    rows: list[Row] = list(csv_rows(path.read_text()))
    for row in rows:
        row["peaked"] = row["peaked"] == "True"
        row |= {k: float(row[k]) if row[k] else None for k in NUMBERS}
    return rows


def sizes_of(row: Row) -> tuple[int, int, int, int]:
    """(N, C, H, W) of its logits."""
    n, c, h, w = map(int, row["shape"].split("x"))
    return n, c, h, w


def by_case(rows: Sequence[Row]) -> Iterator[tuple[tuple[Any, ...], list[Row]]]:
    """Neighbouring rows of one case."""
    for case, some in groupby(rows, lambda row: tuple(row[k] for k in CASE)):
        yield case, list(some)


def page(rows: Sequence[Row]) -> str:
    """All rows, how time and memory grow, where it is not faster, and how that was measured."""
    r, rounds = rows[0], sorted(int(row["rounds"]) for row in rows)
    return "\n".join(
        [
            *table(rows),
            "",
            *(f"- {line}" for line in growth(rows)),
            "",
            "Where it is not faster:",
            *(slower(rows) or ["nowhere here."]),
            "",
            f"{r['machine']}, {r['threads']} threads, torch {r['torch']}, gpl_fast "
            f"{r['gpl_fast']} at {r['commit']}, `{r['command']}`; {rounds[0]} to {rounds[-1]} "
            "rounds a row. Peaked: logits with the entropy of a trained net. Speedup: the shortest "
            "step of eager-fp32 over the provider's. Peak: what one step adds to a fresh process, "
            "the gradient included. Saved: kept for the backward, without logits, target and "
            "weights. Errors: against float64 on a crop. Floor: the share of a step that its "
            "convolutions alone need.",
        ]
    )


def table(rows: Sequence[Row]) -> list[str]:
    """A line for each row, empty where nothing was measured."""
    header = ["logits", "target", "provider", "time (p20–p80)", "forward", "backward", "speedup",
              "peak", "saved", "value error", "gradient cosine", "floor"]  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "|---|---|---|" + "--:|" * (len(header) - 3)]
    for case, some in by_case(rows):
        first = _inputs(*case)
        for row in some:
            low, high = (_seconds(row[k]) for k in ("seconds_p20", "seconds_p80"))
            floor = row["conv_seconds"]
            cells = [
                *first,
                row["provider"],
                f"{_seconds(row['seconds_median'])} ({low}–{high})",
                *(_seconds(row[k]) for k in ("forward_seconds", "backward_seconds")),
                _text(row["speedup_vs_eager_fp32"], "{:.2f}×"),
                _text(row["peak_mib"], "{:.0f} MiB"),
                _text(row["saved_bytes"], "{:.1f} MiB", 2**-20),
                _text(row["value_error"], "{:.1e}"),
                _text(row["grad_cosine"], "{:.4f}"),
                _text(floor, "{:.0%}", 1 / row["seconds_median"]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
            first = ["", ""]
    return lines


# Of each case that machines are compared in.
COMPARED = ("gpl_fast-fp32", "gpl_fast-bf16", "eager-bf16-cl")


def machines(rows: Sequence[Row]) -> list[str]:
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
    return lines


def _inputs(sweep: str, shape: str, target: str, peaked: bool, net: str) -> list[str]:
    """The cells that say what a case is of."""
    kind = f"{target}, {'peaked' if peaked else 'flat'}" + ", training" * (sweep == "training")
    return [shape.replace("x", "×") + f", {net}" * (net != "1,1,1,1,1"), kind]


def _seconds(s: float | None) -> str:
    if s is None:
        return ""
    return f"{1e3 * s:.1f} ms" if s < 0.1 else f"{s:.3f} s" if s < 10 else f"{s:.1f} s"


def _text(value: float | None, form: str, scale: float = 1) -> str:
    return "" if value is None else form.format(value * scale)


def slower(rows: Sequence[Row], least: float = 1.1) -> list[str]:
    """A line for each case and dtype in which ours is not `least` times as fast as the best other
    provider of that dtype."""
    lines = []
    for case, some in by_case(rows):
        for dtype in dict.fromkeys(row["dtype"] for row in some):
            # Without the loss, which is without an error, there is nothing to be faster than.
            alike = [r for r in some if r["dtype"] == dtype and r["value_error"] is not None
                     and r["speedup_vs_eager_fp32"] is not None]  # fmt: skip
            ours = [r for r in alike if r["provider"].startswith(OURS)]
            others = [r for r in alike if r not in ours]
            if not ours or not others:
                continue
            mine, best = (max(x, key=lambda r: r["speedup_vs_eager_fp32"]) for x in (ours, others))
            ratio = mine["speedup_vs_eager_fp32"] / best["speedup_vs_eager_fp32"]
            if ratio < least:
                about = f"{', '.join(_inputs(*case))} ({case[0]})"
                lines.append(
                    f"- {about}: {mine['provider']} against {best['provider']}: {ratio:.2f}×"
                )
    return lines


def growth(rows: Sequence[Row]) -> list[str]:
    """By how much time and memory grow from a sweep's first size to its last, against theory:
    FLOPs of the network and bytes of the logits."""
    lines = []
    for sweep, (what, size_of) in VARIED.items():
        mine = [row for row in rows if row["sweep"] == sweep and sizes_of(row)[1] > 1]
        for name in dict.fromkeys(row["provider"] for row in mine):
            some = sorted((size_of(*sizes_of(r)), i) for i, r in enumerate(mine)
                          if r["provider"] == name)  # fmt: skip
            (a, first), (b, last) = some[0], some[-1]
            if a == b:
                continue
            fields = ("seconds_median", "peak_mib", "saved_bytes", "gflop")
            time, peak, saved, flops = (_factor(mine[first], mine[last], k) for k in fields)
            logits = math.prod(sizes_of(mine[last])) / math.prod(sizes_of(mine[first]))
            lines.append(
                f"{sweep}, {name}: {what} {a} to {b}: time x{time}, peak x{peak}, saved x{saved}; "
                f"in theory FLOPs x{flops}, logits x{logits:.1f}"
            )
    return lines


def _factor(first: Row, last: Row, field: str) -> str:
    return f"{last[field] / first[field]:.1f}" if first[field] and last[field] else " n/a"


def main() -> int:
    """Tables and plot of rows measured before."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path, nargs="+")
    parser.add_argument("--sweep", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--machines", action="store_true", help="one table of all CSVs' machines")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG, of the first CSV")
    args = parser.parse_args()
    runs = [
        [row for row in read_csv(path) if not args.sweep or row["sweep"] in args.sweep]
        for path in args.csv
    ]
    if args.plot:
        import plots

        plots.sweeps(runs[0], args.plot)
    elif args.machines:
        print("\n".join(machines([row for rows in runs for row in rows])))
    else:
        print("\n\n".join(page(rows) for rows in runs if rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
