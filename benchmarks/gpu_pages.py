"""The page for people of a GPU report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpl_fast.tools.columns import NOW
from gpl_fast.tools.gpus import CHIPS
from gpl_fast.tools.prediction import predict
from gpl_fast.tools.workload import Workload

PROTOCOL = (
    "Medians of interleaved rounds, timed with {clock}; peak: what one step adds to the "
    "allocator's mark, the gradient included; saved: kept for the backward; errors against float64 "
    "on a crop; FLOPs as the loss is defined: both branches and the data gradient."
)


def markdown(found: dict[str, Any]) -> str:
    """The report for people: what matters most first."""
    about, library = found["protocol"], found["library"]
    lines = [f"# {found['machine']}" + (" (dry run)" if found["dry"] else ""), ""]
    lines += [f"torch {about['torch']}, gpl_fast {about['gpl_fast']} at {about['commit']}, "
              f"{found['seconds']:.0f} s. {library.get('driver', '')}", ""]  # fmt: skip
    operators = library.get("info", {}).get("operators", {})
    lines += [f"Operators: {operators.get('cuda', operators.get('library'))}, "
              f"{library.get('library', 'not looked at yet')}.", ""]  # fmt: skip
    steps = [[s["name"], s["status"], f"{s['seconds']:.0f}", s["detail"]] for s in found["steps"]]
    lines += table(["step", "result", "seconds", ""], steps)
    rows = [[r["case"], r["what"], f"{r['error']:.1e}", f"{r['bound']:.1e}",
             "" if r["ok"] else "**wrong**"] for r in found["truth"]]  # fmt: skip
    lines += ["## Right?", "", *table(["case", "what", "error", "at most", ""], rows)]
    tests = found["tests"]
    counted = ", ".join(f"{tests[k]} {k}" for k in ("passed", "failed", "skipped"))
    lines += [f"Tests: {counted}." + "".join(f"\n- {name}" for name in tests["names"]), ""]
    lines += ["## As predicted?", "", *table(
        ["workload", "stage", "predicted, ms", "measured, ms", "off"], _predicted(found)
    )]  # fmt: skip
    lines += ["## How fast?", "", *_times(found["benchmark"]["rows"])]
    if left_out := found["benchmark"]["left_out"]:
        lines += [f"Left out for want of time: {', '.join(left_out)}.", ""]
    lines += ["## Tiles", "", *_tiles(found["tiles"]), "## Who is the faster?", ""]
    choices = found["choices"]
    layers = [
        [
            f"{r['in_channels']} -> {r['out_channels']}",
            "data gradient, ATen's",
            f"{r['kernel_ms']:.3f}",
            f"{r['aten_ms']:.3f}",
        ]
        for r in choices["backward"]
    ]
    layers += [[f"{r['classes']} classes", "softmax_bwd, Triton's", f"{r['cuda_ms']:.3f}",
                f"{r['triton_ms']:.3f}"] for r in choices["softmax"]]  # fmt: skip
    layers += [[f"{r['c_in']} -> {r['c_out']}", "forward with a halo, Triton's",
                f"{r['halo_ms']:.3f}", f"{r['triton_ms']:.3f}"] for r in found["halo"]]  # fmt: skip
    lines += table(["layer", "what, and the other's", "CUDA, ms", "the other, ms"], layers)
    clock = "the CPU's clock" if found["dry"] else "CUDA events"
    return "\n".join([*lines, PROTOCOL.format(clock=clock)]) + "\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown, and an empty line; the first two columns are words."""
    if not rows:
        return ["Nothing yet.", ""]
    rule = "|---|---|" + "--:|" * (len(columns) - 2)
    cells = [columns, *rows]
    lines = ["| " + " | ".join(str(c).replace("|", "/") for c in row) + " |" for row in cells]
    return [lines[0], rule, *lines[1:], ""]


def _predicted(found: dict[str, Any]) -> list[list[str]]:
    """A line a stage of each workload that was profiled; of a GPU that nobody knows what was
    measured alone."""
    words = found["machine"].lower().replace("rtx ", "rtx").replace("-", " ").split()
    gpu = next((g for g in CHIPS if g in words), None)
    lines = []
    for profile in found["profiles"]:
        n, c, h, w = profile["shape"]
        work = Workload((n, c, h, w), profile["target"], "sigmoid" if c == 1 else "softmax")
        expected: dict[str, float] = {}
        for stage in predict(work, gpu, NOW, workspace_mb=None) if gpu else ():
            expected[stage.stage] = expected.get(stage.stage, 0.0) + stage.seconds
        measured = profile["seconds"]
        title = f"{'x'.join(map(str, profile['shape']))}, {profile['target']}"
        for stage in [*expected, *(s for s in measured if s not in expected)]:
            a, b = expected.get(stage), measured.get(stage)
            off = f"{b / a - 1:+.0%}" if a and b else ""
            lines.append([title, stage, _ms(a), _ms(b), off])
        a, b = sum(expected.values()) or None, sum(measured.values())
        lines.append([title, "all", _ms(a), _ms(b), f"{b / a - 1:+.0%}" if a else ""])
    return lines


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.2f}"


def _times(rows: Sequence[dict[str, Any]]) -> list[str]:
    names = ["workload", "provider", "forward", "backward", "speedup", "TFLOP/s", "peak", "saved",
             "value error", "gradient cosine"]  # fmt: skip
    forms = [("forward_seconds", "{:.2f} ms", 1e3), ("backward_seconds", "{:.2f} ms", 1e3),
             ("speedup_vs_eager_fp32", "{:.2f}×", 1), ("tflop_per_second", "{:.0f}", 1),
             ("peak_mib", "{:.0f} MiB", 1), ("saved_bytes", "{:.1f} MiB", 2**-20),
             ("value_error", "{:.1e}", 1), ("grad_cosine", "{:.4f}", 1)]  # fmt: skip
    lines = []
    for row in rows:
        title = f"{row['workload']} {row['shape'].replace('x', '×')} {row['target']}"
        cells = [title, row["provider"]]
        if "seconds_median" in row:
            cells += ["n/a" if row.get(k) is None else f.format(row[k] * u) for k, f, u in forms]
        else:
            cells += [row.get("error", "not measured"), *[""] * (len(forms) - 1)]
        lines.append(cells)
    return table(names, lines)


def _tiles(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        tile = " x ".join(str(row[f"block_{x}"]) for x in "hwkn") + f", {row['stages']} stages"
        times = [f"{row['ms']:.3f}", f"{row['tflops']:.0f}"] if "ms" in row else ["", row["error"]]
        lines.append([f"{row['c_in']} -> {row['c_out']}", tile, *times])
    return table(["layer", "tile", "ms", "TFLOP/s"], lines)
