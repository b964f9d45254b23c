"""The environment variables that the package and its build read, and what each may hold.

Nothing else in the package reads the environment. An empty variable is an unset one; a word that is
not known is an error. ``setup.py`` runs this file by itself, so it imports nothing of the package.
docs/environment.md is the table for people.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PREFIX = "GPL_FAST_"
OF_TESTS = "GPL_FAST_TEST_"  # read by the test suite alone


def _is_rows(text: str) -> bool:
    try:
        _read_rows(text)
    except (OSError, ValueError):
        return False
    return True


def _is_program(text: str) -> bool:
    return shutil.which(text) is not None


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) > 0


@dataclass(frozen=True)
class Variable:
    """A variable: what it may hold, in words and as a list or a test, and what it does."""

    name: str
    expected: str
    does: str
    allowed: Sequence[str] | Callable[[str], bool] | None = None  # None: the tool that reads it
    of_build: bool = False

    def allows(self, text: str) -> bool:
        """Whether it may hold `text`."""
        if self.allowed is None:
            return True
        return self.allowed(text) if callable(self.allowed) else text in self.allowed


_ROWS = "a JSON file, a list of rows as benchmarks/tune.py writes it"
VARIABLES = {
    v.name: v
    for v in (
        Variable(
            "GPL_FAST_BACKEND",
            "auto, fast or reference",
            'what `backend="auto"` means',
            ("auto", "fast", "reference"),
        ),
        Variable(
            "GPL_FAST_CHECK",
            "0 or 1",
            "1: values of targets on a GPU are checked too, which synchronises at each call",
            ("0", "1"),
        ),
        Variable(
            "GPL_FAST_CPU_CAPABILITY",
            "default, avx2 or avx512",
            "the widest instructions that the CPU operators may use",
            ("default", "avx2", "avx512"),
        ),
        Variable(
            "GPL_FAST_SM90A",
            "0 or 1",
            "0: a GPU of compute capability 9.0 takes the kernels of 8.0",
            ("0", "1"),
        ),
        Variable("GPL_FAST_TILES", _ROWS, "rows before those of kernels/tiles.json", _is_rows),
        Variable(
            "GPL_FAST_DATA_GRADIENT",
            _ROWS,
            "rows before those of chain/data_gradient.json",
            _is_rows,
        ),
        Variable(
            "GPL_FAST_FORCE_CUDA",
            "0 or 1",
            "0: build the CPU operators alone; 1: no build without nvcc",
            ("0", "1"),
            of_build=True,
        ),
        Variable(
            "CUDACXX",
            "an nvcc that can be run",
            "the nvcc to build with",
            _is_program,
            of_build=True,
        ),
        Variable(
            "CUDA_HOME",
            "the folder of a CUDA toolkit",
            "where to look for nvcc next, before PATH",
            of_build=True,
        ),
        Variable(
            "TORCH_CUDA_ARCH_LIST",
            "entries like 8.0, 9.0a, 12.0+PTX",
            "the GPUs to build for",
            of_build=True,
        ),
        Variable(
            "MAX_JOBS",
            "a whole number > 0",
            "how many compilers run at once",
            _is_count,
            of_build=True,
        ),
        Variable("CXX", "a C++17 compiler", "the compiler and linker", of_build=True),
        Variable("CXXFLAGS", "flags", "more flags of the C++ compiler", of_build=True),
        Variable("LDFLAGS", "flags", "more flags of the linker", of_build=True),
        Variable("NVCC_APPEND_FLAGS", "flags", "more flags of nvcc, read by itself", of_build=True),
    )
}


def value(name: str) -> str | None:
    """What a variable holds, None where it is unset or empty.

    Raises:
        ValueError: something that it may not hold.
    """
    text = os.environ.get(name)
    if text is None or not text.strip():
        return None
    variable = VARIABLES[name]
    if not variable.allows(text):
        raise ValueError(f"{name}: got {text!r}, expected {variable.expected}; or unset it")
    return text


def states() -> dict[str, dict[str, Any]]:
    """Of every variable: its value (None: unset), what is wrong with it or None, what is expected,
    and whether the build alone reads it."""
    found: dict[str, dict[str, Any]] = {}
    for name, variable in VARIABLES.items():
        text = os.environ.get(name)
        text = text if text and text.strip() else None
        wrong = text is not None and not variable.allows(text)
        found[name] = {
            "value": text,
            "error": f"expected {variable.expected}" if wrong else None,
            "expected": variable.expected,
            "of_build": variable.of_build,
        }
    return found


def rows(name: str) -> list[Any]:
    """The rows of the JSON file that a variable names; none where it is unset.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    path = value(name)
    return [] if path is None else _read_rows(path)


def unknown() -> dict[str, str]:
    """Variables that are set and look like the package's own, each with the nearest known one."""
    own = [name for name in VARIABLES if name.startswith(PREFIX)]
    strange = [
        name
        for name in sorted(os.environ)
        if name.startswith(PREFIX) and not name.startswith(OF_TESTS) and name not in VARIABLES
    ]
    return {name: difflib.get_close_matches(name, own, 1, 0.0)[0] for name in strange}


def _read_rows(path: str) -> list[Any]:
    found = json.loads(Path(path).read_text())
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError(f"{path}: expected a list of rows")
    return found
