"""The compiled library of a GPU that is here: the one that is carried along, or one built for it.

``python benchmarks/gpu_library.py --out library.json`` takes gpl_fast/libgpl_fast.so where it loads
and holds the GPU's kernels, and else builds it in place for that GPU alone, as

    GPL_FAST_FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 python setup.py -q build_ext --inplace

does on any machine with nvcc.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
QUERY = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit"


def obstacle(device: str) -> str | None:
    """Why the library that is there does not serve `device`, asked in a fresh process."""
    code = (
        "import torch; from gpl_fast import ops\n"
        f"print(ops.load() or ('{device}' != 'cpu' and ops.cuda_obstacle(torch.device('{device}')))"
        " or '')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or (done.stderr.strip()[-500:] if done.returncode else None)


def build() -> None:
    """For the first GPU alone, by all cores.

    Raises:
        subprocess.CalledProcessError: it cannot be built.
    """
    major, minor = torch.cuda.get_device_capability()
    architecture = {"GPL_FAST_FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env=os.environ | architecture, check=True)


def described(device: str) -> dict[str, Any]:
    """The machine, the library, and what they think of each other."""
    code = [sys.executable, "-m", "gpl_fast", "info", "--json"]
    info = subprocess.run(code, cwd=ROOT, capture_output=True, text=True).stdout
    smi = ""
    if device != "cpu" and shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        smi = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    found: dict[str, Any] = {"device": device, "driver": smi, "info": json.loads(info or "{}")}
    if device != "cpu":
        found["name"] = torch.cuda.get_device_name()
        found["capability"] = list(torch.cuda.get_device_capability())
    return found


def main() -> int:
    """0 where the library serves the device."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda:0")
    args = parser.parse_args()
    why, how = obstacle(args.device), "carried along"
    if why is not None and args.device != "cpu":
        print(f"built anew: {why}", flush=True)
        build()
        why, how = obstacle(args.device), "built here"
    args.out.write_text(json.dumps({**described(args.device), "obstacle": why, "library": how}))
    print(why or f"the library was {how}")
    return int(why is not None)


if __name__ == "__main__":
    sys.exit(main())
