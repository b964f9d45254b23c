"""What measured rows say: growth against theory, what many classes should cost, where it is not
faster, and by how much two runs differ. Rows are `report.FIELDS`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

Row = dict[str, Any]
CASE = ("sweep", "shape", "target", "peaked", "net")  # what rows that are compared share
BASELINE, OURS = "eager-fp32", "gpl_fast"
REPRODUCED = 0.15  # a second run's ratios may differ by this much


def classes_of(row: Row) -> int:
    """C of its logits (N, C, H, W)."""
    return sizes_of(row)[1]


def sizes_of(row: Row) -> tuple[int, int, int, int]:
    """(N, C, H, W) of its logits."""
    n, c, h, w = map(int, row["shape"].split("x"))
    return n, c, h, w


def elements(row: Row) -> int:
    """Of its logits."""
    return math.prod(sizes_of(row))


def by_case(rows: Sequence[Row]) -> Iterator[tuple[tuple[Any, ...], list[Row]]]:
    """Neighbouring rows of one case."""
    for case, some in groupby(rows, lambda row: tuple(row[k] for k in CASE)):
        yield case, list(some)


def slower(rows: Sequence[Row], least: float = 1.1) -> list[str]:
    """A line for each case and dtype in which ours is not `least` times as fast as the best other
    provider of that dtype."""
    lines = []
    for (sweep, shape, target, peaked, net), some in by_case(rows):
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
                about = f"{shape}, {target}, {'peaked' if peaked else 'flat'}, {net} ({sweep})"
                lines.append(
                    f"- {about}: {mine['provider']} {1e3 * mine['seconds_median']:.0f} ms, "
                    f"{best['provider']} {1e3 * best['seconds_median']:.0f} ms: {ratio:.2f}×"
                )
    return lines


# What a sweep varies, and the sizes (N, C, H, W) -> that quantity.
VARIED = {
    "classes": ("C", lambda n, c, h, w: c),
    "crop": ("pixels", lambda n, c, h, w: h * w),
    "batch": ("N", lambda n, c, h, w: n),
}
# The issue of large class counts: at least this fast against eager float32.
LARGE = {("dense", "gpl_fast-bf16"): 3.0, ("labels", "gpl_fast-bf16"): 4.5,
         ("labels", "gpl_fast-fp32"): 2.0}  # fmt: skip
SLOPE = 1.05  # of time against C on log-log axes, beyond what does not depend on C
BEYOND_GRADIENT = 0.3e9  # bytes of peak memory besides inputs and gradient


def growth(rows: Sequence[Row]) -> list[str]:
    """By how much time and memory grow from a sweep's first size to its last, against theory:
    FLOPs of the network and bytes of the logits."""
    lines = []
    for sweep, (what, size_of) in VARIED.items():
        mine = [row for row in rows if row["sweep"] == sweep and classes_of(row) > 1]
        for name in dict.fromkeys(row["provider"] for row in mine):
            some = sorted((r for r in mine if r["provider"] == name), key=lambda r: elements(r))
            first, last = some[0], some[-1]
            a, b = (size_of(*sizes_of(r)) for r in (first, last))
            if a == b:
                continue
            factors = {k: _factor(first, last, k) for k in ("seconds_median", "peak_mib",
                                                            "saved_bytes", "gflop")}  # fmt: skip
            logits = f"{elements(last) / elements(first):.1f}"
            lines.append(
                f"growth, {sweep}, {name}: {what} {a} to {b}: time x{factors['seconds_median']}, "
                f"peak x{factors['peak_mib']}, saved x{factors['saved_bytes']}; in theory FLOPs "
                f"x{factors['gflop']}, logits x{logits}"
            )
    return lines


def _factor(first: Row, last: Row, field: str) -> str:
    return f"{last[field] / first[field]:.1f}" if first[field] and last[field] else " n/a"


def slope(points: Mapping[float, float]) -> float:
    """Of y against x on log-log axes, by least squares."""
    x, y = ([math.log(v) for v in values] for values in (points.keys(), points.values()))
    return statistics.linear_regression(x, y).slope


def beyond_fixed(rows: Mapping[int, Row], least: int = 19) -> dict[int, float]:
    """Seconds by C, less those of the blocks after the first, which do not depend on C. From
    `least` classes on; where these were not measured, they are what the fewest classes take."""
    fewest = rows[min(rows)]
    if fewest["later_seconds"] is None:
        fixed = {c: fewest["seconds_median"] for c in rows if c > min(rows)}
    else:
        fixed = {c: row["later_seconds"] for c, row in rows.items()}
    return {c: rows[c]["seconds_median"] - seconds for c, seconds in fixed.items() if c >= least}


def checks(rows: Sequence[Row]) -> list[str]:
    """What large class counts should cost, and whether they do, of the rows that are there."""
    lines = []
    large = [r for r in rows if sizes_of(r)[1:] == (1203, 512, 512) and r["peaked"]]
    for row in large:
        least = LARGE.get((row["target"], row["provider"]))
        ratio = row["speedup_vs_eager_fp32"]
        if least is not None and ratio is not None:
            name = f"{row['shape']} {row['target']}, {row['provider']}"
            found = f"{ratio:.2f} times as fast as {BASELINE}"
            lines.append(_verdict(name, found, f"at least {least:g}", ratio >= least))
        if row["provider"].startswith(OURS) and row["peak_mib"] is not None:
            beyond = row["peak_mib"] * 2**20 - 4 * elements(row)
            name = f"{row['shape']} {row['target']}, {row['provider']}"
            found = f"peak beyond inputs and gradient {beyond / 1e9:.3f} GB"
            limit = f"at most {BEYOND_GRADIENT / 1e9:g} GB"
            lines.append(_verdict(name, found, limit, beyond <= BEYOND_GRADIENT))
    swept = [r for r in rows if r["sweep"] == "classes" and r["target"] == "labels" and r["peaked"]]
    for provider in dict.fromkeys(r["provider"] for r in swept):
        mine = {classes_of(r): r for r in swept if r["provider"] == provider}
        if not provider.startswith(OURS) or len(mine) < 3:
            continue
        points = beyond_fixed(mine)
        if len(points) < 2:
            continue
        name = f"{min(points)} to {max(points)} classes, labels, {provider}"
        if min(points.values()) <= 0:
            lines.append(f"check, {name}: a step took no longer than its later blocks: not told")
            continue
        own = slope(points)
        read = slope({c: mine[c]["read_seconds"] for c in points})
        found = f"time beyond the fixed layers ~ C^{own:.2f} (reading the logits C^{read:.2f})"
        lines.append(_verdict(name, found, f"at most C^{SLOPE}", own <= SLOPE))
    return lines


def _verdict(name: str, found: str, wanted: str, met: bool) -> str:
    return f"check, {name}: {found}, {wanted}: {'met' if met else 'NOT MET'}"


def compare(rows: Sequence[Row], others: Sequence[Row]) -> list[tuple[float, Row, Row]]:
    """Rows of one case and provider in both, with the relative change of their ratio to the
    baseline, the largest first."""
    key = (*CASE, "provider")
    found = {tuple(row[k] for k in key): row for row in others}
    pairs = []
    for row in rows:
        other = found.get(tuple(row[k] for k in key))
        if other is None or row["provider"] == BASELINE:
            continue
        a, b = row["speedup_vs_eager_fp32"], other["speedup_vs_eager_fp32"]
        if a and b:
            pairs.append((max(a / b, b / a) - 1, row, other))
    return sorted(pairs, key=lambda pair: -pair[0])


def comparison(rows: Sequence[Row], others: Sequence[Row], shown: int = 10) -> tuple[str, bool]:
    """`compare` as text, and whether every ratio is reproduced within `REPRODUCED`."""
    pairs = compare(rows, others)
    if not pairs:
        return "no row is in both", False
    lines = []
    for change, row, other in pairs[:shown]:
        ratios = f"{row['speedup_vs_eager_fp32']:.2f}x, {other['speedup_vs_eager_fp32']:.2f}x"
        about = f"{row['sweep']} {row['shape']} {row['target']} {row['net']} {row['provider']}"
        lines.append(f"{change:6.1%}  {about}: {ratios}")
    met = pairs[0][0] <= REPRODUCED
    lines.append(
        f"{len(pairs)} ratios; the largest change is {pairs[0][0]:.1%}, at most {REPRODUCED:.0%}: "
        f"{'met' if met else 'NOT MET'}"
    )
    return "\n".join(lines), met
