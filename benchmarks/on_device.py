"""Forward and backward on a GPU, each timed by itself with CUDA events; peak memory of the step.

``python benchmarks/on_device.py --out rows.json`` takes the workloads of semantic segmentation,
depth and instance masks at their papers' crops and batches, in the order of what matters, until
``--seconds`` are spent; ``--dry`` the same on the CPU at tiny sizes. A provider that fails, or is
wrong against float64 on a crop, has a row that says so and no times. ``--alone`` takes gpl_fast
alone, and a profile of its kernels with it; ``--warm CASE`` compiles what a case will launch.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gate
import report
import stages
import torch
from providers import BASELINE, PROVIDERS, Provider, crop, dtype_of, flops, make_inputs
from torch import Tensor

from gpl_fast.tools import measure
from gpl_fast.tools.roofline import OURS


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
CASE_SECONDS, COMPILE_SECONDS, ALONE_SECONDS = 15.0, 45.0, 6.0
CROP = 96
PRINTED = ("workload", "target", "provider", "seconds_median", "backward_seconds", "error")


def few_cases() -> list[Case]:
    """One of each kind of target, one of a single channel."""
    first = {(case.kind, case.shape[1] == 1): case for case in reversed(CASES)}
    return [case.on_few_pixels() for case in first.values()]


def names_of(case: Case, alone: bool) -> list[str]:
    """The providers of a case."""
    if alone:
        return [OURS]
    names = [n for n in PROVIDERS if not n.startswith("compile")]
    return names + ["compile-bf16"] * case.compiled


def rows_of(
    case: Case, device: str, rounds: int, alone: bool, profiles: list[dict[str, Any]]
) -> list[report.Row]:
    """The rows of a case, of every provider, and of ours `alone` a profile."""
    torch.compiler.reset()
    names = names_of(case, alone)
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
    work = flops(case.shape, case.kind)
    watch = measure.Stopwatch(device)
    steps = {k: partial(measure.timed_step, watch, p, logits, target) for k, p in made.items()}
    times = measure.interleave(steps, rounds, warm_up=2)
    for name, found in measure.summary(times, BASELINE).items():
        rows[name] |= found
        rows[name]["speedup_vs_eager_fp32"] = rows[name].pop("speedup")
        rows[name]["tflop_per_second"] = work / found["seconds_median"] / 1e12
    if alone and OURS in made:
        found = stages.profile(partial(measure.step, made[OURS], logits, target), device)
        profiles.append({"shape": list(case.shape), "target": case.kind, **found})
    return list(rows.values())


def warm(case: Case, device: str) -> None:
    """One image, so that what it compiles is in the cache."""
    case = replace(case, shape=(1, *case.shape[1:]))
    logits, target = make_inputs(case.shape, case.kind, device=device)
    measure.step(PROVIDERS[OURS](case.shape[1], case.kind, device), logits, target)


def prepare(
    name: str, case: Case, logits: Tensor, target: Any, row: report.Row
) -> dict[str, Provider]:
    """The provider if it is right and fits; its errors and memory go into `row`."""
    provider = PROVIDERS[name](case.shape[1], case.kind, logits.device.type)
    found = gate.errors({name: provider}, *crop(logits, target, CROP))
    row["value_error"], row["grad_cosine"] = found[name]
    if why := gate.complaints(found).get(name):
        row["error"] = why
        return {}
    measure.step(provider, logits, target)  # compiled, tuned, weights cached
    peak, row["saved_bytes"] = measure.memory(provider, logits, target, provider.weights)
    if logits.is_cuda:  # a CPU's is that of the whole process
        row["peak_mib"] = peak
    return {name: provider}


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
    parser.add_argument("--alone", action="store_true", help="gpl_fast alone, with profiles")
    parser.add_argument("--warm", type=int, metavar="CASE", help="compile a case and end")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    device = "cpu" if args.dry else "cuda"
    cases = few_cases() if args.dry else list(CASES)
    if args.warm is not None:
        warm(cases[args.warm], device)
        return 0
    rows: list[report.Row] = []
    profiles: list[dict[str, Any]] = []
    left_out: list[str] = []
    for case in cases:
        needed = ALONE_SECONDS if args.alone else CASE_SECONDS
        if case.compiled and end - time.monotonic() < needed + COMPILE_SECONDS:
            case = replace(case, compiled=False)
        if not args.dry and end - time.monotonic() < needed:
            left_out.append(f"{case.name} {case.kind}")
        else:
            rounds = 2 if args.dry else args.rounds
            measured = rows_of(case, device, rounds, args.alone, profiles)
            for row in measured:
                print(*(row.get(k, "") for k in PRINTED), flush=True)
            rows += measured
        # after each case: a run may be cut off
        report.replace_text(
            args.out, json.dumps({"rows": rows, "profiles": profiles, "left_out": left_out})
        )
    ours = [row for row in rows if row["provider"].startswith("gpl_fast")]
    return int(not ours or any("error" in row for row in ours))


if __name__ == "__main__":
    sys.exit(main())
