"""Forward and backward on a GPU, each timed by itself with CUDA events; peak memory of the step.

``python benchmarks/on_device.py --out rows.json`` takes the workloads of semantic segmentation,
depth and instance masks at their papers' crops and batches, in the order of what matters, until
``--seconds`` are spent; ``--dry`` the same on the CPU at tiny sizes. A provider that fails, or is
wrong against float64 on a crop, has a row that says so and no times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import report
import run
import torch
from memory import saved_bytes
from providers import BASELINE, PROVIDERS, Provider, crop, dtype_of, make_inputs
from torch import Tensor

import gpl_fast
from gpl_fast import bench


@dataclass(frozen=True)
class Case:
    """A workload with one kind of target; `compiled`: torch.compile is among the providers."""

    name: str
    shape: tuple[int, int, int, int]
    kind: str
    compiled: bool = False

    def on_few_pixels(self) -> Case:
        """One small image of at most 19 classes."""
        return Case(self.name, (1, min(self.shape[1], 19), 40, 44), self.kind)


CITYSCAPES, VOC = (8, 19, 769, 769), (16, 21, 512, 512)
ADE20K, ADE_FULL, LVIS = (16, 150, 512, 512), (8, 847, 512, 512), (4, 1203, 512, 512)
CASES = (
    Case("ade20k", ADE20K, "dense", compiled=True),
    Case("cityscapes", CITYSCAPES, "dense", compiled=True),
    Case("cityscapes", CITYSCAPES, "labels", compiled=True),
    Case("ade20k", ADE20K, "labels", compiled=True),
    Case("lvis", LVIS, "labels"),
    Case("ade-full", ADE_FULL, "labels"),
    Case("depth", (8, 1, 385, 385), "dense"),
    Case("masks", (64, 1, 200, 200), "dense"),
    Case("voc", VOC, "dense"),
    Case("lvis", LVIS, "dense"),
    Case("ade-full", ADE_FULL, "dense"),
)
# Seconds that a case may take: it is not started when fewer are left.
CASE_SECONDS, COMPILE_SECONDS = 15.0, 45.0
CROP = 96
PRINTED = ("workload", "target", "provider", "seconds_median", "backward_seconds", "error")


def few_cases() -> list[Case]:
    """One of each kind of target, one of a single channel."""
    first = {(case.kind, case.shape[1] == 1): case for case in reversed(CASES)}
    return [case.on_few_pixels() for case in first.values()]


class Stopwatch:
    """Marks on a device's stream, or on the CPU's clock."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def mark(self) -> Any:
        """Now, on the stream."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks; waits for the device."""
        if not self.cuda:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def timed_step(watch: Stopwatch, provider: Provider, logits: Tensor, target: Any) -> list[float]:
    """Seconds of forward and of backward."""
    x = logits.detach().requires_grad_()
    marks = [watch.mark()]
    value = provider(x, target)
    marks.append(watch.mark())
    value.backward()
    marks.append(watch.mark())
    return [watch.seconds(a, b) for a, b in pairwise(marks)]


def interleaved(
    made: Mapping[str, Provider], logits: Tensor, target: Any, rounds: int, watch: Stopwatch
) -> dict[str, list[list[float]]]:
    """[forward, backward] seconds of all providers in turns, after two rounds of warm-up."""
    found: dict[str, list[list[float]]] = {name: [] for name in made}
    for turn in range(rounds + 2):
        for name, provider in made.items():
            seconds = timed_step(watch, provider, logits, target)
            if turn >= 2:
                found[name].append(seconds)
    return found


def peak_mib(provider: Provider, logits: Tensor, target: Any) -> float | None:
    """MiB that one step adds at its highest, the gradient included; None on the CPU."""
    if not logits.is_cuda:
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = bench.step(provider, logits, target)
    peak = torch.cuda.max_memory_allocated()
    del kept
    return (peak - before) / 2**20


def measure(case: Case, device: str, rounds: int) -> list[report.Row]:
    """The rows of a case, of every provider."""
    torch.compiler.reset()
    names = [n for n in PROVIDERS if not n.startswith("compile")]
    names += ["compile-bf16"] * case.compiled
    logits, target = make_inputs(case.shape, case.kind, device=device)
    about = {**report.protocol(), "machine": machine(device), "workload": case.name}
    about |= {"shape": "x".join(map(str, case.shape)), "target": case.kind, "peaked": False}
    rows: dict[str, report.Row] = {}
    made: dict[str, Provider] = {}
    for name in names:
        rows[name] = {**about, "provider": name, "dtype": dtype_of(name), "rounds": rounds}
        try:
            made |= prepare(name, case, logits, target, rows[name])
        except Exception as error:  # one provider out of memory, the others still count
            rows[name]["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    work = flops(case)
    watch = Stopwatch(device)
    for name, seconds in interleaved(made, logits, target, rounds, watch).items():
        rows[name] |= times(seconds, work)
        rows[name]["saved_bytes"] = saved_bytes(made[name], logits, target)
    if BASELINE in made:
        for name in made:
            baseline = rows[BASELINE]["seconds_median"]
            rows[name]["speedup_vs_eager_fp32"] = baseline / rows[name]["seconds_median"]
    return list(rows.values())


def prepare(
    name: str, case: Case, logits: Tensor, target: Any, row: report.Row
) -> dict[str, Provider]:
    """The provider if it is right and fits; its errors and memory go into `row`."""
    provider = PROVIDERS[name](case.shape[1], case.kind, logits.device.type)
    found = run.gate({name: provider}, *crop(logits, target, CROP))[name]
    row["value_error"], row["grad_cosine"] = found
    if why := run.complaint(name, *found):
        row["error"] = why
        return {}
    bench.step(provider, logits, target)  # compiled, tuned, weights cached
    row["peak_mib"] = peak_mib(provider, logits, target)
    return {name: provider}


def times(seconds: list[list[float]], work: int) -> dict[str, float]:
    """Medians of forward, backward and both, percentiles of both, TFLOP/s."""
    both = [sum(pair) for pair in seconds]
    low, _, _, high = statistics.quantiles(both, n=5, method="inclusive")
    median = statistics.median(both)
    return {
        "seconds_median": median,
        "seconds_p20": low,
        "seconds_p80": high,
        "forward_seconds": statistics.median(pair[0] for pair in seconds),
        "backward_seconds": statistics.median(pair[1] for pair in seconds),
        "tflop_per_second": work / median / 1e12,
    }


def flops(case: Case) -> int:
    """Of a step as defined: both branches and the data gradient."""
    n, c, h, w = case.shape
    activation = "sigmoid" if c == 1 else "softmax"
    loss = gpl_fast.GenericPerceptualLoss(c, activation=activation, backend="reference")
    target = torch.empty(case.shape, device="meta")
    if case.kind == "labels":
        target = torch.empty((n, h, w), dtype=torch.long, device="meta")
    return loss.explain(torch.empty(case.shape, device="meta"), target).flops


def machine(device: str) -> str:
    """The GPU's name, or the CPU's."""
    return torch.cuda.get_device_name() if device == "cuda" else report.machine()


def main() -> int:
    """Measure until the time is spent; 1 if gpl_fast failed or was wrong anywhere."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    parser.add_argument("--seconds", type=float, default=240.0, help="time to spend")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dry", action="store_true", help="on the CPU, at tiny sizes")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    device = "cpu" if args.dry else "cuda"
    rows: list[report.Row] = []
    left_out: list[str] = []
    for case in few_cases() if args.dry else CASES:
        needed = CASE_SECONDS + COMPILE_SECONDS * case.compiled
        if not args.dry and end - time.monotonic() < needed:
            left_out.append(f"{case.name} {case.kind}")
        else:
            measured = measure(case, device, 2 if args.dry else args.rounds)
            for row in measured:
                print(*(row.get(k, "") for k in PRINTED), flush=True)
            rows += measured
        # after each case: a run may be cut off
        args.out.write_text(json.dumps({"rows": rows, "left_out": left_out}, indent=1))
    ours = [row for row in rows if row["provider"].startswith("gpl_fast")]
    return int(not ours or any("error" in row for row in ours))


if __name__ == "__main__":
    sys.exit(main())
