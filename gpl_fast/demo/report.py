"""The report: report.json for programs, report.png for a look, report.html with both."""

from __future__ import annotations

import base64
import html
import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import sklearn
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import gpl_fast
from gpl_fast.demo.experiment import ARMS, BASELINE, WITH_GPL, Result, summary
from gpl_fast.demo.live import MEAN, table_rows
from gpl_fast.demo.scenes import BACKGROUND, TRAIN_DIGITS

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


def environment() -> dict[str, str | int]:
    """Versions and machine."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "gpl_fast": gpl_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "scikit-learn": sklearn.__version__,
        "numpy": np.__version__,
        "matplotlib": matplotlib.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


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


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1c1917; background: #fff }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #d6d3d1; text-align: right }
th:first-child, td:first-child { text-align: left }
tr.mean { font-weight: 600 } img { max-width: 100% } .verdict { font-size: 1.1rem }
"""


def page(result: Result, png: bytes) -> str:
    """One self-contained page."""
    header, *rows = table_rows(result)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "\n".join(
        f'<tr class="{"mean" if row[1] == MEAN else "one"}">'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row in rows
    )
    points = "\n".join(f"<li>{html.escape(line)}</li>" for line in protocol(result))
    machine = ", ".join(f"{name} {value}" for name, value in environment().items())
    picture = base64.b64encode(png).decode("ascii")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>gpl-fast demo</title>
<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>
<h1>Digits on photographs, with and without the Generic Perceptual Loss</h1>
<p class="verdict">{html.escape(result.verdict())}</p>
<table><thead><tr>{head}</tr></thead><tbody>
{body}
</tbody></table>
<p><img alt="curves and predictions" src="data:image/png;base64,{picture}"></p>
<h2>Protocol</h2><ul>
{points}
</ul>
<p>Backend: {html.escape(result.backend)} ({html.escape(result.backend_reason)});
network {html.escape(result.fingerprint[:16])}. {result.seconds:.0f} s in all.
{html.escape(machine)}.</p>
</body></html>
"""


def write_report(result: Result, out: Path) -> list[Path]:
    """report.json, report.png and report.html in ``out``, which is made if it is not there."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"report.{kind}" for kind in ("json", "png", "html")]
    paths[0].write_text(json.dumps(as_dict(result), indent=1) + "\n", encoding="utf-8")
    figure(result).savefig(paths[1], dpi=110, bbox_inches="tight")
    paths[2].write_text(page(result, paths[1].read_bytes()), encoding="utf-8")
    return paths
