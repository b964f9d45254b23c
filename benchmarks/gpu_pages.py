"""What is made of a GPU report: the page for people, the plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from report import Row

PROTOCOL = (
    "Medians of interleaved rounds, timed with {clock}; peak: what one step adds to the "
    "allocator's mark, the gradient included; saved: kept for the backward; errors against float64 "
    "on a crop; FLOPs as the loss is defined: both branches and the data gradient."
)


def plot(rows: list[Row], path: Path) -> None:
    """Forward and backward milliseconds of each workload and provider, and its peak memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = list(dict.fromkeys((row["workload"], row["target"]) for row in rows))
    figure, axes = plt.subplots(2, len(cases), figsize=(2.6 * len(cases) + 1, 7), squeeze=False)
    for j, case in enumerate(cases):
        mine = [row for row in rows if (row["workload"], row["target"]) == case]
        names = [row["provider"] for row in mine]
        forward, backward = ([1e3 * row[k] for row in mine] for k in
                             ("forward_seconds", "backward_seconds"))  # fmt: skip
        axes[0][j].bar(names, forward, label="forward")
        axes[0][j].bar(names, backward, bottom=forward, label="backward")
        axes[0][j].set(title="\n".join(case), ylabel="" if j else "ms")
        axes[1][j].bar(names, [row.get("peak_mib") or 0.0 for row in mine], color="C2")
        axes[1][j].set(ylabel="" if j else "peak MiB")
        for axis in axes[:, j]:
            axis.tick_params(axis="x", labelrotation=90, labelsize=7)
    axes[0][0].legend(fontsize=8)
    figure.suptitle(rows[0]["machine"], fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def markdown(found: dict[str, Any]) -> str:
    """The report for people."""
    about = found["protocol"]
    lines = [f"# {found['machine']}" + (" (dry run)" if found["dry"] else ""), ""]
    lines += [f"torch {about['torch']}, gpl_fast {about['gpl_fast']} at {about['commit']}. "
              f"{found['driver']}", ""]  # fmt: skip
    operators = found["info"].get("operators", {})
    lines += [f"Operators: {operators.get('cuda', operators.get('library'))}.", ""]
    lines += ["| stage | result | seconds | |", "|---|---|--:|---|"]
    for s in found["stages"]:
        lines.append(f"| {s['name']} | {s['status']} | {s['seconds']:.0f} | {s['detail']} |")
    names = ["workload", "target", "provider", "forward", "backward", "speedup", "TFLOP/s", "peak",
             "saved", "value error", "gradient cosine"]  # fmt: skip
    lines += ["", "| " + " | ".join(names) + " |", "|---|---|---|" + "--:|" * 8]
    forms = [("forward_seconds", "{:.2f} ms", 1e3), ("backward_seconds", "{:.2f} ms", 1e3),
             ("speedup_vs_eager_fp32", "{:.2f}×", 1), ("tflop_per_second", "{:.0f}", 1),
             ("peak_mib", "{:.0f} MiB", 1), ("saved_bytes", "{:.1f} MiB", 2**-20),
             ("value_error", "{:.1e}", 1), ("grad_cosine", "{:.4f}", 1)]  # fmt: skip
    for row in found["benchmark"]["rows"]:
        name = f"{row['workload']} {row['shape'].replace('x', '×')}"
        cells = [name, row["target"], row["provider"]]
        if "seconds_median" in row:
            cells += ["n/a" if row.get(k) is None else f.format(row[k] * u) for k, f, u in forms]
        else:
            cells += [row.get("error", "not measured"), *[""] * (len(forms) - 1)]
        lines.append("| " + " | ".join(cells) + " |")
    if left_out := found["benchmark"]["left_out"]:
        lines += ["", f"Left out for want of time: {', '.join(left_out)}."]
    clock = "the CPU's clock" if found["dry"] else "CUDA events"
    lines += ["", PROTOCOL.format(clock=clock)]
    return "\n".join(lines) + "\n"
