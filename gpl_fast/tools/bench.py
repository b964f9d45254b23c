"""`gpl-fast bench`: the loss in plain PyTorch against the fast path on this machine, in one run.

`gpl_fast.tools.measure` is the protocol; ``benchmarks/`` compares more providers and shapes by it.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import gpl_fast
from gpl_fast import backend
from gpl_fast.net.lossnet import LossNet
from gpl_fast.tools import measure, resident
from gpl_fast.tools.batch import GIB, memory_of
from gpl_fast.tools.workload import (
    BASELINE,
    DTYPES,
    Shape,
    check_shape,
    make_inputs,
    make_loss,
)

QUICK: tuple[Shape, ...] = ((1, 19, 128, 128), (1, 150, 128, 128))
FULL: tuple[Shape, ...] = ((1, 19, 256, 256), (1, 150, 256, 256), (1, 847, 256, 256))


def run(
    shapes: Sequence[Shape],
    kind: str = "labels",
    rounds: int = 5,
    memory_gib: float | None = None,
    workspace_mb: float | str = "auto",
) -> dict[str, Any]:
    """Forward and backward of every provider and shape: seconds, memory, the batch that fits.

    On the first CUDA device, where there is one, else on the CPU.

    Args:
        shapes: (N, C, H, W) of the logits.
        kind: of the target, one of `workload.TARGETS`.
        rounds: at least; `measure.interleave`.
        memory_gib: what the batch has to fit into; None = what is free on the device.
        workspace_mb: of the losses.

    Raises:
        ValueError: a shape that the network cannot take, a top-k target of one class, or a step
            that `workspace_mb` does not hold.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    free = resident.free_bytes(device) if memory_gib is None else int(memory_gib * GIB)
    named = {"cuda": "free on the GPU", "cpu": "MemAvailable"}[device]
    for shape in shapes:
        check_shape(LossNet.vgg(shape[1]), shape, kind)
    return {
        "machine": torch.cuda.get_device_name()
        if device == "cuda"
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gpl_fast": gpl_fast.__version__,
        "device": device,
        "memory_gib": None if free is None else free / GIB,
        "memory_is": named if memory_gib is None else "--memory-gib",
        "workspace_mb": workspace_mb,
        "rows": [
            row
            for shape in shapes
            for row in rows_of(shape, kind, device, free, rounds, workspace_mb)
        ],
    }


def rows_of(
    shape: Shape,
    kind: str,
    device: str,
    free: int | None,
    rounds: int,
    workspace_mb: float | str = "auto",
) -> list[dict[str, Any]]:
    """The rows of a shape: "note" says why one has no times."""
    rows: dict[str, dict[str, Any]] = {}
    losses: dict[str, gpl_fast.GenericPerceptualLoss] = {}
    for name, dtype in DTYPES.items():
        loss = make_loss(name, shape[1], workspace_mb)
        rows[name] = {"provider": name, "shape": list(shape), "target": kind}
        rows[name] |= {"dtype": str(dtype).removeprefix("torch."), "note": None}
        rows[name] |= dict.fromkeys(("seconds_median", "seconds_p20", "seconds_p80", "speedup"))
        rows[name] |= dict.fromkeys(("peak_mib", "saved_bytes", "largest_batch", "batch_rule"))
        why = None
        if name != BASELINE:
            why = backend.fast_obstacle(torch.device(device), dtype, loss.net)
        if why is None:
            why = memory_of(rows[name], loss, shape, kind, device, free)
        if why is None:
            losses[name] = loss
        else:
            rows[name]["note"] = why
    if losses:
        logits, target = make_inputs(shape, kind, device)
        watch = measure.Stopwatch(device)
        steps = {
            n: partial(measure.timed_step, watch, x, logits, target) for n, x in losses.items()
        }
        times = measure.interleave(steps, rounds, seconds=2.0)
        for name, found in measure.summary(times, BASELINE).items():
            rows[name] |= found
    return list(rows.values())


def table(report: dict[str, Any]) -> str:
    """The rows as text."""
    lines = [
        f"{report['machine']}, {report['device']}, {report['threads']} threads, torch "
        f"{report['torch']}",
        f"{'provider':<10} {'shape':<16} {'target':<7} {'median':>10} {'p20':>10} {'p80':>10} "
        f"{'speedup':>8} {'peak':>11} {'saved':>11} {'batch':>9}",
    ]
    naive: dict[str, int | None] = {}
    for row in report["rows"]:
        shape = "x".join(map(str, row["shape"]))
        if row["provider"] == BASELINE:
            naive[shape] = row["largest_batch"]
        cells = [
            *(_cell(row[k], "{:.1f}ms", 1e3) for k in ("seconds_median", "seconds_p20",
                                                       "seconds_p80")),
            _cell(row["speedup"], "{:.2f}x"),
            _cell(row["peak_mib"], "{:.1f}MiB"),
            _cell(row["saved_bytes"], "{:.1f}MiB", 2**-20),
            "~" * (row["batch_rule"] == "modelled") + _cell(row["largest_batch"], "{}"),
            _larger(row["largest_batch"], naive.get(shape)),
        ]  # fmt: skip
        widths = (10, 10, 10, 8, 11, 11, 9, 7)
        text = " ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        lines.append(f"{row['provider']:<10} {shape:<16} {row['target']:<7} {text}")
        if row["note"]:
            lines.append(f"{'':<10} not run: {row['note']}")
    lines.append(
        f"{BASELINE}: plain PyTorch with autograd, float32; speedup: its shortest step over "
        "theirs. peak: what a step adds to its inputs; saved: kept for the backward."
    )
    if report["memory_gib"] is not None:
        lines.append(
            f"batch: the largest that fits into {report['memory_gib']:.3g} GiB "
            f"({report['memory_is']}), inputs and step, and its ratio to {BASELINE}'s; by the "
            "growth from N/2 to N images (1 to 2 for N = 1); ~: by a model of the bytes, where "
            "that could not be measured."
        )
    return "\n".join(lines)


def _larger(batch: int | None, naive: int | None) -> str:
    return "" if batch is None or not naive else f"{batch / naive:.1f}x"


def _cell(value: float | None, form: str, scale: float = 1) -> str:
    return "n/a" if value is None else form.format(value * scale)


def write(report: dict[str, Any], path: Path) -> None:
    """Write the report as JSON."""
    with open(path, "w") as f:
        json.dump(report, f, indent=2)
        f.write("\n")
