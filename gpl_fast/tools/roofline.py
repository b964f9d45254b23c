"""`gpl-fast bench --roofline`: the floors of a step on a GPU, by stage.

The floor of a launch is the larger of its FLOPs and its bytes (`launches`) at a GPU's rates
(docs/gpu.md).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from gpl_fast.tools.launches import WORKSPACE_MB, Launch, Workload, count_line, launches


@dataclass(frozen=True)
class Rates:
    """Dense bfloat16 TFLOP/s with float32 accumulation, TB/s of memory, and who says so."""

    tflops: float
    tbps: float
    source: str

    def seconds(self, launch: Launch) -> float:
        """The floor of a launch."""
        return max(launch.flops / self.tflops, launch.bytes / self.tbps) / 1e12


# A GPU's peak first, then what has been measured on it.
GPUS: dict[str, tuple[Rates, ...]] = {
    "h200": (
        Rates(989, 4.8, "NVIDIA H200 data sheet, SXM"),
        Rates(790, 4.3, "measured: PyTorch's matmul and copy"),
    ),
    "h100": (Rates(989, 3.35, "NVIDIA H100 data sheet, SXM"),),
    "a100": (Rates(312, 2.039, "NVIDIA A100 80GB data sheet, SXM"),),
    "rtx4090": (Rates(165.2, 1.008, "NVIDIA Ada GPU architecture, appendix A"),),
}


def as_data(
    gpu: str,
    work: dict[str, Workload],
    measured: Path | None = None,
    workspace_mb: float = WORKSPACE_MB,
) -> dict[str, Any]:
    """All workloads in JSON's types: FLOPs, bytes and floors (one for each of "rates") by stage."""
    rates = GPUS[gpu]
    rows = [] if measured is None else read_measured(measured)
    workloads = []
    for name, w in work.items():
        stages = [
            {
                "half": half,
                "stage": stage,
                "launches": len(some),
                "flops": sum(v.flops for v in some),
                "bytes": sum(v.bytes for v in some),
                "floor_seconds": [sum(map(r.seconds, some)) for r in rates],
            }
            for half, made in zip(("forward", "backward"), launches(w, workspace_mb), strict=True)
            for stage, some in _by_name(made)
        ]
        workloads.append({"name": name, **asdict(w), "stages": stages, "measured": _of(w, rows)})
    named = {"gpu": gpu, "workspace_mb": workspace_mb, "rates": [asdict(r) for r in rates]}
    return {**named, "workloads": workloads}


def report(
    gpu: str,
    work: dict[str, Workload],
    measured: Path | None = None,
    workspace_mb: float = WORKSPACE_MB,
) -> str:
    """All workloads in Markdown, each beside its rows in a file of measured ones."""
    rates = GPUS[gpu]
    lines = [f"# {gpu}: floors of a step, bfloat16, net 1,1,1,1,1\n"]
    lines += [f"- {r.tflops:g} TFLOP/s, {r.tbps:g} TB/s ({r.source})" for r in rates]
    rows = [] if measured is None else read_measured(measured)
    tables = [table(name, w, rates, rows, workspace_mb) for name, w in work.items()]
    return "\n".join([*lines, "", *tables])


def table(
    name: str,
    work: Workload,
    rates: Sequence[Rates],
    rows: Sequence[dict[str, Any]] = (),
    workspace_mb: float = WORKSPACE_MB,
) -> str:
    """One workload: a line a stage, all of them, and what was measured."""
    title = " x ".join(map(str, work.shape)) + f", {work.kind}, {work.activation}"
    floors = [f"floor at {r.tflops:g} TFLOP/s, {r.tbps:g} TB/s, ms" for r in rates]
    columns = ["stage", "launches", "GFLOP", "GB", "FLOP / byte", *floors, "limit"]
    lines = [
        f"### {name}: {title}\n",
        "| " + " | ".join(columns) + " |",
        "|---|" + "--:|" * (len(columns) - 2) + "---|",
    ]
    halves = dict(zip(("forward", "backward"), launches(work, workspace_mb), strict=True))
    for half, made in halves.items():
        for stage, some in _by_name(made):
            lines.append(_line(f"{half}: {stage}", some, rates, limit=True))
    everything = [launch for made in halves.values() for launch in made]
    lines.append(_line("all", everything, rates) + "\n")
    lines.append(count_line(work, workspace_mb) + "\n")
    found = _of(work, rows)
    seconds = {f"{half}_seconds": sum(map(rates[0].seconds, made)) for half, made in halves.items()}
    seconds["seconds_median"] = sum(seconds.values())
    if found:
        lines += ["| measured | forward, ms | backward, ms | both, ms |", "|---|--:|--:|--:|"]
        lines += [_measured_line(row, seconds) for row in found]
        lines += ["", f"In brackets the floor's share of it, at {rates[0].tflops:g} TFLOP/s.", ""]
    return "\n".join(lines)


def _of(work: Workload, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["shape"] == work.shape and row["target"] == work.kind]


def _by_name(made: Sequence[Launch]) -> Iterator[tuple[str, list[Launch]]]:
    order = list(dict.fromkeys(launch.name for launch in made))
    for name, some in groupby(sorted(made, key=lambda x: order.index(x.name)), lambda x: x.name):
        yield name, list(some)


def _line(name: str, some: Sequence[Launch], rates: Sequence[Rates], limit: bool = False) -> str:
    flops, moved = sum(v.flops for v in some), sum(v.bytes for v in some)
    floors = [f"{1e3 * sum(map(r.seconds, some)):.2f}" for r in rates]
    bound = "arithmetic" if flops / rates[0].tflops > moved / rates[0].tbps else "memory"
    cells = [
        name, f"{len(some)}" if limit else "", f"{flops / 1e9:,.0f}", f"{moved / 1e9:.2f}",
        f"{flops / moved:.0f}", *floors, bound if limit else "",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _measured_line(row: dict[str, Any], floors: dict[str, float]) -> str:
    cells = [f"{row['provider']}, {row['machine']}"]
    for part in ("forward_seconds", "backward_seconds", "seconds_median"):
        value = row.get(part)
        share = "" if value is None else f"{1e3 * value:.2f} ({floors[part] / value:.0%})"
        cells.append(share)
    return "| " + " | ".join(cells) + " |"


def read_measured(path: Path) -> list[dict[str, Any]]:
    """Rows with times of a benchmark's CSV, or of the JSON of a GPU report or `gpl-fast bench`.

    Raises:
        ValueError: it is neither, or cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            found = json.loads(text)
            machine = found.get("machine", "")
            rows = found.get("benchmark", found)["rows"]
            rows = [{"machine": machine, **row} for row in rows]
        else:
            rows = csv_rows(text)
        return [_numbers(row) for row in rows if row.get("seconds_median")]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError, csv.Error) as error:
        raise ValueError(
            f"{path}: got no rows of a benchmark ({error!r}), expected a CSV of "
            "benchmarks/run.py, or a report.json of make gpu-report or gpl-fast bench --json"
        ) from error


def csv_rows(text: str) -> list[dict[str, Any]]:
    """Rows of a CSV, each with what the lines "# key: value" above the columns say of all."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    shared = dict(line.removeprefix("# ").split(": ", 1) for line in lines[:begin])
    return [{**shared, **row} for row in csv.DictReader(lines[begin:])]


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    shape = row["shape"].split("x") if isinstance(row["shape"], str) else row["shape"]
    seconds = {k: float(row[k]) for k in row if "seconds" in k and row[k] not in (None, "")}
    about = {k: row[k] for k in ("machine", "provider", "target")}
    return {**about, "shape": tuple(map(int, shape)), **seconds}
