"""One report of a machine with a GPU and no network: build, tests, sanitizer, benchmark.

``make gpu-report`` writes report.json, report.md, benchmark.png and the logs of every stage into
one folder, within `BUDGET` seconds, with the Python and the torch that are there. A stage that
fails leaves its log and does not keep the others from running; the exit status is 1 then.
``--dry`` runs every stage on the CPU, at tiny sizes, with the library that is built already;
``--stages build benchmark`` is ``make bench-gpu``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import report
import torch
from gpu_pages import markdown
from on_device import machine

ROOT = report.ROOT
BUDGET = 520.0
STAGES = (
    "build", "check", "layouts", "choices", "tests", "memcheck", "racecheck", "benchmark",
)  # fmt: skip
# The most that a stage may take of the budget; the benchmark takes what is left.
LIMITS = {
    "build": 180.0,
    "check": 60.0,
    "layouts": 60.0,
    "choices": 45.0,
    "tests": 150.0,
    "memcheck": 75.0,
    "racecheck": 75.0,
}
BENCHMARK = 150.0  # which is left at least
QUERY = "name,driver_version,memory.total,clocks.sm"
SMALL = "gpu and check"  # tests of a dry run, and of a sanitizer, which is slow
SANITIZED = ("-k", "not small_loss")  # of few kernels
SUITE = ("tests/stages", "--implementation", "gpu")
BLOCKS = [f"tests/stages/test_conv_block_{name}.py" for name in ("bwd", "logits_bwd")]


@dataclass
class Stage:
    """What became of a stage: "ok", "failed", "timed out" or "skipped", and why."""

    name: str
    status: str
    seconds: float
    detail: str
    command: str = ""


class Report:
    """Runs the stages one after the other into a folder."""

    def __init__(self, folder: Path, dry: bool, budget: float) -> None:
        self.folder, self.dry = folder, dry
        self.end = time.monotonic() + budget
        self.stages: list[Stage] = []
        self.environment = dict(os.environ)
        if dry:
            self.environment |= {"GPL_FAST_TEST_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment["PYTHONPATH"] = os.pathsep.join(paths)  # the package need not be installed
        caches = ROOT / ".cache"
        self.environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(caches / "inductor"))
        self.environment.setdefault("TRITON_CACHE_DIR", str(caches / "triton"))

    def run(self, name: str, command: list[str], more: dict[str, str] | None = None) -> Stage:
        """One command into ``<name>.log``; `more`: of the environment."""
        left = self.end - time.monotonic()
        limit = min(LIMITS[name], left - BENCHMARK) if name in LIMITS else left
        if limit <= 0:
            return self.skip(name, "no time was left")
        start, log = time.monotonic(), self.folder / f"{name}.log"
        with log.open("w") as out:
            running = subprocess.Popen(
                command, cwd=ROOT, env=self.environment | (more or {}), stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                status = "failed" if running.wait(limit) else "ok"
            except subprocess.TimeoutExpired:
                status = "timed out"
                os.killpg(running.pid, signal.SIGKILL)  # what a sanitizer has started, too
                running.wait()
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        stage = Stage(
            name, status, time.monotonic() - start, last[-1] if last else "", " ".join(command)
        )
        return self._keep(stage)

    def skip(self, name: str, why: str) -> Stage:
        """A stage that cannot run here."""
        return self._keep(Stage(name, "skipped", 0.0, why))

    def _keep(self, stage: Stage) -> Stage:
        self.stages.append(stage)
        print(
            f"{stage.name:<10} {stage.status:<9} {stage.seconds:6.1f}s  {stage.detail}", flush=True
        )
        return stage

    def all_stages(self, names: Sequence[str] = STAGES) -> dict[str, Any]:
        """The stages named, in turn; what report.json holds."""
        python = sys.executable
        if "build" in names:
            self._build()
        if "check" in names:
            self.run("check", [python, "-m", "gpl_fast", "info", "--check"])
        # Both kernels of conv_block_bwd, whose layouts no emulation can confirm, go first.
        right = "layouts" not in names or self._tests("layouts", *BLOCKS, *SUITE[1:]).status == "ok"
        if "choices" in names:
            self._choices(right)
        if "tests" in names:
            others = [f"--ignore={path}" for path in BLOCKS]
            self._tests("tests", "tests/gpu", *SUITE, *others)
        for tool in ("memcheck", "racecheck"):
            if tool in names:
                self._sanitizer(tool)
        measured: dict[str, Any] = {"rows": [], "left_out": []}
        if "benchmark" in names:
            measured = self._benchmark()
        found = json.loads(_output(python, "-m", "gpl_fast", "info", "--json") or "{}")
        return {
            "machine": machine("cpu" if self.dry else "cuda"),
            "dry": self.dry,
            "protocol": report.protocol(),
            "driver": _output("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"),
            "info": found,
            "stages": [asdict(stage) for stage in self.stages],
            "benchmark": measured,
        }  # fmt: skip

    def _build(self) -> None:
        loads = (
            "from gpl_fast import ops; assert ops.load() is None, ops.load(); print(ops.LIBRARY)"
        )
        build = ["setup.py", "-q", "build_ext", "--inplace"]
        self.run("build", [sys.executable, *(["-c", loads] if self.dry else build)])

    def _pytest(self, chosen: str, *arguments: str) -> list[str]:
        # By the folder's own settings: nothing but pytest has to be installed.
        settings = ["-c", "tests/gpu/pytest.ini", "-p", "no:cacheprovider"]
        return [sys.executable, "-m", "pytest", "-m", chosen, *settings, *arguments]

    def _tests(self, name: str, *which: str) -> Stage:
        xml = self.folder / f"{name}.xml"
        chosen = SMALL if self.dry else "gpu and not slow"
        stage = self.run(name, self._pytest(chosen, *which, f"--junitxml={xml}"))
        if xml.exists():
            counts, failed = outcomes(xml)
            stage.detail = ", ".join(f"{n} {what}" for what, n in counts.items())
            stage.detail += "; failed: " + ", ".join(failed) if failed else ""
        return stage

    def _choices(self, right: bool) -> None:
        """Which layers' data gradients are conv_block_bwd's: the stages after it go by that."""
        if self.dry or not right:
            self.skip("choices", "it needs a GPU" if self.dry else "conv_block_bwd is not right")
            return
        out = self.folder / "data_gradient.json"
        command = [sys.executable, "benchmarks/tune.py", "--backward", "--out", str(out)]
        command += ["--classes", "150", "19", "1", "847", "1203"]
        command += ["--dtype", "bfloat16", "float16", "float32"]
        if self.run("choices", command).status == "ok":
            self.environment["GPL_FAST_DATA_GRADIENT"] = str(out)

    def _sanitizer(self, tool: str) -> None:
        sanitizer = shutil.which("compute-sanitizer")
        if sanitizer is None:
            self.skip(tool, "compute-sanitizer is not there")
        elif self.dry:
            self.skip(tool, "it needs a GPU")
        else:
            check = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
            # Each tensor an allocation of its own: what is behind its end is nobody's.
            alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
            self.run(tool, [*check, *self._pytest(SMALL, "tests/gpu", *SUITE, *SANITIZED)], alone)

    def _benchmark(self) -> dict[str, Any]:
        out = self.folder / "rows.json"
        left = self.end - time.monotonic()
        command = [sys.executable, "benchmarks/on_device.py", "--out", str(out)]
        stage = self.run(
            "benchmark", [*command, "--seconds", f"{left - 20:.0f}", *["--dry"] * self.dry]
        )
        if not out.exists():
            return {"rows": [], "left_out": []}
        measured: dict[str, Any] = json.loads(out.read_text())
        timed = [row for row in measured["rows"] if "seconds_median" in row]
        stage.detail = f"{len(timed)} of {len(measured['rows'])} rows have times"
        if timed and importlib.util.find_spec("matplotlib"):
            import plots

            plots.workloads(timed, self.folder / "benchmark.png")
        return measured


def outcomes(xml: Path) -> tuple[dict[str, int], list[str]]:
    """How many tests passed, failed and were skipped, and the names of those that failed."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failed = []
    for case in ElementTree.parse(xml).iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            counts["failed"] += 1
            failed.append(f"{case.get('name')}")
        else:
            counts["skipped" if "skipped" in kinds else "passed"] += 1
    return counts, failed


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def main() -> int:
    """Write the report; 1 if a stage failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<GPU>")
    parser.add_argument("--dry", action="store_true", help="every stage on the CPU, tiny sizes")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="default: all")
    args = parser.parse_args()
    if not (args.dry or torch.cuda.is_available()):
        parser.error("torch finds no CUDA device; --dry runs every stage on the CPU")
    name = "dry" if args.dry else machine("cuda").lower().replace(" ", "-")
    if set(args.stages) != set(STAGES):  # a whole report stays as it is
        name += "".join(f"-{stage}" for stage in args.stages)
    folder = (args.out or ROOT / "benchmarks" / "results" / name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    stages = Report(folder, args.dry, args.budget)
    found = stages.all_stages(args.stages)
    (folder / "report.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "report.md").write_text(markdown(found))
    print(f"wrote {folder}")
    return int(any(stage.status in ("failed", "timed out") for stage in stages.stages))


if __name__ == "__main__":
    sys.exit(main())
