"""The command line: ``gpl-fast info | bench | demo``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is returned."""
    parser = argparse.ArgumentParser(prog="gpl-fast", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    info = commands.add_parser("info", help="versions, devices, backends and their reasons")
    info.add_argument("--check", action="store_true", help="exit 1 if a backend is wrong")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)

    bench = commands.add_parser("bench", help="time and memory on this machine; a GPU's floors")
    bench.add_argument("--quick", action="store_true", help="small shapes, about a minute")
    bench.add_argument(
        "--mine", nargs=4, type=_positive, metavar=("N", "C", "H", "W"), help="your own logits"
    )
    bench.add_argument("--target", choices=("labels", "dense", "topk"), default="labels")
    bench.add_argument(
        "--memory-gib", type=float, metavar="GIB", help="what a batch may fill (default: what is "
        "free on the GPU, MemAvailable on the CPU)",
    )  # fmt: skip
    bench.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    bench.add_argument(
        "--roofline", action="store_true", help="run nothing: FLOPs, bytes, floors by stage"
    )
    bench.add_argument("--gpu", choices=("h200", "h100", "a100", "rtx4090"), default="h200")
    bench.add_argument(
        "--csv", type=Path, metavar="FILE", help="with --roofline: measured rows to print beside"
    )
    bench.set_defaults(run=_bench)

    from gpl_fast import demo

    demo_parser = commands.add_parser("demo", help="train with and without the loss, on images")
    demo.add_arguments(demo_parser)
    demo_parser.set_defaults(run=demo.run)

    args = parser.parse_args(argv)
    return int(args.run(args))


def _info(args: argparse.Namespace) -> int:
    from gpl_fast import info

    found = info.collect()
    if args.check:
        found["check"] = info.check()
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        for key, value in found.items():
            if key == "devices":
                for device, state in value.items():
                    print(f"{device:<12} {state['name']}")
                    print(f"  fast       {state['fast']}")
                    print(f"  reference  {state['reference']}")
                    if "backward" in state:
                        print(f"  backward   {state['backward']}")
            elif key == "operators":
                for part, text in value.items():
                    print(f"{part:<12} {text}" if part == "library" else f"  {part:<10} {text}")
            elif key == "missing":
                for kind, why in value.items():
                    print(f"{kind:<12} not usable: {why}")
            elif key == "check":
                for row in value:
                    verdict = "ok" if row["ok"] else "WRONG"
                    print(
                        f"check        {row['device']} {row['backend']} {row['dtype']} "
                        f"{row['target']}: value off by {row['value_error']:.1e}, gradient cosine "
                        f"{row['grad_cosine']:.6f}: {verdict}"
                    )
            else:
                print(f"{key:<12} {value}")
    return int(not all(row["ok"] for row in found.get("check", [])))


def _bench(args: argparse.Namespace) -> int:
    try:
        return _roofline(args) if args.roofline else _time(args)
    except (ValueError, OSError) as error:
        print(f"gpl-fast bench: {error}", file=sys.stderr)
        return 2


def _time(args: argparse.Namespace) -> int:
    from gpl_fast import bench

    shapes = bench.QUICK if args.quick else bench.FULL
    if args.mine is not None:
        shapes = (tuple(args.mine),)
    report = bench.run(shapes, args.target, memory_gib=args.memory_gib)
    print(bench.table(report))
    if args.json:
        bench.write(report, args.json)
    return 0


def _roofline(args: argparse.Namespace) -> int:
    from gpl_fast import roofline

    work = roofline.WORKLOADS
    if args.mine is not None:
        activation = "sigmoid" if args.mine[1] == 1 else "softmax"
        work = {"mine": roofline.Workload(tuple(args.mine), args.target, activation)}
    print(roofline.report(args.gpu, work, args.csv))
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected at least 1")
    return value
