"""The command line: ``gpl-fast info | bench | demo | experiment``."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from gpl_fast.tools import arguments

MOST_ELEMENTS = 2**40  # of logits, terabytes


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is returned."""
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):  # paths and names may hold any byte
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            args = _parser().parse_args(argv)
            return int(args.run(args))
        finally:
            _flush()
    except KeyboardInterrupt:
        print("gpl-fast: interrupted", file=sys.stderr)
        return 130  # what a shell says of a process that SIGINT ended, and below SIGPIPE
    except BrokenPipeError:
        return 141
    except OSError as error:  # a disk that is full
        print(f"gpl-fast: {error}", file=sys.stderr)
        return 1


def _flush() -> None:
    """Here, where a reader that is gone and a full disk can be answered: at exit it is too late."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _parser() -> argparse.ArgumentParser:
    from gpl_fast import __version__, demo, experiments

    parser = arguments.Parser(prog="gpl-fast", description=__doc__)
    parser.add_argument("--version", action="version", version=f"gpl-fast {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="info | bench | demo | experiment"
    )

    info = commands.add_parser("info", help="versions, devices, backends and their reasons")
    info.add_argument("--check", action="store_true", help="exit 1 if a backend is wrong")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)

    bench = commands.add_parser("bench", help="time and memory on this machine; a GPU's predicted")
    add = bench.add_argument
    shapes = bench.add_mutually_exclusive_group()
    shapes.add_argument("--quick", action="store_true", help="small shapes, about a minute")
    shapes.add_argument(
        "--mine", nargs=4, type=arguments.count, metavar=("N", "C", "H", "W"),
        help="your own logits",
    )  # fmt: skip
    add("--target", choices=("labels", "dense", "topk"), default="labels")
    add(
        "--memory-gib", type=arguments.amount, metavar="GIB", help="what a batch may fill "
        "(default: what is free on the GPU, MemAvailable on the CPU)",
    )  # fmt: skip
    add(
        "--workspace-mb", type=arguments.workspace, metavar="MB",
        help="bound on a loss' transient memory, or auto (default; of --roofline 2048)",
    )  # fmt: skip
    add("--json", type=arguments.output_file, metavar="FILE", help="write the rows to FILE")
    add("--roofline", action="store_true", help="run nothing: floors and predictions by stage")
    add("--gpu", choices=("h200", "h100", "a100", "rtx4090"), help="of --roofline (default h200)")
    add("--csv", type=Path, metavar="FILE", help="with --roofline: measured rows to print beside")
    bench.set_defaults(run=_bench)

    demo_parser = commands.add_parser("demo", help="train with and without the loss, on images")
    demo.add_arguments(demo_parser)
    demo_parser.set_defaults(run=demo.run)

    one = commands.add_parser("experiment", help="one of the sources' experiments, small")
    experiments.add_arguments(one)
    one.set_defaults(run=experiments.run)
    return parser


def _info(args: argparse.Namespace) -> int:
    from gpl_fast.tools import info

    found = info.collect()
    if args.check:
        found["check"] = info.check()
    print(json.dumps(info.plain(found), indent=2) if args.json else info.text(found))
    wrong = [row for row in found.get("check", []) if not row["ok"]]
    variables = [v for v in found["environment"].values() if not v["of_build"]]
    return int(bool(wrong) or any(v["error"] for v in variables))


def _bench(args: argparse.Namespace) -> int:
    of_roofline, others = ("gpu", "csv"), ("quick", "memory_gib")
    for name in others if args.roofline else of_roofline:
        if getattr(args, name):
            word = "is not for" if args.roofline else "needs"
            print(f"gpl-fast bench: --{name.replace('_', '-')} {word} --roofline", file=sys.stderr)
            return 2
    if args.mine is not None and math.prod(args.mine) > MOST_ELEMENTS:
        shape = " x ".join(map(str, args.mine))
        print(
            f"gpl-fast bench: --mine: got {shape}, expected at most {MOST_ELEMENTS} elements",
            file=sys.stderr,
        )
        return 2
    try:
        return _roofline(args) if args.roofline else _time(args)
    except (ValueError, OverflowError) as error:
        print(f"gpl-fast bench: {error}", file=sys.stderr)
        return 2


def _time(args: argparse.Namespace) -> int:
    from gpl_fast.tools import bench

    shapes = bench.QUICK if args.quick else bench.FULL
    if args.mine is not None:
        shapes = (tuple(args.mine),)
    report = bench.run(
        shapes, args.target, memory_gib=args.memory_gib, workspace_mb=args.workspace_mb or "auto"
    )
    print(bench.table(report))
    if args.json:
        bench.write(report, args.json)
    return 0


def _roofline(args: argparse.Namespace) -> int:
    from gpl_fast.tools import bench, launches, roofline, workload

    work = workload.WORKLOADS
    if args.mine is not None:
        activation = "sigmoid" if args.mine[1] == 1 else "softmax"
        work = {"mine": workload.Workload(tuple(args.mine), args.target, activation)}
    workspace = {None: launches.WORKSPACE_MB, "auto": None}.get(
        args.workspace_mb, args.workspace_mb
    )
    asked = args.gpu or "h200", work, args.csv, workspace
    print(roofline.report(*asked))
    if args.json:
        bench.write(roofline.as_data(*asked), args.json)
    return 0
