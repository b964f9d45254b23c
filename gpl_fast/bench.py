"""`gpl-fast bench`: time and peak memory of the loss on this machine, interleaved in one run.

`interleave`, `summary`, `reset_peak` and `resident_mib` are the protocol; `benchmarks/` compares
more providers and shapes by the same one.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gpl_fast
from gpl_fast import backend

# (classes, height, width) of one image.
QUICK = ((19, 128, 128), (150, 128, 128))
FULL = ((19, 256, 256), (150, 256, 256), (847, 256, 256))
BASELINE = "reference"
DTYPES = {"reference": "float32", "fast": "float32", "fast-bf16": "bfloat16"}


def workloads(quick: bool) -> tuple[tuple[int, int, int], ...]:
    """The shapes that are timed."""
    return QUICK if quick else FULL


def providers(classes: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """What is timed, by name: called with logits and labels, gives the value."""
    loss = gpl_fast.GenericPerceptualLoss
    found = {"reference": loss(classes, backend="reference")}
    if backend.fast_obstacle(torch.device("cpu"), torch.float32, found["reference"].net) is None:
        found["fast"] = loss(classes, backend="fast")
        found["fast-bf16"] = loss(classes, backend="fast", compute_dtype=torch.bfloat16)
    return dict(found)


def run(quick: bool) -> dict[str, Any]:
    """Forward and backward of every provider and workload: seconds, peak MiB, ratios.

    Peak memory is the resident-set high-water mark of a fresh process over its inputs; None where
    the system does not tell.
    """
    rows = []
    for classes, height, width in workloads(quick):
        losses = providers(classes)
        peaks = {name: peak_memory(name, classes, height, width) for name in losses}
        inputs = make_inputs(classes, height, width)
        steps = {name: partial(step, loss, *inputs) for name, loss in losses.items()}
        times = summary(interleave(steps, 5 if quick else 11), BASELINE)
        for name, row in times.items():
            about = {
                "provider": name,
                "shape": [1, classes, height, width],
                "dtype": DTYPES[name],
                "target": "labels",
            }
            rows.append({**about, **row, "peak_mib": peaks[name]})
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


def step(loss: Callable[[Tensor, Any], Tensor], logits: Tensor, target: Any) -> tuple[Tensor, ...]:
    """One forward and backward: the value and the gradient of `logits` (N, C, H, W)."""
    x = logits.detach().requires_grad_()
    value = loss(x, target)
    value.backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    return value.detach(), x.grad


# ------------------------------------------------------------------------------------------- time


def interleave(steps: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each step in `repeats` rounds A B C, A B C, …, after one round of warm-up.

    What a step returns is freed outside of its time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, once in steps.items():
            start = time.perf_counter()
            kept = once()
            if turn:
                seconds[name].append(time.perf_counter() - start)
            del kept
    return seconds


def summary(
    seconds: Mapping[str, Sequence[float]], baseline: str
) -> dict[str, dict[str, float | None]]:
    """Median, 20th and 80th percentile of each provider's seconds, and its speedup.

    The speedup is the median over rounds of baseline / provider, so that load on the machine, which
    moves a whole round, cancels; above 1 is faster. None without the baseline.
    """
    out: dict[str, dict[str, float | None]] = {}
    for name, samples in seconds.items():
        low, _, _, high = statistics.quantiles(samples, n=5, method="inclusive")
        speedup = None
        if baseline in seconds:
            pairs = zip(seconds[baseline], samples, strict=True)
            speedup = statistics.median(base / own for base, own in pairs)
        out[name] = {
            "seconds_median": statistics.median(samples),
            "seconds_p20": low,
            "seconds_p80": high,
            "speedup": speedup,
        }
    return out


# ----------------------------------------------------------------------------------------- memory


def peak_memory(name: str, classes: int, height: int, width: int) -> float | None:
    """MiB that one step adds to the resident set's high-water mark, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    queue: Any = context.SimpleQueue()
    process = context.Process(target=_measure_peak, args=(queue, name, classes, height, width))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"bench: the process that measures memory ended with {process.exitcode}")
    peak: float | None = queue.get()
    return peak


def _measure_peak(queue: Any, name: str, classes: int, height: int, width: int) -> None:
    loss = providers(classes)[name]
    step(loss, *make_inputs(classes, 32, 32))  # libraries and threads are up before the baseline
    inputs = make_inputs(classes, height, width)
    reset_peak()
    before = resident_mib("VmRSS")
    kept = step(loss, *inputs)
    after = resident_mib("VmHWM")
    del kept
    queue.put(None if before is None or after is None else max(after - before, 0.0))


def reset_peak() -> bool:
    """Give free memory back, then let ``VmHWM`` start again from ``VmRSS``; False if it cannot."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc's; a step would reuse free pages unseen
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return False
    return True


def resident_mib(field: str) -> float | None:
    """``VmRSS`` or ``VmHWM`` of this process in MiB, None where there is no ``/proc``.

    Not ``ru_maxrss``, which a process inherits from the one that started it.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    return None


# ----------------------------------------------------------------------------------------- report


def table(report: dict[str, Any]) -> str:
    """The rows as text; "speedup" is over the reference."""
    lines = [
        f"{'provider':<12} {'shape':<18} {'median':>10} {'p20':>10} {'p80':>10} {'speedup':>8} "
        f"{'peak':>12}"
    ]
    for row in report["rows"]:
        shape = "x".join(map(str, row["shape"]))
        times = " ".join(
            f"{1e3 * row[k]:8.1f}ms" for k in ("seconds_median", "seconds_p20", "seconds_p80")
        )
        peak = "n/a" if row["peak_mib"] is None else f"{row['peak_mib']:.1f}MiB"
        lines.append(f"{row['provider']:<12} {shape:<18} {times} {row['speedup']:7.2f}x {peak:>12}")
    return "\n".join(lines)


def write(report: dict[str, Any], path: str) -> None:
    """Write the report as JSON."""
    with open(path, "w") as f:
        json.dump(report, f, indent=2)
