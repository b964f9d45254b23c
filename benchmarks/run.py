"""Time, memory and error of the loss against plain PyTorch, on this machine, in one run.

Each case of `sweeps` is measured three times over. Peak memory and saved bytes: a fresh process for
each provider. Value and gradient: of every provider against float64 on a crop; a wrong one is left
out, and the run ends with status 1. Time: steps of all providers in turns, in several visits spread
over the run, each in a process of its own. A speedup is of shortest steps: load on the machine can
only make a step longer.

Freed memory is kept, as jemalloc and tcmalloc do. glibc gives that of large tensors back to the
system, and the page faults of the next step are a large and unsteady part of plain PyTorch's time;
`--default-allocator` counts them.

    python benchmarks/run.py                               # every sweep: 10 minutes, 20 with lpips
    python benchmarks/run.py --sweep classes               # some of them
    python benchmarks/run.py --shapes 2,150,512,512        # shapes of your own
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ceiling
import gate
import peer_losses
import report
import torch
import training
from providers import (
    BASELINE,
    LPIPS,
    NET,
    PROVIDERS,
    TARGETS,
    Provider,
    crop,
    dtype_of,
    flops,
    loss_net,
    make_inputs,
)
from sweeps import COMPILED, EAGER, SWEEPS, Case, Shape
from torch import Tensor

from gpl_fast.tools import batch, measure, resident

Step = Callable[[], list[float]]
CROP = 96  # pixels a side: of what is compared with float64, and of a huge step's warm-up
HUGE = 500  # GFLOP of a step that takes as long as all other cases' together
HOPELESS = 8  # times the baseline's time: a dtype that nobody would train in


def main() -> int:
    """Measure all cases and write what was asked for; 1 if a provider is wrong."""
    args = parse_arguments()
    # Before the first compilation, here and in the processes started from here.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(report.ROOT / ".cache" / "inductor"))
    if not args.default_allocator and not measure.keep_pages():  # the floors are measured here
        print("freed memory may go back to the system: this is not glibc", file=sys.stderr)
    left_out = set() if args.providers else hopeless()
    measured: list[Measurement] = []
    for case in args.cases:
        print(case, flush=True)
        if why := obstacle(case):
            print(f"  left out: {why}", file=sys.stderr)
        else:
            measured.append(Measurement(case, args, left_out))
    rows: list[report.Row] = []
    for number in range(1, args.visits + 1):
        print(f"visit {number} of {args.visits}", flush=True)
        for one in measured:
            one.visit()
        # After each visit: a long run may be interrupted.
        rows = [row for one in measured for row in one.rows()]
        if rows:
            report.write_csv(rows, args.out)
    if not rows:
        print("nothing was measured", file=sys.stderr)
        return 1
    print(report.page(rows))
    if args.plot:
        import plots

        plots.sweeps(rows, args.plot)
    print(f"wrote {args.out}")
    return int(any(one.wrong for one in measured))


def parse_arguments() -> argparse.Namespace:
    """The command line, with defaults filled in; ``cases`` are what it asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sweep", nargs="+", choices=SWEEPS, help="default: all")
    add("--shapes", nargs="+", type=_shape, metavar="N,C,H,W", help="instead of the sweeps")
    add("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="of --shapes")
    add("--peaked", action="store_true", help="--shapes: predictions of a trained net's entropy")
    add("--net", default=NET, help="--shapes: vgg19, or convolutions per block")
    add("--training", action="store_true", help="--shapes: a training step of the demo's student")
    add("--providers", nargs="+", choices=PROVIDERS, help="default: the sweep's, --shapes: all")
    add("--visits", type=int, default=3, help="to each case, between those to others")
    add("--seconds", type=float, default=0.5, help="of a visit: more rounds until they are spent")
    add("--default-allocator", action="store_true", help="freed memory may go back to the system")
    add("--dry", action="store_true", help="tiny shapes, two rounds, nothing compiled")
    add("--no-memory", action="store_true", help="time and errors only")
    add("--ceiling", action="store_true", help="every case's floor too")
    add("--out", type=Path, help="default: benchmarks/results/<machine>[-own|-dry].csv")
    add("--plot", type=Path, metavar="FILE", help="write a PNG of the sweeps, log-log")
    args = parser.parse_args()
    if args.visits < 1:
        parser.error("--visits: expected 1 or more")
    args.command = shlex.join(["python", "benchmarks/run.py", *sys.argv[1:]])
    if args.shapes:
        sweep, kinds = ("training", ["dense"]) if args.training else ("own", args.targets)
        providers = tuple(args.providers or PROVIDERS)
        args.cases = [
            Case(sweep, shape, kind, args.peaked, args.net, providers)
            for shape in args.shapes
            for kind in kinds
        ]
    else:
        args.cases = [case for name in args.sweep or SWEEPS for case in SWEEPS[name]]
        if args.providers:
            args.cases = [replace(x, providers=tuple(args.providers)) for x in args.cases]
    if args.ceiling:
        args.cases = [replace(case, floor=True) for case in args.cases]
    if args.dry:
        args.cases = [case.on_few_pixels() for case in args.cases]
        args.visits, args.seconds = 2, 0.0
    name = report.slug() + "-own" * bool(args.shapes) + "-dry" * args.dry
    args.out = args.out or report.ROOT / "benchmarks" / "results" / f"{name}.csv"
    return args


def _shape(text: str) -> Shape:
    n, c, h, w = map(int, text.split(","))
    return n, c, h, w


def obstacle(case: Case) -> str | None:
    """Why a case cannot be measured here, or None."""
    if case.kind == "topk" and case.shape[1] == 1:
        return "one class has no top-k"
    if case.net == LPIPS and (why := peer_losses.obstacle()):
        return why
    free, bytes_ = resident.free_bytes("cpu"), needed(case)
    if free is not None and bytes_ > free:
        return f"eager PyTorch needs about {bytes_ >> 30} GiB, {free >> 30} GiB are free"
    return None


def needed(case: Case) -> int:
    """Bytes of a process that takes steps of eager PyTorch, about."""
    # A one-hot map of int64 beside those of float32.
    return batch.naive_bytes(loss_net(case.shape[1], case.net), case.shape, 26)


def hopeless() -> set[str]:
    """Plain PyTorch's providers in bfloat16, where it takes many times as long as float32, as on
    CPUs without instructions for it."""
    shape = (1, 19, CROP, CROP)
    names = (BASELINE, gate.PEER)
    steps = timed_steps(
        {k: PROVIDERS[k](19, "labels") for k in names}, *make_inputs(shape, "labels")
    )
    speedup = measure.summary(measure.interleave(steps, 2), BASELINE)[gate.PEER]["speedup"]
    if speedup * HOPELESS >= 1:
        return set()
    print(f"plain PyTorch's bfloat16 is left out: it takes {1 / speedup:.0f} times as long here")
    return {name for name in (*EAGER, *COMPILED) if dtype_of(name) == "bfloat16"}


class Measurement:
    """A case on its way: what does not change from visit to visit, and the rounds so far.

    Attributes:
        wrong: why a provider is not timed, by name.
        times: what the parts of a step took in every round, by provider.
    """

    def __init__(self, case: Case, args: argparse.Namespace, left_out: set[str]) -> None:
        self.case, self.args = case, args
        names = [name for name in case.providers if name not in left_out]
        self.used: dict[str, dict[str, Any]] = {}
        if not args.no_memory and case.sweep != "training":
            # First: this process does not hold the inputs yet.
            self.used = {name: memory(name, case) for name in names}
        torch.compiler.reset()  # a function is compiled for a few shapes, then no more
        logits, target = make_inputs(case.shape, case.kind, case.peaked)
        # A compiled provider is made for one shape: its crop is everything, but where float64 would
        # take minutes.
        whole = set(names) & set(COMPILED) and case.net != LPIPS
        size = max(case.shape[2:]) if whole else CROP
        few = crop(logits, target, size)
        self.errors = gate.errors(make(case, names), *few, case.net)
        if gate.complaints(self.errors) and gate.PEER in left_out:
            # Too slow to be timed, but what ours is compared with.
            self.errors |= gate.errors(make(case, [gate.PEER]), *few, case.net)
        self.wrong = gate.complaints(self.errors)
        for name, why in self.wrong.items():
            print(f"  {name} is left out: {why}", file=sys.stderr)
        self.right = [name for name in names if name not in self.wrong]
        self.gflop = flops(case.shape, case.kind, case.net) / 1e9
        self.read = ceiling.read_seconds(logits)
        self.floors = convolution_floors(case) if case.floor else {}
        self.times: dict[str, list[list[float]]] = {}

    def visit(self) -> None:
        """Some more rounds."""
        args = self.args
        more: dict[str, list[list[float]]] = measure.in_fresh_process(
            take_rounds, self.case, self.right, self.gflop > HUGE, args.seconds,
            not args.default_allocator,
        )  # fmt: skip
        for name, rounds in more.items():
            self.times.setdefault(name, []).extend(rounds)

    def rows(self) -> list[report.Row]:
        """Those of every provider that is right."""
        case, about = self.case, {**report.protocol(), "command": self.args.command}
        about |= {"sweep": case.sweep, "shape": "x".join(map(str, case.shape)), "net": case.net}
        about |= {"target": case.kind, "peaked": case.peaked, "gflop": self.gflop}
        rows = []
        for name, found in measure.summary(self.times, BASELINE).items():
            error, cosine = self.errors.get(name, (None, None))
            row = {**about, "provider": name, "dtype": dtype_of(name)}
            row["speedup_vs_eager_fp32"] = found.pop("speedup")
            row |= {**found, "peak_mib": None, "saved_bytes": None, **self.used.get(name, {})}
            row |= {"value_error": error, "grad_cosine": cosine, "read_seconds": self.read}
            rows.append({**row, "conv_seconds": self.floors.get(dtype_of(name))})
        return rows


def memory(name: str, case: Case) -> dict[str, Any]:
    """``peak_mib`` and ``saved_bytes`` of a step, from a fresh process; nothing where it failed."""
    try:
        peak, saved = measure.in_fresh_process(take_memory, name, case)
    except RuntimeError as error:
        print(f"  memory of {name}: {error}", file=sys.stderr)
        return {}
    return {"peak_mib": peak, "saved_bytes": saved}


def take_memory(name: str, case: Case) -> tuple[float | None, int]:
    """MiB that a step adds at its highest, and bytes kept for the backward: `measure.memory`."""
    (provider,) = make(case, [name]).values()
    # Libraries, threads and cached weights are up before the baseline; compiled graphs are for one
    # shape, and the compiler's own memory is not the step's.
    small = case.shape if name in COMPILED else (1, case.shape[1], 32, 32)
    measure.step(provider, *make_inputs(small, case.kind, case.peaked))
    logits, target = make_inputs(case.shape, case.kind, case.peaked)
    return measure.memory(provider, logits, target, provider.weights)


def take_rounds(
    case: Case, names: Iterable[str], huge: bool, seconds: float, kept: bool
) -> dict[str, list[list[float]]]:
    """What the parts of a step took in some rounds, by provider.

    Args:
        huge: warmed up on a crop, not by a round.
        kept: freed memory is kept, and enough for plain PyTorch mapped before.
    """
    if kept:
        measure.keep_pages(needed(case))
    made = make(case, names)
    if case.sweep == "training":
        steps = warm = training.steps(made, case.shape)
    else:
        inputs = make_inputs(case.shape, case.kind, case.peaked)
        steps = warm = timed_steps(made, *inputs)
        if huge and not set(names) & set(COMPILED):
            warm = timed_steps(made, *crop(*inputs, CROP))
    for once in warm.values():
        once()
    return measure.interleave(steps, 1, seconds=seconds, warm_up=0)


def make(case: Case, names: Iterable[str]) -> dict[str, Provider]:
    """The providers of these names."""
    of_case = peer_losses.PROVIDERS if case.net == LPIPS else PROVIDERS
    return {name: of_case[name](case.shape[1], case.kind, "cpu", case.net) for name in names}


def timed_steps(made: Mapping[str, Provider], logits: Tensor, target: Any) -> dict[str, Step]:
    """A step of each provider on logits (N, C, H, W)."""
    watch = measure.Stopwatch("cpu")
    return {k: partial(measure.timed_step, watch, p, logits, target) for k, p in made.items()}


def convolution_floors(case: Case) -> dict[str, float]:
    """Seconds that a step's convolutions alone need, by dtype; printed by layer."""
    floors = {}
    for name in dict.fromkeys(map(dtype_of, case.providers)):
        dtype = getattr(torch, name)
        rates = ceiling.layer_rates(case.shape, case.kind, dtype, case.net)
        print(ceiling.text(rates, dtype), flush=True)
        floors[name] = sum(rate.seconds for rate in rates)
    return floors


if __name__ == "__main__":
    sys.exit(main())
