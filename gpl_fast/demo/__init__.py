"""``gpl-fast demo``: segmentation of real handwritten digits with and without the loss.

A teacher is trained, then for each seed two students that differ in the loss alone. What is needed
beyond torch (scikit-learn, pillow, matplotlib, rich) is imported by `run` only.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

_EXTRAS = {"sklearn": "scikit-learn", "PIL": "pillow", "matplotlib": "matplotlib", "rich": "rich"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the demo; None = the default of `experiment.Settings`."""
    add = parser.add_argument
    add("--steps", type=_positive, help="of each student (default 900)")
    add("--seeds", type=int, nargs="+", help="of the students (default 0 1 2)")
    add("--device", help="cpu, cuda, cuda:1, ... (default cpu)")
    add("--backend", choices=("auto", "fast", "reference"), help="of the loss (default auto)")
    add("--gpl-weight", type=float, help="of the loss beside the cross-entropy (default 0.1)")
    add("--teacher-steps", type=_positive, help="of the teacher (default 800)")
    add("--train-scenes", type=_positive, help="rendered for training (default 4096)")
    add("--test-scenes", type=_positive, help="rendered for the test (default 256)")
    add("--out", type=Path, default=Path("demo_out"), help="folder of the report")


def run(args: argparse.Namespace) -> int:
    """Train, show, write the report; 1 if a package, a device or a backend is missing."""
    missing = missing_packages()
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
    from gpl_fast.demo.live import print_result, progress_bars, watch
    from gpl_fast.demo.report import write_report

    names = (
        name for name in Settings.__dataclass_fields__ if getattr(args, name, None) is not None
    )
    given = {name: getattr(args, name) for name in names}
    if "seeds" in given:
        given["seeds"] = tuple(given["seeds"])
    settings = Settings(**given)
    try:
        torch.empty(0, device=settings.device)
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
    print_result(console, result)
    for path in write_report(result, args.out):
        console.print(path, highlight=False)
    return 0


def missing_packages() -> list[str]:
    """Distributions of the ``demo`` extra that cannot be imported."""
    missing = []
    for module, distribution in _EXTRAS.items():
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(distribution)
    return missing


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected at least 1")
    return value
