"""`gpl-fast bench`: time and peak memory of the loss on this machine, interleaved in one run."""

from __future__ import annotations

import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gpl_fast

# (classes, height, width) of one image.
QUICK = ((19, 128, 128), (150, 128, 128))
FULL = ((19, 256, 256), (150, 256, 256), (847, 256, 256))


def workloads(quick: bool) -> tuple[tuple[int, int, int], ...]:
    """The shapes that are timed."""
    return QUICK if quick else FULL


def providers(classes: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """What is timed, by name: called with logits and labels, gives the value."""
    losses = {"reference": gpl_fast.GenericPerceptualLoss(classes, backend="reference")}
    return dict(losses)


def run(quick: bool) -> dict[str, Any]:
    """Forward and backward of every provider and workload: seconds, peak MiB, ratios.

    Times are medians with 20th and 80th percentiles of interleaved runs. Peak memory is the
    resident-set high-water mark of a fresh process over its inputs.
    """
    rows = []
    for classes, height, width in workloads(quick):
        logits, labels = make_inputs(classes, height, width)
        losses = providers(classes)
        seconds: dict[str, list[float]] = {name: [] for name in losses}
        for repeat in range(6 if quick else 12):
            for name, loss in losses.items():
                start = time.perf_counter()
                step(loss, logits, labels)
                if repeat:  # the first run warms caches up
                    seconds[name].append(time.perf_counter() - start)
        for name, samples in seconds.items():
            low, _, _, high = statistics.quantiles(samples, n=5)
            rows.append(
                {
                    "provider": name,
                    "shape": [1, classes, height, width],
                    "dtype": "float32",
                    "target": "labels",
                    "seconds_median": statistics.median(samples),
                    "seconds_p20": low,
                    "seconds_p80": high,
                    "peak_mib": peak_memory(name, classes, height, width),
                }
            )
    return {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gpl_fast": gpl_fast.__version__,
        "rows": rows,
    }


def make_inputs(classes: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Logits (1, C, H, W) float32 and labels (1, H, W), from an own generator."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, classes, height, width, generator=generator)
    return logits, torch.randint(classes, (1, height, width), generator=generator)


def step(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor) -> None:
    """One forward and backward."""
    loss(logits.detach().requires_grad_(), labels).backward()  # type: ignore[no-untyped-call]


def peak_memory(name: str, classes: int, height: int, width: int) -> float:
    """MiB that one step adds to the resident set's high-water mark, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    queue: Any = context.SimpleQueue()
    process = context.Process(target=_measure_peak, args=(queue, name, classes, height, width))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"bench: the process that measures memory ended with {process.exitcode}")
    return float(queue.get())


def _measure_peak(queue: Any, name: str, classes: int, height: int, width: int) -> None:
    import resource

    loss = providers(classes)[name]
    step(loss, *make_inputs(classes, 32, 32))  # libraries and threads are up before the baseline
    logits, labels = make_inputs(classes, height, width)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(loss, logits, labels)
    queue.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def table(report: dict[str, Any]) -> str:
    """The rows as text."""
    lines = [f"{'provider':<12} {'shape':<20} {'median':>10} {'p20':>10} {'p80':>10} {'peak':>12}"]
    for row in report["rows"]:
        shape = "x".join(map(str, row["shape"]))
        times = " ".join(
            f"{1e3 * row[k]:8.1f}ms" for k in ("seconds_median", "seconds_p20", "seconds_p80")
        )
        lines.append(f"{row['provider']:<12} {shape:<20} {times} {row['peak_mib']:9.1f}MiB")
    return "\n".join(lines)


def write(report: dict[str, Any], path: str) -> None:
    """Write the report as JSON."""
    with open(path, "w") as f:
        json.dump(report, f, indent=2)
