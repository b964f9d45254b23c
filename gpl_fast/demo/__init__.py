"""``gpl-fast demo``: segmentation of real handwritten digits with and without the loss.

A teacher is trained, then for each seed two students that differ in the loss alone. What is needed
beyond torch (scikit-learn, pillow, matplotlib, rich) is imported by `run` only.
"""

from __future__ import annotations

import argparse
import sys

from gpl_fast.experiments import missing_packages
from gpl_fast.tools import arguments

_EXTRAS = {"sklearn": "scikit-learn", "PIL": "pillow", "matplotlib": "matplotlib", "rich": "rich"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the demo; None = the default of `experiment.Settings`."""
    add = parser.add_argument
    add("--steps", type=arguments.count, help="of each student (default 900)")
    add("--seeds", type=arguments.seed, nargs="+", help="of the students (default 0 1 2)")
    add("--device", help="cpu, cuda, cuda:1, ... (default cpu)")
    add("--backend", choices=("auto", "fast", "reference"), help="of the loss (default auto)")
    add(
        "--gpl-weight", type=arguments.weight,
        help="of the loss beside the cross-entropy (default 0.1)",
    )  # fmt: skip
    add(
        "--workspace-mb", type=arguments.workspace, metavar="MB",
        help="bound on the loss' transient memory, or auto (default)",
    )  # fmt: skip
    add("--teacher-steps", type=arguments.count, help="of the teacher (default 800)")
    add("--train-scenes", type=arguments.count, help="rendered for training (default 4096)")
    add("--test-scenes", type=arguments.count, help="rendered for the test (default 256)")
    add(
        "--out", type=arguments.output_folder, default="demo_out",
        help="folder of the report (default demo_out)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Train, show, write the report; 1 if a package, a device or a backend is missing, 2 if an
    option does not fit."""
    if args.seeds and len(set(args.seeds)) < len(args.seeds):
        print(
            f"gpl-fast demo: --seeds: got {args.seeds}, expected each once: the same run twice "
            "would pass for two",
            file=sys.stderr,
        )
        return 2
    missing = missing_packages(_EXTRAS)
    if missing:
        print(
            f'gpl-fast demo needs {", ".join(missing)}: pip install "gpl-fast[demo]"',
            file=sys.stderr,
        )
        return 1
    import torch
    from rich.console import Console

    from gpl_fast.backend import BackendUnavailable
    from gpl_fast.demo.experiment import Settings, run_experiment
    from gpl_fast.demo.live import print_result
    from gpl_fast.demo.report import write_report
    from gpl_fast.experiments.live import progress_bars, watch

    names = (
        name for name in Settings.__dataclass_fields__ if getattr(args, name, None) is not None
    )
    given = {name: getattr(args, name) for name in names}
    if "seeds" in given:
        given["seeds"] = tuple(given["seeds"])
    settings = Settings(**given)
    try:
        torch.zeros(1, device=settings.device).item()
    except (RuntimeError, AssertionError) as error:
        print(f"gpl-fast demo: --device {settings.device}: {error}", file=sys.stderr)
        return 1
    console = Console()
    try:
        with progress_bars(console) as progress:
            result = run_experiment(settings, lambda title, n: watch(progress, title, n))
    except BackendUnavailable as error:
        print(f"gpl-fast demo: {error}", file=sys.stderr)
        return 1
    except ValueError as error:  # a workspace that is too small
        print(f"gpl-fast demo: {error}", file=sys.stderr)
        return 2
    print_result(console, result)
    for path in write_report(result, args.out):
        console.print(path, highlight=False)
    return 0
