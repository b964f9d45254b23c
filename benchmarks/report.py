"""What is made of the measured rows: CSV, a markdown table, a plot.

``python benchmarks/report.py results.csv --markdown FILE --plot FILE`` makes them again without
measuring.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import gpl_fast

FIELDS = (
    "machine", "threads", "torch", "gpl_fast", "commit", "shape", "target", "peaked", "provider",
    "dtype", "rounds", "seconds_median", "seconds_p20", "seconds_p80", "speedup_vs_eager_fp32",
    "peak_mib", "saved_bytes", "value_error", "grad_cosine", "conv_seconds", "conv_share",
)  # fmt: skip
Row = dict[str, Any]
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
    """The CPU's name, and the widest instructions that bfloat16 convolutions can use."""
    name, flags = platform.processor() or platform.machine(), ""
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        info = dict(part for line in lines if len(part := line.split("\t: ", 1)) == 2)
        info = {key.strip(): value for key, value in info.items()}
        name, flags = info.get("model name", name), info.get("flags", "")
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
    text = ("machine", "torch", "gpl_fast", "commit", "shape", "target", "provider", "dtype")
    with path.open(newline="") as f:
        rows: list[Row] = list(csv.DictReader(f))
    for row in rows:
        row["peaked"] = row["peaked"] == "True"
        for field in set(FIELDS) - {*text, "peaked"}:
            row[field] = float(row[field]) if row[field] else None
    return rows


def markdown(rows: list[Row]) -> str:
    """A table for README.md, one line for each row, and the protocol under it."""
    conv = any(row["conv_share"] is not None for row in rows)
    header = ["logits", "target", "provider", "time (p20–p80)", "speedup", "peak", "saved",
              "value error", "gradient cosine"] + ["share of conv ceiling"] * conv  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "|---|---|---|" + "--:|" * (len(header) - 3)]
    previous: tuple[Any, ...] = ()
    for row in rows:
        case = (row["shape"].replace("x", "×"), row["target"] + ", peaked" * bool(row["peaked"]))
        low, high = (_seconds(row[k]) for k in ("seconds_p20", "seconds_p80"))
        cells = [
            *(("", "") if case == previous else case),
            row["provider"],
            f"{_seconds(row['seconds_median'])} ({low}–{high})",
            _text(row["speedup_vs_eager_fp32"], "{:.2f}×"),
            _text(row["peak_mib"], "{:.0f} MiB"),
            _text(row["saved_bytes"], "{:.1f} MiB", 2**-20),
            _text(row["value_error"], "{:.1e}"),
            _text(row["grad_cosine"], "{:.4f}"),
        ]
        lines.append("| " + " | ".join(cells + [_text(row["conv_share"], "{:.0%}")] * conv) + " |")
        previous = case
    r = rows[0]
    rounds = "–".join(str(int(x)) for x in sorted({float(row["rounds"]) for row in rows}))
    lines += [
        "",
        f"{r['machine']}, {float(r['threads']):.0f} threads, torch {r['torch']}, gpl_fast "
        f"{r['gpl_fast']} at {r['commit']}; {rounds} interleaved rounds; speedup: median over "
        "rounds of eager-fp32 / provider; peak: what one step adds to a fresh process; saved: kept "
        "for the backward, without logits, target and weights; errors against float64 on a crop.",
    ]
    return "\n".join(lines) + "\n"


def _seconds(s: float) -> str:
    return f"{1e3 * s:.1f} ms" if s < 0.1 else f"{s:.3f} s" if s < 10 else f"{s:.1f} s"


def _text(value: float | None, form: str, scale: float = 1) -> str:
    return "n/a" if value is None else form.format(value * scale)


def plot(rows: list[Row], path: Path) -> None:
    """Time and peak memory per image against the number of classes, log-log, a column a target.

    Only the rows with the first row's height and width.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = rows[0]["shape"].split("x")[2:]
    rows = [row for row in rows if row["shape"].split("x")[2:] == size]
    kinds = list(dict.fromkeys(row["target"] for row in rows))
    names = list(dict.fromkeys(row["provider"] for row in rows))
    measures = (("seconds_median", "seconds per image"), ("peak_mib", "peak MiB per image"))
    figure, axes = plt.subplots(
        2, len(kinds), figsize=(4 * len(kinds) + 1, 7), squeeze=False, sharex=True, sharey="row"
    )
    for j, kind in enumerate(kinds):
        for i, (field, label) in enumerate(measures):
            axis = axes[i][j]
            for k, name in enumerate(names):
                points: dict[int, float] = {}
                for row in rows:
                    n, c, _, _ = map(int, row["shape"].split("x"))
                    if (row["target"], row["provider"]) == (kind, name) and row[field]:
                        points[c] = row[field] / n
                mine = name.startswith("gpl_fast")
                style = {"linewidth": 2.4 if mine else 1.2, "linestyle": "-" if mine else "--"}
                at = sorted(points)
                axis.loglog(at, [points[c] for c in at], marker="o", label=name, color=f"C{k}",
                            markersize=4, **style)  # fmt: skip
            axis.set(title=f"{kind} target" if i == 0 else None, ylabel=label if j == 0 else None,
                     xlabel="classes C" if i else None)  # fmt: skip
            classes = sorted({int(row["shape"].split("x")[1]) for row in rows})
            axis.set_xticks(classes, [str(c) for c in classes])
            axis.xaxis.minorticks_off()
            axis.grid(alpha=0.3, which="both")
    axes[0][0].legend(fontsize=8)
    r = rows[0]
    threads = f"{float(r['threads']):.0f} threads"
    title = f"forward and backward, {'×'.join(size)} pixels; {r['machine']}, {threads}"
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Table and plot of rows measured before."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    args = parser.parse_args()
    rows = read_csv(args.csv)
    if args.markdown:
        args.markdown.write_text(markdown(rows))
    else:
        print(markdown(rows), end="")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
