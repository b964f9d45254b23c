"""Seconds of a step by stage: of the profiler's kernels, or, where it sees none, between events."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from gpl_fast.fast import policy
from gpl_fast.tools.measure import Stopwatch
from gpl_fast.tools.recorder import GRADIENT, SMALL

CONVOLUTION = r"dgrad|xmma|convol|implicit|cudnn|cutlass|gemm"  # in names of ATen's kernels
STEPS = 3
KERNELS = 25  # of a profile that are kept


def profile(step: Callable[[], Any], device: str) -> dict[str, Any]:
    """Seconds by stage, in the words of `gpl_fast.tools.recorder`, and who says so."""
    try:
        found = of_kernels(step, device)
    except Exception as error:  # a profiler that cannot be had
        found = {"seconds": {}, "error": f"{type(error).__name__}: {error}"[:300]}
    return found if found["seconds"] else {**found, **between_events(step, device)}


def of_kernels(step: Callable[[], Any], device: str) -> dict[str, Any]:
    """By `torch.profiler`; its kernels too, the longest first."""
    cuda, activity = device == "cuda", torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as watched:
        for _ in range(STEPS):
            step()
        if cuda:
            torch.cuda.synchronize()
    seconds: dict[str, float] = {}
    kernels = []
    for event in watched.key_averages():
        took = 1e-6 * (event.self_device_time_total if cuda else event.self_cpu_time_total) / STEPS
        stage = stage_of(event.key)
        seconds[stage] = seconds.get(stage, 0.0) + took
        kernels.append({"kernel": event.key[:120], "stage": stage, "seconds": took,
                        "calls": event.count / STEPS})  # fmt: skip
    kernels.sort(key=lambda k: -k["seconds"])
    return {"seconds": seconds, "kernels": kernels[:KERNELS], "by": "profiler"}


def stage_of(kernel: str) -> str:
    """Of a kernel's name."""
    if found := re.search(r"([a-z][a-z_]*_(?:fwd|bwd))", kernel):
        return found[1]
    return GRADIENT if re.search(CONVOLUTION, kernel) else SMALL


class _Timed:
    """Stages between two marks each."""

    def __init__(self, inner: Any, watch: Stopwatch) -> None:
        self.inner, self.watch = inner, watch
        self.marks: list[tuple[str, Any, Any]] = []

    def __getattr__(self, stage: str) -> Callable[..., Any]:
        run = getattr(self.inner, stage)

        def call(*args: Any, **options: Any) -> Any:
            begin = self.watch.mark()
            out = run(*args, **options)
            self.marks.append((stage, begin, self.watch.mark()))
            return out

        return call


def between_events(step: Callable[[], Any], device: str) -> dict[str, Any]:
    """By marks on the stream around each stage: gaps and the host count; the rest is ATen's."""
    name = policy.current(torch.device(device))
    now, watch = policy.named(name), Stopwatch(device)
    halves = {getattr(now, half): half for half in ("forward", "backward")}
    timed = {who: _Timed(policy.implementation(name, half), watch) for who, half in halves.items()}
    seconds: dict[str, float] = {}
    with policy.injected(now, **timed):
        step()
        for each in timed.values():
            each.marks.clear()
        begin = watch.mark()
        for _ in range(STEPS):
            step()
        (whole,) = watch.seconds([begin, watch.mark()])
    for each in timed.values():
        for stage, first, last in each.marks:
            (took,) = watch.seconds([first, last])
            seconds[stage] = seconds.get(stage, 0.0) + took / STEPS
    seconds[GRADIENT] = whole / STEPS - sum(seconds.values())
    return {"seconds": seconds, "by": "events"}
