"""The page for people of a GPU report."""

from __future__ import annotations

from typing import Any

PROTOCOL = (
    "Medians of interleaved rounds, timed with {clock}; peak: what one step adds to the "
    "allocator's mark, the gradient included; saved: kept for the backward; errors against float64 "
    "on a crop; FLOPs as the loss is defined: both branches and the data gradient."
)


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
