"""`gpl-fast bench --roofline`: floors and predictions of a step on a GPU, by stage.

The floor of a launch is the larger of its FLOPs and its bytes (`launches`) at a GPU's rates, the
prediction `prediction`'s (docs/gpu.md).
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from gpl_fast.tools.columns import COLUMNS
from gpl_fast.tools.gpus import CHIPS, GPUS, Rates
from gpl_fast.tools.launches import WORKSPACE_MB, count_line
from gpl_fast.tools.prediction import launches_on, predict, step_seconds
from gpl_fast.tools.recorder import Launch
from gpl_fast.tools.workload import Workload

OURS = "gpl_fast-bf16"  # the provider that is predicted


def as_data(
    gpu: str,
    work: dict[str, Workload],
    measured: Path | None = None,
    workspace_mb: float | None = WORKSPACE_MB,
) -> dict[str, Any]:
    """All workloads in JSON's types: FLOPs, bytes, floors (one for each of "rates") by stage, and
    the predictions by column; a workspace of None is "auto"."""
    rates, rows = GPUS[gpu], [] if measured is None else read_measured(measured)
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
            for half, made in _halves(gpu, w, workspace_mb).items()
            for stage, some in _by_name(made)
        ]
        predicted = {
            column.name: [asdict(stage) for stage in predict(w, gpu, column, workspace_mb)]
            for column in COLUMNS
        }
        more = {"stages": stages, "predicted": predicted, "measured": _of(w, rows)}
        workloads.append({"name": name, **asdict(w), **more})
    chip = CHIPS[gpu]
    named = {"gpu": gpu, "workspace_mb": chip.auto_mb if workspace_mb is None else workspace_mb}
    named |= {"rates": [asdict(r) for r in rates], "chip": asdict(chip)}
    return {**named, "workloads": workloads}


def report(
    gpu: str,
    work: dict[str, Workload],
    measured: Path | None = None,
    workspace_mb: float | None = WORKSPACE_MB,
) -> str:
    """All workloads in Markdown, each beside its rows in a file of measured ones."""
    lines = [f"# {gpu}: floors and predictions of a step, bfloat16, net 1,1,1,1,1\n"]
    lines += [f"- {r.tflops:g} TFLOP/s, {r.tbps:g} TB/s ({r.source})" for r in GPUS[gpu]]
    lines += [f"- Predicted by {CHIPS[gpu].source}.", ""]
    lines += [f"- {column.name}: {column.legend}" for column in COLUMNS]
    rows = [] if measured is None else read_measured(measured)
    profiles = {} if measured is None else read_profiles(measured)
    tables = [table(name, w, gpu, rows, workspace_mb, profiles) for name, w in work.items()]
    return "\n".join([*lines, "", *summary(gpu, work, rows, workspace_mb), "", *tables])


def summary(
    gpu: str,
    work: dict[str, Workload],
    rows: Sequence[dict[str, Any]] = (),
    workspace_mb: float | None = WORKSPACE_MB,
) -> list[str]:
    """Milliseconds of a step: a line a workload."""
    columns = [f"{column.name}, ms" for column in COLUMNS]
    columns = ["workload", "target", "floor, ms", *columns, *["measured, ms"] * bool(rows)]
    lines = [_cells(columns), "|---|---|" + "--:|" * (len(columns) - 2)]
    for name, w in work.items():
        made = [v for half in _halves(gpu, w, workspace_mb).values() for v in half]
        seconds = [sum(map(GPUS[gpu][0].seconds, made))]
        seconds += [step_seconds(predict(w, gpu, k, workspace_mb)) for k in COLUMNS]
        cells = [f"{1e3 * s:.1f}" for s in seconds]
        if rows:
            ours = [r["seconds_median"] for r in _of(w, rows) if r["provider"] == OURS]
            cells.append(f"{1e3 * min(ours):.1f}" if ours else "")
        lines.append(_cells([f"{name.partition(',')[0]} {_times(w)}", w.kind, *cells]))
    return lines


def table(
    name: str,
    work: Workload,
    gpu: str,
    rows: Sequence[dict[str, Any]] = (),
    workspace_mb: float | None = WORKSPACE_MB,
    profiles: dict[Any, dict[str, float]] | None = None,
) -> str:
    """One workload: a line a stage, all of them, and what was measured."""
    rates, measured = GPUS[gpu], (profiles or {}).get((work.shape, work.kind), {})
    floors = [f"floor at {r.tflops:g} TFLOP/s, {r.tbps:g} TB/s, ms" for r in rates]
    columns = ["stage", "launches", "GFLOP", "GB", "FLOP / byte", *floors, "limit"]
    columns += [*(f"{k.name}, ms" for k in COLUMNS), *["measured, ms"] * bool(measured)]
    lines = [
        f"### {name}: {_times(work)}, {work.kind}, {work.activation}\n",
        _cells(columns),
        "|---|" + "--:|" * (4 + len(rates)) + "---|" + "--:|" * (len(columns) - 6 - len(rates)),
    ]
    halves = _halves(gpu, work, workspace_mb)
    predicted = [predict(work, gpu, k, workspace_mb) for k in COLUMNS]
    names = Counter(name for made in halves.values() for name in {launch.name for launch in made})
    for half, made in halves.items():
        for stage, some in _by_name(made):
            times = [sum(s.seconds for s in p if (s.half, s.stage) == (half, stage))
                     for p in predicted]  # fmt: skip
            times += [measured[stage]] if stage in measured and names[stage] == 1 else []
            lines.append(_line(f"{half}: {stage}", some, rates, times, limit=True))
    # A profile has no halves.
    blank = [""] * (len(columns) - 2)
    lines += [
        _cells([f"measured: {stage}", *blank, f"{1e3 * took:.2f}"])
        for stage, took in measured.items()
        if names[stage] != 1
    ]
    everything = [launch for made in halves.values() for launch in made]
    times = [*map(step_seconds, predicted), *[sum(measured.values())] * bool(measured)]
    lines.append(_line("all", everything, rates, times) + "\n")
    host = [
        f"{k.name} {1e3 * sum(s.host for s in p):.1f}"
        for k, p in zip(COLUMNS, predicted, strict=True)
    ]
    lines.append(count_line(work, len(everything)) + "\n")
    lines.append(f"Of the host for them, ms: {', '.join(host)}.\n")
    found = _of(work, rows)
    seconds = {f"{half}_seconds": sum(map(rates[0].seconds, made)) for half, made in halves.items()}
    seconds["seconds_median"] = sum(seconds.values())
    if found:
        lines += ["| measured | forward, ms | backward, ms | both, ms |", "|---|--:|--:|--:|"]
        lines += [_measured_line(row, seconds) for row in found]
        lines += ["", f"In brackets the floor's share of it, at {rates[0].tflops:g} TFLOP/s.", ""]
    return "\n".join(lines)


def _times(work: Workload) -> str:
    return " x ".join(map(str, work.shape))


def _cells(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _halves(gpu: str, work: Workload, workspace_mb: float | None) -> dict[str, list[Launch]]:
    made = launches_on(CHIPS[gpu], work, workspace_mb)
    return dict(zip(("forward", "backward"), made, strict=True))


def _of(work: Workload, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["shape"] == work.shape and row["target"] == work.kind]


def _by_name(made: Sequence[Launch]) -> Iterator[tuple[str, list[Launch]]]:
    order = list(dict.fromkeys(launch.name for launch in made))
    for name, some in groupby(sorted(made, key=lambda x: order.index(x.name)), lambda x: x.name):
        yield name, list(some)


def _line(
    name: str, some: Sequence[Launch], rates: Sequence[Rates], times: Sequence[float],
    limit: bool = False,
) -> str:  # fmt: skip
    flops, moved = sum(v.flops for v in some), sum(v.bytes for v in some)
    bound = "arithmetic" if flops / rates[0].tflops > moved / rates[0].tbps else "memory"
    floors = [f"{1e3 * sum(map(r.seconds, some)):.2f}" for r in rates]
    return _cells([
        name, f"{len(some)}" if limit else "", f"{flops / 1e9:,.0f}", f"{moved / 1e9:.2f}",
        f"{flops / moved:.0f}", *floors, bound if limit else "", *(f"{1e3 * s:.2f}" for s in times),
    ])  # fmt: skip


def _measured_line(row: dict[str, Any], floors: dict[str, float]) -> str:
    cells = [f"{row['provider']}, {row['machine']}"]
    for part in ("forward_seconds", "backward_seconds", "seconds_median"):
        value = row.get(part)
        share = "" if value is None else f"{1e3 * value:.2f} ({floors[part] / value:.0%})"
        cells.append(share)
    return _cells(cells)


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


def read_profiles(path: Path) -> dict[Any, dict[str, float]]:
    """Of a GPU report: (shape, kind of target) -> stage -> seconds of its kernels in a step."""
    if path.suffix != ".json":
        return {}
    found = json.loads(path.read_text(encoding="utf-8")).get("profiles", [])
    return {(tuple(p["shape"]), p["target"]): p["seconds"] for p in found if "seconds" in p}


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
