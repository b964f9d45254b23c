"""The command line: ``gpl-fast info | bench | demo``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is returned."""
    parser = argparse.ArgumentParser(prog="gpl-fast", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    info = commands.add_parser("info", help="versions, devices, backends and their reasons")
    info.add_argument("--check", action="store_true", help="exit 1 if a backend is wrong")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)

    bench = commands.add_parser("bench", help="time and peak memory on this machine")
    bench.add_argument("--quick", action="store_true", help="small shapes, about a minute")
    bench.add_argument("--json", metavar="FILE", help="write the rows to FILE")
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
    from gpl_fast import bench

    report = bench.run(args.quick)
    print(bench.table(report))
    if args.json:
        bench.write(report, args.json)
    return 0
