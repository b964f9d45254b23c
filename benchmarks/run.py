"""Time, memory and error of the loss against plain PyTorch, on this machine, in one run.

For each shape and target: peak memory and saved bytes, a fresh process for each provider; the value
and the gradient against float64 on a crop, where a wrong provider is left out and the run will end
with status 1; then forward and backward of all providers in turns, so that load on the machine
meets all of them.
``python benchmarks/run.py --quick`` takes some minutes, the default shapes hours on few cores.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import report
import torch
from memory import measure
from providers import (
    BASELINE,
    PROVIDERS,
    TARGETS,
    Provider,
    crop,
    dtype_of,
    make_inputs,
)
from torch import Tensor

import gpl_fast
from gpl_fast import bench

Shape = tuple[int, int, int, int]
SHAPES: list[Shape] = [(2, c, 512, 512) for c in (1, 19, 150, 847)] + [(1, 1203, 512, 512)]
QUICK: list[Shape] = [(1, c, 128, 128) for c in (1, 19, 150)]
CROP = 96
# Largest value error and least gradient cosine. A bfloat16 baseline has none: near convergence its
# error is a result, not a mistake.
GATES = {
    "eager-fp32": (1e-3, 0.999),
    "compile": (1e-3, 0.999),
    "gpl_fast-fp32": (1e-3, 0.999),
    "gpl_fast-bf16": (0.05, 0.95),
}


def main() -> int:
    """Run all cases and write what was asked for; 1 if a provider is wrong."""
    args = parse_arguments()
    # Before the first compilation, here and in the processes started from here.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(report.ROOT / ".cache" / "inductor"))
    rows: list[report.Row] = []
    wrong = False
    for shape in args.shapes:
        for kind in args.targets:
            if why := obstacle(shape, kind):
                print(f"{_name(shape)} {kind}: left out: {why}", file=sys.stderr)
                continue
            measured = case(shape, kind, args)
            wrong |= len(measured) < len(args.providers)
            rows += measured
            report.write_csv(rows, args.out)  # after each case: a long run may be interrupted
    if not rows:
        print("nothing was measured", file=sys.stderr)
        return 1
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(report.markdown(rows))
    if args.plot:
        report.plot(rows, args.plot)
    print(f"wrote {args.out}")
    return int(wrong)


def parse_arguments() -> argparse.Namespace:
    """The command line, with defaults filled in."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--shapes", nargs="+", type=_shape, metavar="N,C,H,W", help="default: C from 1 to 1203")
    add("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    add("--providers", nargs="+", choices=PROVIDERS, help="default: all; --quick: no compile")
    add("--repeats", type=int, default=7, help="rounds after the warm-up, 2 or more")
    add("--peaked", action="store_true", help="predictions near convergence")
    add("--quick", action="store_true", help="small shapes, 3 rounds, nothing compiled")
    add("--no-memory", action="store_true", help="time and errors only")
    add("--ceiling", action="store_true", help="also what the convolutions alone need")
    add("--out", type=Path, help="default: benchmarks/results/<machine>[-peaked][-quick].csv")
    add("--markdown", type=Path, metavar="FILE", help="write README's table")
    add("--plot", type=Path, metavar="FILE", help="write a PNG: time and memory against C")
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error("--repeats: expected 2 or more")
    if args.quick:
        args.shapes, args.repeats = args.shapes or QUICK, min(args.repeats, 3)
        args.providers = args.providers or [p for p in PROVIDERS if not p.startswith("compile")]
    args.shapes, args.providers = args.shapes or SHAPES, args.providers or list(PROVIDERS)
    name = report.slug() + "-peaked" * args.peaked + "-quick" * args.quick
    args.out = args.out or report.ROOT / "benchmarks" / "results" / f"{name}.csv"
    return args


def obstacle(shape: Shape, kind: str) -> str | None:
    """Why a case cannot be measured here, or None."""
    n, c, h, w = shape
    if kind == "topk" and c == 1:
        return "one class has no top-k"
    # Eager float32: five maps (N, C, H, W) for a dense target, one of them int64 for labels, and
    # about 2000 bytes a pixel in the network.
    needed = n * h * w * (26 * c + 2000) / 2**30
    free = _free_gib()
    if free is not None and needed > free:
        return f"eager PyTorch needs about {needed:.0f} GiB, {free:.0f} GiB are free"
    return None


def case(shape: Shape, kind: str, args: argparse.Namespace) -> list[report.Row]:
    """The rows of one shape and target, of every provider that is right."""
    peaked = args.peaked
    print(f"{_name(shape)} {kind}{' peaked' * peaked}", flush=True)
    memory: dict[str, Any] = {name: {} for name in args.providers}
    if not args.no_memory:  # first: this process does not hold the inputs yet
        options = ["--peaked"] * peaked
        memory = {name: measure(name, shape, kind, *options) for name in args.providers}
    torch.compiler.reset()  # a function is compiled for a few shapes, then no more
    made = {name: PROVIDERS[name](shape[1], kind) for name in args.providers}
    logits, target = make_inputs(shape, kind, peaked)
    errors = gate(made, *crop(logits, target, CROP))
    right = {name: made[name] for name in made if not complaint(name, *errors[name])}
    steps = {name: partial(bench.step, p, logits, target) for name, p in right.items()}
    times = bench.summary(bench.interleave(steps, args.repeats), BASELINE)
    del logits, target, steps
    floors = convolution_floors(shape, kind, args.providers) if args.ceiling else {}
    rows = []
    for name, seconds in times.items():
        floor = floors.get(dtype_of(name))
        speedup = seconds.pop("speedup")
        rows.append(
            {
                **report.protocol(),
                "shape": _name(shape),
                "target": kind,
                "peaked": peaked,
                "provider": name,
                "dtype": dtype_of(name),
                "rounds": args.repeats,
                **seconds,
                "speedup_vs_eager_fp32": speedup,
                "peak_mib": memory[name].get("peak_mib"),
                "saved_bytes": memory[name].get("saved_bytes"),
                "value_error": errors[name][0],
                "grad_cosine": errors[name][1],
                "conv_seconds": floor,
                "conv_share": None if floor is None else floor / seconds["seconds_median"],
            }
        )
        print(_line(rows[-1]), flush=True)
    return rows


def gate(made: dict[str, Provider], logits: Tensor, target: Any) -> dict[str, tuple[float, float]]:
    """Relative value error and gradient cosine of each provider against the float64 reference."""
    c = logits.shape[1]
    activation = "sigmoid" if c == 1 else "softmax"
    truth = gpl_fast.GenericPerceptualLoss(c, activation=activation, backend="reference")
    dense = isinstance(target, Tensor) and target.is_floating_point()
    true_value, true_grad = bench.step(truth, logits.double(), target.double() if dense else target)
    found = {}
    for name, provider in made.items():
        value, grad = bench.step(provider, logits, target)
        error = (value.double() - true_value).abs() / true_value
        cosine = torch.cosine_similarity(grad.double().flatten(), true_grad.flatten(), dim=0)
        found[name] = (float(error), float(cosine))
        if why := complaint(name, *found[name]):
            print(f"  {name} is left out: {why}", file=sys.stderr)
    return found


def complaint(name: str, error: float, cosine: float) -> str | None:
    """What is wrong with a provider's value or gradient, or None."""
    largest, least = GATES.get(name, (math.inf, -1.0))
    if error <= largest and cosine >= least:
        return None
    return (
        f"its value is off by {error:.1e} (at most {largest:g}), its gradient's cosine is "
        f"{cosine:.5f} (at least {least:g})"
    )


def convolution_floors(shape: Shape, kind: str, names: list[str]) -> dict[str, float]:
    """Seconds that a step's convolutions alone need, by dtype; printed by layer."""
    import ceiling

    floors = {}
    for name in dict.fromkeys(map(dtype_of, names)):
        dtype = getattr(torch, name)
        rates = ceiling.layer_rates(shape, kind, dtype)
        print(ceiling.text(rates, dtype), flush=True)
        floors[name] = sum(rate.seconds for rate in rates)
    return floors


def _line(row: report.Row) -> str:
    form = {"speedup_vs_eager_fp32": "{:6.2f}x", "peak_mib": "{:8.1f} MiB", "conv_share": "{:4.0%}"}
    cells = [form[k].format(row[k]) if row[k] is not None else "n/a" for k in form]
    times = " ".join(
        f"{1e3 * row[k]:9.1f}" for k in ("seconds_median", "seconds_p20", "seconds_p80")
    )
    saved = "n/a" if row["saved_bytes"] is None else f"{row['saved_bytes'] / 2**20:.1f} MiB"
    return (
        f"  {row['provider']:<14} {times} ms {cells[0]}  peak {cells[1]}  saved {saved:>11}  error "
        f"{row['value_error']:.1e}  cosine {row['grad_cosine']:.5f}  conv {cells[2]}"
    )


def _free_gib() -> float | None:
    if not os.path.exists("/proc/meminfo"):
        return None
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20


def _shape(text: str) -> Shape:
    n, c, h, w = map(int, text.split(","))
    return n, c, h, w


def _name(shape: Shape) -> str:
    return "x".join(map(str, shape))


if __name__ == "__main__":
    sys.exit(main())
