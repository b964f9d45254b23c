"""Which option is tested by whom, in which dtype, against which target: read from the names of the
collected tests, whose words between dashes say it.

    python tests/matrix.py

prints how many tests each cell has, and ends with 1 where one is empty. A test may fill several
cells: ``[l1-channels-triton-bfloat16-labels]``.
"""

from __future__ import annotations

import collections
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]

OPTIONS = (
    "l1", "channels", "normalized", "weights", "binary", "multilabel", "several-ignored",
    "normalizer", "lpips",
)  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16", "float64")
KINDS = ("dense", "labels", "topk", "features")
# Where a backend's tests are; CUDA's have the forward of a CPU and CUDA's backward, on the CPU.
FOLDERS = {
    "reference": "tests/cpu",
    "cpu": "tests/cpu",
    "triton": "tests/interpreter",
    "cuda": "tests/cuda_on_cpu",
}
# Cells that cannot be, by backend and dtype, and what a loss says there; tests/cpu/test_matrix.py
# holds that it does.
CANNOT = dict.fromkeys(
    itertools.product(("cpu", "triton", "cuda"), ("float64",)), "float64 is the reference's"
)


class Cell(NamedTuple):
    option: str
    backend: str
    dtype: str
    kind: str


def cells() -> list[Cell]:
    """All that have to be filled."""
    every = map(Cell._make, itertools.product(OPTIONS, FOLDERS, DTYPES, KINDS))
    return [cell for cell in every if (cell.backend, cell.dtype) not in CANNOT]


def filled(names: Iterable[str]) -> Mapping[Cell, int]:
    """How many of the tests "path::name[words]" are in each cell."""
    found: collections.Counter[Cell] = collections.Counter()
    for name in names:
        path, _, rest = name.partition("::")
        words = re.search(r"\[(.*)\]$", rest)
        if words is None:
            continue
        text = f"-{words[1]}-"

        def said(known: Iterable[str], text: str = text) -> list[str]:
            return [word for word in known if f"-{word}-" in text]

        kinds = ["dense" if kind == "teacher" else kind for kind in said((*KINDS, "teacher"))]
        backends = [b for b in said(FOLDERS) if path.startswith(FOLDERS[b])]
        those = itertools.product(said(OPTIONS), backends, said(DTYPES), set(kinds))
        found.update(map(Cell._make, those))
    return found


def collected() -> list[str]:
    """Names of the tests in the folders: what interprets Triton's kernels in processes of their
    own."""
    running = []
    for folder in dict.fromkeys(FOLDERS.values()):
        interprets = {} if folder == "tests/cpu" else {"TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider",
                   "-W", "ignore", "-o", "addopts=", folder]  # fmt: skip
        running.append(
            subprocess.Popen(
                command, cwd=ROOT, env=os.environ | interprets, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    names: list[str] = []
    for process in running:
        out, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{process.args} ended with {process.returncode}:\n{out}")
        names += [line for line in out.splitlines() if "::" in line]
    return names


def table(found: Mapping[Cell, int]) -> str:
    """A row for each option and kind of target, a column for each backend and dtype."""
    columns = [(b, d) for b in FOLDERS for d in DTYPES if (b, d) not in CANNOT]
    lines = [
        " " * 26 + "".join(f"{b:>10}" for b, _ in columns),
        " " * 26 + "".join(f"{d:>10}" for _, d in columns),
    ]
    for option, kind in itertools.product(OPTIONS, KINDS):
        row = [Cell(option, b, d, kind) for b, d in columns]
        counts = "".join(f"{found.get(cell, 0):>10}" for cell in row)
        lines.append(f"{option:<16}{kind:<10}{counts}")
    lines += [f"{b} {d}: cannot be, {why}" for (b, d), why in CANNOT.items()]
    return "\n".join(lines)


def main() -> int:
    found = filled(collected())
    print(table(found))
    empty = [cell for cell in cells() if not found.get(cell)]
    for cell in empty:
        print(f"empty: {' '.join(cell)}")
    return int(bool(empty))


if __name__ == "__main__":
    sys.exit(main())
