"""Time, memory and error of the loss against plain PyTorch, on this machine, in one run.

Each case is one shape, target and network. First peak memory and saved bytes, a fresh process for
each provider; then the value and the gradient of every provider against float64 on a crop, where a
wrong one is left out and the run will end with status 1; then forward and backward of all providers
in turns, so that load on the machine meets all of them. All cases are visited several times, each
time for a few rounds in a process of its own: no minute of load and no process with unlucky pages
decides. A speedup is of shortest steps, which load can only make longer; what time is left goes to
the cases where these are least certain.

Memory is mapped before and kept when it is freed: where glibc gives that of large tensors back to
the system, as it does by default, page faults take up to three fifths of a step of plain PyTorch,
more or fewer from run to run. `--default-allocator` counts them.

    python benchmarks/run.py --visits 3 --minutes 9.5      # every sweep, ten minutes
    python benchmarks/run.py --sweep classes               # some of them: `SWEEPS`
    python benchmarks/run.py --shapes 2,150,512,512        # shapes of your own
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ceiling
import gate
import report
import torch
import training
from findings import checks, growth
from memory import memory
from providers import (
    BASELINE,
    NET,
    PROVIDERS,
    TARGETS,
    Provider,
    crop,
    dtype_of,
    flops,
    later_blocks,
    loss_net,
    make_inputs,
)
from torch import Tensor

from gpl_fast.tools import batch, measure, resident

Shape = tuple[int, int, int, int]
Step = Callable[[], list[float]]
COMPILED = tuple(name for name in PROVIDERS if name.startswith("compile"))
OURS = ("gpl_fast-fp32", "gpl_fast-bf16")
LATER = "later blocks of "
EAGER = ("eager-fp32", "eager-bf16", "eager-bf16-cl")


@dataclass(frozen=True)
class Case:
    """What is measured together: logits of `shape`, a target of `kind`, some providers."""

    sweep: str
    shape: Shape
    kind: str = "labels"
    peaked: bool = True
    net: str = NET
    providers: tuple[str, ...] = (BASELINE, *OURS)
    floor: bool = False  # the convolutions alone and a pass over the logits are measured too

    def command(self) -> str:
        """What measures this case again."""
        shape = ",".join(map(str, self.shape))
        words = ["python", "benchmarks/run.py", "--shapes", shape, "--targets", self.kind]
        words += ["--peaked"] * self.peaked + ["--net", self.net] * (self.net != NET)
        words += ["--training"] * (self.sweep == "training") + ["--ceiling"] * self.floor
        return shlex.join([*words, "--providers", *self.providers])

    def on_few_pixels(self) -> Case:
        """A small one of its kind, nothing compiled."""
        n, c, h, w = self.shape
        sides = [8 * max(size.bit_length() - 4, 4) for size in (h, w)]  # 32: five poolings
        shape = (min(n, 2), c.bit_length(), sides[0], sides[1])
        providers = tuple(name for name in self.providers if name not in COMPILED)
        return replace(self, shape=shape, providers=providers)


COMMON = (BASELINE, "eager-bf16-cl", *OURS)
LARGE = (1, 1203, 512, 512)
SWEEPS: dict[str, list[Case]] = {
    "large": [
        Case("large", LARGE, "dense", providers=(BASELINE, "gpl_fast-bf16"), floor=True),
        Case("large", LARGE, "labels", floor=True),
    ],
    "classes": [
        Case("classes", (1, c, 192, 192), providers=COMMON, floor=True)
        for c in (1, 19, 150, 847, 1203)
    ],
    "flat": [
        Case("flat", (1, 150, 256, 256), kind, peaked=False)  # peaked: see "providers"
        for kind in ("labels", "dense")
    ],
    "providers": [
        Case("providers", (1, 150, 256, 256), "dense", providers=(*EAGER, "compile-bf16", *OURS)),
        Case("providers", (1, 150, 256, 256), "labels", providers=(*EAGER, *OURS)),
        Case("providers", (1, 150, 256, 256), "topk", providers=(*EAGER, *OURS)),
    ],
    "crop": [Case("crop", (1, 19, size, size)) for size in (128, 256, 512, 1024)],
    "batch": [Case("batch", (n, 19, 256, 256)) for n in (1, 2, 4, 8)],
    "net": [
        Case("net", (1, 19, 256, 256), kind, net="vgg19", providers=COMMON)
        for kind in ("labels", "dense")
    ],
    "training": [
        Case("training", shape, "dense", peaked=False, providers=COMMON)
        for shape in ((16, 11, 32, 32), (2, 19, 256, 256))
    ],
}
CROP = 96
HOPELESS = 8  # times the baseline's time: once is enough
# GFLOP of a step that takes as long as those of all other cases, and little longer as the first of
# its size: only every second visit, and warmed up on a crop.
HUGE = 500


def main() -> int:
    """Measure all cases and write what was asked for; 1 if a provider is wrong."""
    args = parse_arguments()
    # Before the first compilation, here and in the processes started from here.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(report.ROOT / ".cache" / "inductor"))
    if not args.default_allocator and not measure.keep_pages():  # the floors are measured here
        print("freed memory may go back to the system: this is not glibc", file=sys.stderr)
    end = time.monotonic() + 60 * args.minutes
    measured: list[Measurement] = []
    for case in args.cases:
        if why := obstacle(case):
            print(f"{_title(case)}: left out: {why}", file=sys.stderr)
            continue
        slow = set() if args.providers else hopeless(measured)
        measured.append(Measurement(case, args, slow))
        measured[-1].visit()
    rows = write(measured, args)  # again and again: a long run may be interrupted
    if not rows:
        print("nothing was measured", file=sys.stderr)
        return 1
    for number in range(2, args.visits + 1):
        print(f"visit {number}", flush=True)
        for one in measured:
            if number % 2 or not one.huge:
                one.visit()
        rows = write(measured, args)
    while one := least_certain(measured, end - time.monotonic()):
        one.visit()
        rows = write(measured, args)
    for one in measured:
        print(_title(one.case), *map(_line, one.rows()), sep="\n", flush=True)
    for line in (*growth(rows), *checks(rows)):
        print(line)
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(report.markdown(rows))
    if args.plot:
        report.plot(rows, args.plot)
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
    add(
        "--providers",
        nargs="+",
        choices=PROVIDERS,
        help="default: the sweep's, --shapes: all; but those that prove hopeless here once only",
    )
    add("--visits", type=int, default=6, help="to each case, between those to others")
    add(
        "--minutes",
        type=float,
        default=0.0,
        help="as long as they end within these, more visits to the least certain cases",
    )
    add("--rounds", type=int, default=1, help="of a visit: at least")
    add("--seconds", type=float, default=0.5, help="of a visit: more rounds until they are spent")
    add("--default-allocator", action="store_true", help="freed memory may go back to the system")
    add("--dry", action="store_true", help="tiny shapes, the fewest rounds, nothing compiled")
    add("--no-memory", action="store_true", help="time and errors only")
    add("--ceiling", action="store_true", help="every case's floor too")
    add("--out", type=Path, help="default: benchmarks/results/<machine>[-own|-dry].csv")
    add("--markdown", type=Path, metavar="FILE", help="write the tables")
    add("--plot", type=Path, metavar="FILE", help="write a PNG of the sweeps, log-log")
    args = parser.parse_args()
    if args.visits < 1 or args.rounds < 1 or args.visits * args.rounds < 2:
        parser.error("--visits, --rounds: expected 1 or more, and 2 or more rounds in all")
    if args.shapes:
        sweep, peaked, net = "training" if args.training else "own", args.peaked, args.net
        providers = tuple(args.providers or PROVIDERS)
        kinds = ["dense"] if args.training else args.targets
        args.cases = [
            Case(sweep, shape, kind, peaked, net, providers)
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
        args.visits, args.rounds, args.seconds = 2, 1, 0.0
    name = report.slug() + "-own" * bool(args.shapes) + "-dry" * args.dry
    args.out = args.out or report.ROOT / "benchmarks" / "results" / f"{name}.csv"
    return args


def obstacle(case: Case) -> str | None:
    """Why a case cannot be measured here, or None."""
    if case.kind == "topk" and case.shape[1] == 1:
        return "one class has no top-k"
    free, bytes_ = resident.free_bytes("cpu"), needed(case)
    if free is not None and bytes_ > free:
        return f"eager PyTorch needs about {bytes_ >> 30} GiB, {free >> 30} GiB are free"
    return None


def needed(case: Case) -> int:
    """Bytes of a process that takes steps of eager PyTorch, about."""
    # A one-hot map of int64 beside those of float32.
    return batch.naive_bytes(loss_net(case.shape[1], case.net), case.shape, 26)


def least_certain(measured: Iterable[Measurement], seconds: float) -> Measurement | None:
    """The case that a visit will tell most about, of those that take less than this."""
    short = [one for one in measured if one.took < seconds]
    return max(short, key=Measurement.doubt, default=None)


def hopeless(measured: Iterable[Measurement]) -> set[str]:
    """Plain PyTorch's providers, but the baseline, of a dtype that takes many times as long here,
    as bfloat16 does on CPUs without instructions for it."""
    slow = {dtype_of(name) for one in measured for name in one.hopeless}
    return {name for name in PROVIDERS if dtype_of(name) in slow} - {BASELINE, *OURS}


class Measurement:
    """A case on its way: what does not change from visit to visit, and the rounds so far.

    Attributes:
        wrong: why a provider is not timed, by name.
        times: what the parts of a step took in every round, by provider.
        shortest: the whole step that took least in each visit, by provider.
        took: seconds of the last visit.
        hopeless: the summary of the few rounds of one that takes many times the baseline's time.
    """

    def __init__(self, case: Case, args: argparse.Namespace, slow: set[str]) -> None:
        shape, kind = case.shape, case.kind
        print(_title(case), flush=True)
        for name in [name for name in case.providers if name in slow]:
            print(f"  {name} is left out: its dtype took over {HOPELESS} times {BASELINE}'s time")
        self.case, self.args = case, args
        self.used: dict[str, dict[str, Any]] = {}
        if not args.no_memory and case.sweep != "training":
            # First: this process does not hold the inputs yet.
            of = (shape, kind, case.peaked, case.net)
            self.used = {name: memory(name, *of) for name in case.providers if name not in slow}
        torch.compiler.reset()  # a function is compiled for a few shapes, then no more
        names = [name for name in case.providers if name not in slow]
        logits, target = make_inputs(shape, kind, case.peaked)
        # A compiled provider is made for one shape: its crop is everything.
        size = max(shape[2:]) if set(names) & set(COMPILED) else CROP
        few = crop(logits, target, size)
        self.errors = gate.errors(make(case, names), *few, case.net)
        if gate.complaints(self.errors) and gate.PEER in slow.intersection(case.providers):
            # Too slow to be timed, but what ours is compared with.
            self.errors |= gate.errors(make(case, [gate.PEER]), *few, case.net)
        self.wrong = gate.complaints(self.errors)
        for name, why in self.wrong.items():
            print(f"  {name} is left out: {why}", file=sys.stderr)
        self.right = [name for name in names if name not in self.wrong]
        self.gflop = flops(shape, kind, case.net) / 1e9
        self.huge = self.gflop > HUGE
        self.read = ceiling.read_seconds(logits)
        self.floors = convolution_floors(case) if case.floor else {}
        self.times: dict[str, list[list[float]]] = {}
        self.hopeless: dict[str, dict[str, Any]] = {}
        self.shortest: dict[str, list[float]] = {}
        self.took = 0.0

    def visit(self) -> None:
        """Some more rounds; the hopeless ones leave few to the others, which are then timed again
        without them."""
        if self.times:
            print(_title(self.case), flush=True)
        args, begin = self.args, time.monotonic()
        kept = not args.default_allocator
        while True:
            names = [name for name in self.right if name not in self.hopeless]
            times: dict[str, list[list[float]]] = measure.in_fresh_process(
                take_rounds, self.case, names, self.huge, args.rounds, args.seconds, kept
            )
            for name in times:
                self.times.setdefault(name, [])
            summary = measure.summary(times, BASELINE)
            slow = {name: summary[name] for name in times if is_hopeless(name, summary[name])}
            if not slow:
                break
            self.hopeless |= slow
        for name, rounds in times.items():
            self.times[name] += rounds
            self.shortest.setdefault(name, []).append(min(map(sum, rounds)))
        self.took = time.monotonic() - begin

    def doubt(self) -> float:
        """By how much a ratio to the baseline may still move, about: how much longer than the
        shortest step is the shortest of another visit, for the provider where it is most, by the
        number of visits, since one lucky step may never come again."""
        found = [sorted(x) for name, x in self.shortest.items() if name not in self.hopeless]
        if any(len(each) < 2 for each in found):
            return math.inf
        return max(((each[1] / each[0] - 1) / len(each) for each in found), default=0.0)

    def rows(self) -> list[report.Row]:
        """Those of every provider that is right."""
        case = self.case
        timed = {name: times for name, times in self.times.items() if name not in self.hopeless}
        summary = measure.summary(timed, BASELINE) | self.hopeless
        rows, protocol = [], report.protocol()
        for name in self.times:
            if name.startswith(LATER):
                continue
            seconds, used = dict(summary[name]), self.used.get(name, {})
            error, cosine = self.errors.get(name, (None, None))
            floor, later = self.floors.get(dtype_of(name)), summary.get(LATER + name, {})
            rows.append(
                {
                    **protocol,
                    "sweep": case.sweep,
                    "shape": "x".join(map(str, case.shape)),
                    "target": case.kind,
                    "peaked": case.peaked,
                    "net": case.net,
                    "provider": name,
                    "dtype": dtype_of(name),
                    "speedup_vs_eager_fp32": seconds.pop("speedup"),
                    **seconds,
                    "peak_mib": used.get("peak_mib"),
                    "saved_bytes": used.get("saved_bytes"),
                    "value_error": error,
                    "grad_cosine": cosine,
                    "gflop": self.gflop,
                    "conv_seconds": floor,
                    "conv_share": None if floor is None else floor / seconds["seconds_median"],
                    "read_seconds": self.read,
                    "later_seconds": later.get("seconds_median"),
                    "command": case.command()
                    + " --default-allocator" * self.args.default_allocator,
                }
            )
        return rows


def make(case: Case, names: Iterable[str]) -> dict[str, Provider]:
    """The providers of these names."""
    return {name: PROVIDERS[name](case.shape[1], case.kind, "cpu", case.net) for name in names}


def take_rounds(
    case: Case, names: Iterable[str], huge: bool, rounds: int, seconds: float, kept: bool
) -> dict[str, list[list[float]]]:
    """What the parts of a step took in some rounds, by provider; for a process of its own.

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
        steps = timed_steps(made, *inputs)
        if case.sweep == "classes":
            steps |= later_steps(case, made)
        few = huge and not set(names) & set(COMPILED)
        warm = timed_steps(made, *crop(*inputs, CROP)) if few else steps
    for once in warm.values():
        once()
    return measure.interleave(steps, rounds, seconds=seconds, warm_up=0)


def timed_steps(made: Mapping[str, Provider], logits: Tensor, target: Any) -> dict[str, Step]:
    """A step of each provider on logits (N, C, H, W)."""
    watch = measure.Stopwatch("cpu")
    return {k: partial(measure.timed_step, watch, p, logits, target) for k, p in made.items()}


def is_hopeless(name: str, summary: Mapping[str, Any]) -> bool:
    """Whether a provider of plain PyTorch takes many times as long as the baseline."""
    speedup = summary["speedup"]
    plain = name in PROVIDERS and name not in (BASELINE, *OURS)
    return plain and speedup is not None and speedup * HOPELESS < 1


def write(measured: Iterable[Measurement], args: argparse.Namespace) -> list[report.Row]:
    """All rows so far, into the CSV too."""
    rows = [row for one in measured for row in one.rows()]
    report.write_csv(rows, args.out)
    return rows


def later_steps(case: Case, providers: Iterable[str]) -> dict[str, Step]:
    """A step through the blocks after the first alone, for each of ours."""
    n, c, h, w = case.shape
    steps: dict[str, Step] = {}
    for name in [name for name in OURS if name in providers]:
        provider = later_blocks(getattr(torch, dtype_of(name)), c, case.net)
        channels = loss_net(c, case.net).shapes(h, w)["pool1"][0]
        maps = torch.randn(2, n, channels, h // 2, w // 2).relu_()
        steps |= timed_steps({LATER + name: provider}, *maps)
    return steps


def convolution_floors(case: Case) -> dict[str, float]:
    """Seconds that a step's convolutions alone need, by dtype; printed by layer."""
    floors = {}
    for name in dict.fromkeys(map(dtype_of, case.providers)):
        dtype = getattr(torch, name)
        rates = ceiling.layer_rates(case.shape, case.kind, dtype, case.net)
        print(ceiling.text(rates, dtype), flush=True)
        floors[name] = sum(rate.seconds for rate in rates)
    return floors


def _line(row: report.Row) -> str:
    milliseconds = ("seconds_median", "seconds_p20", "seconds_p80")
    times = " ".join(f"{1e3 * row[k]:9.1f}" for k in milliseconds)
    cells = [
        report.text(row["speedup_vs_eager_fp32"], "{:.2f}x"),
        "peak " + report.text(row["peak_mib"], "{:.1f} MiB"),
        "saved " + report.text(row["saved_bytes"], "{:.1f} MiB", 2**-20),
        "error " + report.text(row["value_error"], "{:.1e}"),
        "cosine " + report.text(row["grad_cosine"], "{:.5f}"),
        "conv " + report.text(row["conv_share"], "{:.0%}"),
    ]
    return f"  {row['provider']:<14} {times} ms  " + "  ".join(f"{c:<16}" for c in cells).rstrip()


def _title(case: Case) -> str:
    shape, peaked = "x".join(map(str, case.shape)), "peaked" if case.peaked else "flat"
    return f"{case.sweep}: {shape} {case.kind}, {peaked}, {case.net}"


def _shape(text: str) -> Shape:
    n, c, h, w = map(int, text.split(","))
    return n, c, h, w


if __name__ == "__main__":
    sys.exit(main())
