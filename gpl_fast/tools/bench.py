"""`gpl-fast bench`: the loss in plain PyTorch against the fast path on this machine, in one run.

`gpl_fast.tools.measure` is the protocol; ``benchmarks/`` compares more providers and shapes by it.
"""

from __future__ import annotations

import copy
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gpl_fast
from gpl_fast import backend
from gpl_fast.net.lossnet import LossNet
from gpl_fast.tools import measure

Shape = tuple[int, int, int, int]

QUICK: tuple[Shape, ...] = ((1, 19, 128, 128), (1, 150, 128, 128))
FULL: tuple[Shape, ...] = ((1, 19, 256, 256), (1, 150, 256, 256), (1, 847, 256, 256))
TARGETS = ("labels", "dense", "topk")
HELD = 16 * 2**20  # bytes that allocators and libraries hold on to besides a step's own
BASELINE = "reference"  # plain PyTorch with autograd, float32
DTYPES = {BASELINE: torch.float32, "fast": torch.float32, "fast-bf16": torch.bfloat16}
TOP = 8  # classes listed in a pixel of a top-k target
BLOB = 16  # pixels: labels come in squares of this size
# Bytes of (N, C, H, W) maps for each class and pixel of a step in plain PyTorch, as measured.
NAIVE = {"labels": 17, "dense": 21, "topk": 17}
GIB = 2**30


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
        kind: of the target, one of `TARGETS`.
        rounds: at least; `measure.interleave`.
        memory_gib: what the batch has to fit into; None = what is free on the device.
        workspace_mb: of the losses.

    Raises:
        ValueError: a shape that the network cannot take, a top-k target of one class, or a step
            that `workspace_mb` does not hold.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    free = measure.free_bytes(device) if memory_gib is None else int(memory_gib * GIB)
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


def check_shape(net: LossNet, shape: Shape, kind: str) -> None:
    """That a step of logits (N, C, H, W) with a target of `kind` can be run.

    Raises:
        ValueError: a shape that the network cannot take, or a top-k target of one class.
    """
    n, c, h, w = shape
    net.shapes(h, w)
    if n < 1 or (kind == "topk" and c == 1):
        raise ValueError(f"got {n} x {c} x {h} x {w}, {kind}: expected N >= 1, top-k of C >= 2")


def make_loss(
    name: str, classes: int, workspace_mb: float | str = "auto"
) -> gpl_fast.GenericPerceptualLoss:
    """The loss that a provider is."""
    return gpl_fast.GenericPerceptualLoss(
        classes,
        activation="sigmoid" if classes == 1 else "softmax",
        backend="reference" if name == BASELINE else "fast",
        compute_dtype=DTYPES[name],
        workspace_mb=workspace_mb,
    )


def make_inputs(shape: Shape, kind: str, device: str) -> tuple[Tensor, Any]:
    """Logits (N, C, H, W) float32 and a target of `kind`, from an own generator."""
    n, c, h, w = shape
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(shape, generator=generator, device=device)
    if kind == "dense":
        return logits, torch.randn(shape, generator=generator, device=device)
    coarse = torch.randint(
        c + (c == 1), (n, -(-h // BLOB), -(-w // BLOB)), generator=generator, device=device
    )
    labels = coarse.repeat_interleave(BLOB, 1)[:, :h].repeat_interleave(BLOB, 2)[..., :w]
    if kind == "labels":
        return logits, labels.contiguous()
    k = min(TOP, c)
    values = torch.rand((n, k, h, w), generator=generator, device=device)
    others = torch.arange(k, device=device).view(1, k, 1, 1)
    return logits, gpl_fast.TopK(values, (labels.unsqueeze(1) + others) % c)


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
            why = _memory_of(rows[name], loss, shape, kind, device, free)
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


# ----------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Used:
    """Of one step: bytes of its inputs, of what it adds at its peak, of what autograd keeps."""

    inputs: int
    peak: int | None
    saved: int


def used_by(
    name: str, shape: Shape, kind: str, device: str, workspace_mb: float | str = "auto"
) -> Used:
    """A step's memory; on the CPU to be called in a process of its own."""
    loss = make_loss(name, shape[1], workspace_mb)
    # Libraries, threads and cached weights are up before the baseline.
    measure.step(loss, *make_inputs((1, shape[1], 32, 32), kind, device))
    logits, target = make_inputs(shape, kind, device)
    peak, saved = measure.memory(loss, logits, target, loss.net.cached_tensors)
    inputs = measure.nbytes((logits, *measure.target_tensors(target)))
    return Used(inputs, None if peak is None else int(peak * 2**20), saved)


def _memory_of(
    row: dict[str, Any],
    loss: gpl_fast.GenericPerceptualLoss,
    shape: Shape,
    kind: str,
    device: str,
    free: int | None,
) -> str | None:
    """Memory and the largest batch into `row`; why the step cannot be run, or None.

    The batch: with two batches of N/2 and N images (1 and 2 for N = 1) measured, memory grows by
    their difference for each image more. Where they do not fit: by `needed_bytes`.
    """
    n, c, h, w = shape
    small, large = (max(n // 2, 1), n) if n > 1 else (1, 2)
    needed = {m: needed_bytes(loss, (m, c, h, w), kind, device) for m in (1, n, large)}
    if free is not None and needed[n] > free:
        row["largest_batch"], row["batch_rule"] = free // needed[1], "modelled"
        return f"about {needed[n] / GIB:.3g} GiB needed, {free / GIB:.3g} GiB are there"
    measured = (small, large) if free is None or needed[large] <= free else (n,)
    try:
        workspace = loss.options.workspace_mb
        used = {
            m: _measured(row["provider"], (m, c, h, w), kind, device, workspace) for m in measured
        }
    except RuntimeError as error:  # out of memory, on a GPU
        return str(error).splitlines()[0]
    peak, row["saved_bytes"] = used[n].peak, used[n].saved
    row["peak_mib"] = None if peak is None else peak / 2**20
    if free is None or peak is None:
        return None
    if len(used) == 1:
        row["largest_batch"], row["batch_rule"] = max(free // needed[1], n), "modelled"
        return None
    all_of = {m: u.inputs + (u.peak or 0) for m, u in used.items()}
    # Logits, their gradient and the target grow, whatever the resident set's pages say.
    least = (used[n].inputs + 4 * n * c * h * w) / n
    growth = max((all_of[large] - all_of[small]) / (large - small), least)
    row["largest_batch"] = int(n + (free - all_of[n]) // growth)
    row["batch_rule"] = "measured"
    return None


def _measured(name: str, shape: Shape, kind: str, device: str, workspace_mb: float | str) -> Used:
    if device != "cpu":
        return used_by(name, shape, kind, device, workspace_mb)
    used: Used = measure.in_fresh_process(used_by, name, shape, kind, device, workspace_mb)
    return used


def needed_bytes(loss: gpl_fast.GenericPerceptualLoss, shape: Shape, kind: str, device: str) -> int:
    """What a step needs at most, inputs included: without running it."""
    n, c, h, w = shape
    if loss.options.backend == "reference":
        return naive_bytes(loss.net, shape, NAIVE[kind])
    # Of one element each: `explain` looks at shapes and at the labels' values, and would look for
    # probabilities all over a dense target.
    loss = copy.copy(loss)
    loss.options = replace(loss.options, target_activation="same")
    logits = torch.zeros((), device=device).expand(shape)
    labels = torch.zeros((), dtype=torch.long, device=device).expand(n, h, w)
    explained = loss.explain(logits, logits if kind == "dense" else labels)
    # Labels and lists are checked into a copy, a list's values divided by their sum.
    listed = {"labels": 2 * 8, "dense": 4 * c, "topk": (2 * 12 + 4) * TOP}[kind]
    transient = explained.workspace_bytes or 0
    return n * h * w * (2 * 4 * c + listed) + explained.bytes_saved + transient + HELD


def naive_bytes(net: LossNet, shape: Shape, per_class: int) -> int:
    """About what plain PyTorch in float32 needs for a step, inputs included: the maps of all
    classes, and the network's activations: four times its convolutions' outputs, as measured."""
    n, c, h, w = shape
    sizes = net.shapes(h, w)
    outputs = sum(torch.Size(sizes[x.name]).numel() for x in net.layers if x.kind == "conv")
    return n * (per_class * c * h * w + 16 * outputs) + HELD


# ----------------------------------------------------------------------------------------- report


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
