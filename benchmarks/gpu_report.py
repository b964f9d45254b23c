"""One report of a machine with a GPU and no network, in the minutes that it has: is it right, how
fast is it, and as predicted?

``python benchmarks/gpu_report.py --minutes 8 --out FOLDER`` ends in time whatever happens. It
writes report.json and report.md, always whole ones, log.txt, and what was measured for
GPL_FAST_TILES and GPL_FAST_DATA_GRADIENT: after every step and while one runs. The truth that
matters most comes first. ``--dry`` runs every step on the CPU, at tiny sizes; ``--steps`` some of
them. The exit status is 1 if a step failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpu_tiles
import gpu_truth
import on_device
import report
import torch
from gpu_pages import markdown
from steps import BORN, GRACE, Steps, outcomes

ROOT = report.ROOT
# The most of eight minutes that a step may take, in seconds; the baselines take what is left.
LIMITS = {
    "library": 110.0,
    "truth": 80.0,
    "warm": 40.0,
    "times": 60.0,
    "tiles": 50.0,
    "choices": 30.0,
    "tests": 50.0,
    "sanitizers": 30.0,
    "baselines": 480.0,
    "plot": 30.0,
}
PLOT = 12.0  # of the last seconds
LOG_BYTES = 8 << 20
# Of benchmarks/tune.py, and the file that a variable of the environment may name.
CHOICES = {"backward": "data-gradient.json", "softmax": "softmax-bwd.json"}
TESTS = ("tests/gpu", "tests/stages")  # a process a file
# Few kernels each, named: a sanitizer is slow.
SANITIZED = {
    "memcheck": ("tests/gpu/test_operators.py", "small"),
    "racecheck": ("tests/stages/test_softmax_bwd.py", "check"),
    "synccheck": ("tests/stages/test_conv_block_bwd.py", "check"),
}


class Report:
    """Runs the steps one after the other and writes what there is into a folder."""

    def __init__(self, folder: Path, dry: bool, seconds: float) -> None:
        self.folder, self.dry, self.scale = folder, dry, seconds / 480.0
        self.cores = max(2, min(12, (os.cpu_count() or 1) - 2))  # a driver's threads have two
        environment = dict(os.environ)
        if dry:
            environment |= {"GPL_FAST_TEST_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)  # the package need not be installed
        environment["PYTHONUNBUFFERED"] = "1"
        for name in ("TORCHINDUCTOR", "TRITON"):
            folder_of = str(ROOT / ".cache" / name.lower())
            environment.setdefault(f"{name}_CACHE_DIR", folder_of)
        self.protocol = report.protocol()
        left = BORN + seconds - time.monotonic() - 2 * GRACE  # importing torch has taken some
        self.steps = Steps(left, self.write, ROOT, environment)

    # ---------------------------------------------------------------------------- the steps

    def all_steps(self, names: Sequence[str] = tuple(LIMITS)) -> None:
        """Those named, in their order."""
        for name in LIMITS:
            if name in names:
                getattr(self, f"_{name}")()

    def _run(self, name: str, commands: dict[str, list[str]], at_once: int = 1, **more: str) -> str:
        limit = LIMITS[name] * self.scale
        return self.steps.run(name, commands, limit, at_once, **more).status

    def _script(self, step: str, script: str, *words: str, case: str = "") -> list[str]:
        out = str(self.steps.output(step, case))
        dry = ["--dry"] * (self.dry and script != "gpu_library.py")
        return [sys.executable, f"benchmarks/{script}", *words, "--out", out, *dry]

    def _library(self) -> None:
        device = "cpu" if self.dry else "cuda:0"
        script = self._script("library", "gpu_library.py", "--device", device)
        self._run("library", {"": script})

    def _truth(self) -> None:
        cases = gpu_truth.DRY if self.dry else gpu_truth.CASES
        commands = {c: self._script("truth", "gpu_truth.py", c, case=c) for c in cases}
        self._run("truth", commands, self.cores)

    def _warm(self) -> None:
        """What the next steps launch is compiled by all cores."""
        count = len(on_device.few_cases() if self.dry else on_device.CASES)
        commands = {
            f"case{i}": self._script("warm", "on_device.py", "--warm", str(i), case=f"{i}")
            for i in range(1 if self.dry else count)
        }
        for i in range(1 if self.dry else len(gpu_tiles.SIZES)):
            words = ("gpu_tiles.py", "--layer", str(i))
            commands[f"tiles{i}"] = self._script("warm", *words, case=f"tiles{i}")
        self._run("warm", commands, self.cores)

    def _times(self) -> None:
        left = min(self.steps.left(), LIMITS["times"] * self.scale)
        words = ("--alone", "--seconds", f"{left - 4:.0f}")
        self._run("times", {"": self._script("times", "on_device.py", *words)})

    def _tiles(self) -> None:
        self._run("tiles", {"": self._script("tiles", "gpu_tiles.py")})

    def _choices(self) -> None:
        """Who is the faster: whose data gradient, which `softmax_bwd`, which forward of sm_90."""
        if self.dry:
            self.steps.skip("choices", "it needs a GPU")
            return
        words = ("--classes", "150", "19", "847", "--dtype", "bfloat16")
        commands = {
            case: self._script("choices", "tune.py", f"--{case}", *words, case=case)
            for case in CHOICES
        }
        commands["halo"] = self._script("choices", "halo.py", case="halo")
        self._run("choices", commands)

    def _tests(self) -> None:
        files = [path for folder in TESTS for path in sorted((ROOT / folder).glob("test_*.py"))]
        chosen = "gpu and check" if self.dry else "gpu and not slow"
        files = files[:3] if self.dry else files
        commands = {f.stem: self._pytest(str(f), "-m", chosen) for f in files}
        self._run("tests", commands, self.cores)
        found = self._outcomes()
        del found["names"]
        self.steps.done[-1].detail += f"; {found}"

    def _pytest(self, *words: str) -> list[str]:
        # By the folder's own settings: nothing but pytest has to be installed.
        settings = ["-c", "tests/gpu/pytest.ini", "-p", "no:cacheprovider"]
        settings += ["--implementation", "gpu"] * any("stages" in word for word in words)
        # A line a test, as it ends: what is cut off has told what it had.
        return [sys.executable, "-m", "pytest", "-vv", "--tb=short", *settings, *words]

    def _outcomes(self) -> dict[str, Any]:
        logs = sorted(self.steps.scratch.glob("tests-*.log"))
        return outcomes(path.read_text(errors="replace") for path in logs)

    def _sanitizers(self) -> None:
        tool = shutil.which("compute-sanitizer")
        if self.dry or tool is None:
            why = "it needs a GPU" if self.dry else "compute-sanitizer is not there"
            self.steps.skip("sanitizers", why)
            return
        commands = {}
        for name, (path, chosen) in SANITIZED.items():
            words = ["-k", chosen] if chosen != "check" else ["-m", "gpu and check"]
            check = [tool, "--tool", name, "--error-exitcode", "9"]
            commands[name] = [*check, *self._pytest(path, *words)]
        # Each tensor an allocation of its own: what is behind its end is nobody's.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        self._run("sanitizers", commands, len(commands), **alone)

    def _baselines(self) -> None:
        words = ("--seconds", f"{self.steps.left() - PLOT:.0f}")
        script = self._script("baselines", "on_device.py", *words)
        self.steps.run("baselines", {"": script}, self.steps.left() - PLOT)

    def _plot(self) -> None:
        """Of providers that ran beside one another."""
        if importlib.util.find_spec("matplotlib") is None:
            self.steps.skip("plot", "matplotlib is not there")
            return
        if not self._read("baselines").get("rows"):
            self.steps.skip("plot", "no baselines were measured")
            return
        rows, image = str(self.steps.output("baselines")), str(self.folder / "benchmark.png")
        self._run("plot", {"": [sys.executable, "benchmarks/plots.py", rows, image]})

    # --------------------------------------------------------------------------- the report

    def found(self) -> dict[str, Any]:
        """All that there is now."""
        read = self._read
        times, beside, tiles = read("times"), read("baselines"), read("tiles")
        rows = [{**row, "run": "alone"} for row in times.get("rows", [])]
        rows += [{**row, "run": "beside"} for row in beside.get("rows", [])]
        left_out = [f"{case} alone" for case in times.get("left_out", [])]
        left_out += beside.get("left_out", [])
        library = read("library")
        truth = [row for case in gpu_truth.CASES for row in self._read("truth", case, default=[])]
        return {
            "machine": library.get("name") or report.machine(),
            "dry": self.dry,
            "seconds": round(time.monotonic() - BORN, 1),
            "protocol": self.protocol,
            "library": library,
            "steps": [asdict(step) for step in self.steps.done],
            "truth": truth,
            "profiles": [p for p in times.get("profiles", []) if "seconds" in p],
            "benchmark": {"rows": rows, "left_out": left_out},
            "tiles": tiles.get("rows", []),
            "choices": {case: read("choices", case, default=[]) for case in CHOICES},
            "halo": read("choices", "halo").get("rows", []),
            "tests": self._outcomes(),
        }

    def write(self) -> None:
        """Every file, each whole."""
        found = self.found()
        put = report.replace_text
        put(self.folder / "report.json", json.dumps(found, indent=1) + "\n")
        put(self.folder / "report.md", markdown(found))
        put(self.folder / "log.txt", self.steps.log()[-LOG_BYTES:])
        if rows := self._read("tiles").get("tiles"):
            put(self.folder / "tiles.json", json.dumps(rows, indent=1) + "\n")
        for case, name in CHOICES.items():
            if rows := found["choices"][case]:
                put(self.folder / name, json.dumps(rows, indent=1) + "\n")

    def _read(self, step: str, case: str = "", default: Any = None) -> Any:
        """A command's JSON; `default` where there is none, or half of one."""
        try:
            return json.loads(self.steps.output(step, case).read_text())
        except (OSError, ValueError):
            return {} if default is None else default


def _stop(number: int, _frame: Any) -> None:
    raise SystemExit(128 + number)


def default_folder(args: argparse.Namespace) -> Path:
    """By the GPU's name; the driver is asked only where it has to be."""
    name = "dry" if args.dry else torch.cuda.get_device_name().lower().replace(" ", "-")
    if set(args.steps) != set(LIMITS):  # a whole report stays as it is
        name += "".join(f"-{step}" for step in args.steps)
    return ROOT / "benchmarks" / "results" / name


def main() -> int:
    """Write the report; 1 if a step failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder; default: benchmarks/results/<GPU>")
    parser.add_argument("--dry", action="store_true", help="every step on the CPU, tiny sizes")
    parser.add_argument("--minutes", type=float, default=8.0, help="default: 8")
    parser.add_argument("--steps", nargs="+", choices=LIMITS, default=list(LIMITS))
    args = parser.parse_args()
    if not (args.dry or torch.cuda.is_available()):
        parser.error("torch finds no CUDA device; --dry runs every step on the CPU")
    folder = (args.out or default_folder(args)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    made = Report(folder, args.dry, 60 * args.minutes)
    signal.signal(signal.SIGTERM, _stop)
    try:
        made.all_steps(args.steps)
    finally:
        made.steps.kill()
        made.steps.report()
        made.steps.close()
    shutil.rmtree(made.steps.scratch, ignore_errors=True)
    print(f"wrote {folder}")
    return int(any(step.status in ("failed", "timed out") for step in made.steps.done))


if __name__ == "__main__":
    sys.exit(main())
