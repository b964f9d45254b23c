"""What the demo's report says and shows."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gpl_fast.demo.experiment import ARMS, BASELINE, WITH_GPL, Result, summary
from gpl_fast.demo.live import MEAN, table_rows
from gpl_fast.demo.scenes import BACKGROUND, TRAIN_DIGITS
from gpl_fast.experiments.frame import Table
from gpl_fast.experiments.report import environment, html_table, write

_COLORS = {BASELINE: "#5b6770", WITH_GPL: "#c2410c"}


def protocol(result: Result) -> list[str]:
    """How the figures came about, one statement each."""
    s, last = result.settings, 1796
    return [
        f"Scenes: {s.size} x {s.size} pixels, 11 classes (ten digits and the background). "
        f"{s.train_scenes} training scenes from scans 0 to {TRAIN_DIGITS - 1} and the left halves "
        f"of two photographs, {s.test_scenes} test scenes from scans {TRAIN_DIGITS} to {last} and "
        "the right halves. The scans are in order of their writers.",
        f"Teacher: U-Net of width {s.teacher_width}, cross-entropy, {s.teacher_steps} steps, on "
        "the training scenes alone; its logits for them are stored once, in half precision.",
        f"Students: U-Nets of width {s.student_width}, {s.steps} steps of {s.batch} scenes, AdamW, "
        f"one-cycle learning rate up to {s.lr:g}. For each seed two, alike in initialisation, "
        "order of scenes and schedule; only the loss differs: cross-entropy, or cross-entropy + "
        f"{s.gpl_weight:g} x Generic Perceptual Loss (net {s.net}, target: the teacher).",
        "mIoU: mean over classes of intersection over union, from one confusion matrix over all "
        "test pixels, at the last step; no step is selected. The curves use the same scenes.",
        "The default settings were chosen on seeds 100 to 102 (same scenes), none on 0 to 2.",
        "Seconds: medians over steps; 'in the loss' is forward and backward of the loss to the "
        "logits, without the networks. 'saved' is what autograd keeps for the backward of one loss "
        "call, without logits, labels, teacher logits and the frozen network's weights; "
        f"{s.batch} x {s.size} x {s.size} pixels.",
    ]


def as_dict(result: Result) -> dict[str, Any]:
    """All figures, in JSON's types."""
    seeds = result.settings.seeds
    students = {
        arm: [{"seed": seed, **asdict(t)} for seed, t in zip(seeds, traces, strict=True)]
        for arm, traces in result.students.items()
    }
    return {
        "settings": asdict(result.settings),
        "environment": environment(),
        "backend": {"name": result.backend, "reason": result.backend_reason},
        "fingerprint": result.fingerprint,
        "protocol": protocol(result),
        "verdict": result.verdict(),
        "miou_differences": result.differences(),
        "summary": {arm: summary(result, arm) for arm in ARMS},
        "teacher": asdict(result.teacher),
        "students": students,
        "seconds": result.seconds,
    }


def figure(result: Result) -> Figure:
    """Curves above, pictures below: a column a scene."""
    count = len(result.images)
    fig = Figure(figsize=(11, 11), layout="constrained")
    parts: Any = fig.subfigures(2, 1, height_ratios=(0.8, 1.6))
    top, bottom = parts
    left, right = top.subplots(1, 2)
    _curves(left, result)
    _losses(right, result)
    axes = bottom.subplots(4, count, squeeze=False)
    rows = [
        ("input", result.images.permute(0, 2, 3, 1).numpy()),
        ("truth", _paint(result.truth)),
        *((arm, _paint(result.predictions[arm])) for arm in ARMS),
    ]
    for line, (name, pictures) in zip(axes, rows, strict=True):
        line[0].set_ylabel(name, fontsize=11)
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    colors = _paint(torch.arange(11)[None])[0] / 255.0
    for digit in range(10):
        bottom.text(0.08 + 0.07 * digit, -0.005, str(digit), color="white", fontsize=10,
                    va="top", bbox={"facecolor": colors[digit], "pad": 3, "lw": 0})  # fmt: skip
    return fig


def _curves(axis: Axes, result: Result) -> None:
    for arm in ARMS:
        curves = np.array([t.curve for t in result.students[arm]])  # (seeds, points, 2)
        for curve in curves:
            axis.plot(curve[:, 0], curve[:, 1], color=_COLORS[arm], alpha=0.3, lw=1)
        mean = curves.mean(0)
        axis.plot(mean[:, 0], mean[:, 1], color=_COLORS[arm], lw=2, marker="o", ms=3, label=arm)
    axis.axhline(result.teacher.miou, color="#1d4ed8", ls=":", lw=1, label="teacher, at its end")
    axis.set(xlabel="step", ylabel="mIoU, unseen digits", title="Students (thin: each seed)")
    axis.set_ylim(0.0, 1.0)
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", fontsize=9)


def _losses(axis: Axes, result: Result) -> None:
    for arm in ARMS:
        losses = np.array([t.losses for t in result.students[arm]]).mean(0)  # (steps,)
        window = max(1, len(losses) // 50)
        smooth = np.convolve(losses, np.full(window, 1.0 / window), mode="valid")
        axis.plot(np.arange(window, len(losses) + 1), smooth, color=_COLORS[arm], lw=1.5, label=arm)
    axis.set(xlabel="step", ylabel="training loss", yscale="log", title="Each arm's own loss")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)


def _paint(labels: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Classes (..., H, W) as colours (..., H, W, 3); the background is nearly black."""
    palette = (np.array(colormaps["tab10"].colors) * 255).astype(np.uint8)  # type: ignore[attr-defined]
    palette = np.concatenate([palette, np.full((BACKGROUND + 1 - 10, 3), 24, np.uint8)])
    painted: np.ndarray[Any, np.dtype[np.uint8]] = palette[labels.numpy()]
    return painted


def write_report(result: Result, out: Path) -> list[Path]:
    """report.json, report.png and report.html in ``out``, which is made if it is not there."""
    header, *rows = table_rows(result)
    return write(
        out,
        as_dict(result),
        figure(result),
        title="gpl-fast demo",
        heading="Digits on photographs, with and without the Generic Perceptual Loss",
        verdict=result.verdict(),
        tables=[html_table(Table("", header, rows), emphasised=MEAN)],
        protocol=protocol(result),
        closing=f"Backend: {result.backend} ({result.backend_reason}); network "
        f"{result.fingerprint[:16]}. {result.seconds:.0f} s in all.",
    )
