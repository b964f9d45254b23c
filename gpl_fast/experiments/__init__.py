"""``gpl-fast experiment NAME``: the sources' experiments, small, one command each.

Each is a module of this package with an `EXPERIMENT` of `frame.Experiment`; `NAMES` lists them.
What is needed beyond torch is imported by `run` only.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from gpl_fast.tools import arguments

if TYPE_CHECKING:
    from rich.console import Console

    from gpl_fast.experiments.frame import Experiment, Outcome, Settings

NAMES = ("toy", "shift", "variance", "probe")
_PACKAGES = {
    "sklearn": "scikit-learn", "skimage": "scikit-image", "matplotlib": "matplotlib",
    "rich": "rich",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options; None = the experiment's own default."""
    add = parser.add_argument
    add("name", nargs="?", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    add("--list", action="store_true", help="the experiments and their questions; runs nothing")
    add("--seeds", type=arguments.seed, nargs="+", help="of the runs")
    add("--steps", type=arguments.count, help="of each run: trials, pixels, layers or updates")
    add("--quick", action="store_true", help="few seeds, few steps: does it work")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default cpu)")
    add(
        "--out", type=arguments.output_folder, metavar="DIR",
        help="folder of the report (default NAME_out)",
    )  # fmt: skip


def experiment(name: str) -> Experiment:
    """The experiment of this name."""
    found: Experiment = importlib.import_module(f"gpl_fast.experiments.{name}").EXPERIMENT
    return found


def run(args: argparse.Namespace) -> int:
    """Run one and write its report; 1 if a package or the device is missing, 2 if an option does
    not fit."""
    if args.list:
        for name in NAMES:
            e = experiment(name)
            print(f"{name:<10} {e.question} ({e.steps} {e.unit}, about {e.seconds} s)")
        return 0
    if args.name is None:
        return _refused(f"which one? {', '.join(NAMES)}", 2)
    if args.seeds and len(set(args.seeds)) < len(args.seeds):
        return _refused(f"--seeds: got {args.seeds}, expected each once", 2)
    if missing := missing_packages(_PACKAGES):
        return _refused(f'needs {", ".join(missing)}: pip install "gpl-fast[experiments]"', 1)
    import torch
    from rich.console import Console

    from gpl_fast.experiments.live import progress_bars, watch

    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        return _refused(f"--device {args.device}: {error}", 1)
    e, console = experiment(args.name), Console()
    settings = e.settings(args.seeds, args.steps, args.quick, args.device)
    expected = "seconds" if args.quick else f"about {e.seconds} s at the default settings"
    console.print(f"{e.question} {expected}.", highlight=False)
    start = time.perf_counter()
    try:
        with progress_bars(console) as progress:
            outcome = e.run(settings, lambda title, n: watch(progress, title, n, "score"))
    except ValueError as error:  # a number of steps that an experiment cannot take
        return _refused(str(error), 2)
    _show(console, outcome)
    out = args.out or Path(f"{args.name}_out")
    for path in _write(args.name, e, settings, outcome, time.perf_counter() - start, out):
        console.print(path, highlight=False)
    return 0


def _show(console: Console, outcome: Outcome) -> None:
    from rich.table import Table

    for table in outcome.tables:
        shown = Table(title=table.title)
        for i, column in enumerate(table.header):
            shown.add_column(column, justify="right" if i else "left")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    console.print(outcome.verdict, highlight=False)


def _write(
    name: str, e: Experiment, settings: Settings, outcome: Outcome, seconds: float, out: Path
) -> list[Path]:
    from gpl_fast.experiments import report

    seeds = " ".join(map(str, settings.seeds))
    command = f"gpl-fast experiment {name} --seeds {seeds} --steps {settings.steps}"
    command += f" --device {shlex.quote(settings.device)}" + " --quick" * settings.quick
    data = {
        "experiment": name,
        "command": command,
        "settings": asdict(settings),
        "environment": report.environment(),
        "protocol": outcome.protocol,
        "verdict": outcome.verdict,
        "tables": [asdict(table) for table in outcome.tables],
        **outcome.data,
        "seconds": seconds,
    }
    return report.write(
        out, data, outcome.figure, title=f"gpl-fast experiment {name}", heading=e.title,
        verdict=outcome.verdict, tables=[report.html_table(t) for t in outcome.tables],
        protocol=[e.question, *outcome.protocol, f"Command: {command}"],
        closing=f"{seconds:.0f} s in all.",
    )  # fmt: skip


def missing_packages(packages: Mapping[str, str]) -> list[str]:
    """Distributions, by the module that each brings, that cannot be imported."""
    missing = []
    for module, distribution in packages.items():
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(distribution)
    return missing


def _refused(why: str, status: int) -> int:
    print(f"gpl-fast experiment: {why}", file=sys.stderr)
    return status
