"""The recipes of examples/: as modules, and as the commands that users run."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

from run import ROOT

EXAMPLES = ROOT / "examples"


def recipe(name: str) -> ModuleType:
    """The module of ``examples/<name>.py``."""
    spec = spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_recipe(name: str, *arguments: str, processes: int = 0, seconds: float = 120) -> str:
    """What ``python examples/<name>.py ARGUMENTS`` prints; by torchrun with that many processes."""
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(ROOT / "tests" / "frameworks" / "run.py"), str(EXAMPLES / f"{name}.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout
