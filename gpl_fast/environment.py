"""The environment variables that the package and its build read, and what each may hold.

Nothing else in the package reads the environment. An empty variable is an unset one; a word that is
not known is an error. ``setup.py`` runs this file by itself, so it imports nothing of the package.
docs/environment.md is the table for people.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

PREFIX = "GPL_FAST_"
OF_TESTS = "GPL_FAST_TEST_"  # read by the test suite alone


def _is_program(text: str) -> bool:
    return shutil.which(text) is not None


def _is_count(text: str) -> bool:
    return re.fullmatch("0*[1-9][0-9]{0,8}", text) is not None


def _is_whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x > 0


def _is_power_of_two(x: Any) -> bool:
    return _is_whole(x) and x.bit_count() == 1


def _is_time(x: Any) -> bool:
    return _is_whole(x) or (isinstance(x, float) and math.isfinite(x) and x > 0)


@dataclass(frozen=True)
class Key:
    """What a row of a file may hold under a key, in words and as a test."""

    expected: str
    allows: Callable[[Any], bool]
    needed: bool = True


_WHOLE = Key("a whole number > 0", _is_whole)
_POWER = Key("a power of two", _is_power_of_two)
_TIME = Key("a number > 0", _is_time)
_FLAG = Key("true or false", lambda x: isinstance(x, bool))
_TEXT = Key("a text", lambda x: isinstance(x, str))
_DTYPE = Key("bfloat16, float16 or float32", lambda x: x in ("bfloat16", "float16", "float32"))
# `gpl_fast.tiles.Row`, `gpl_fast.fast.measured.Row` and `SoftmaxRow`.
TILES = {
    "arch": _WHOLE,
    "dtype": _DTYPE,
    "form": Key("plain, diff, listed or any", lambda x: x in ("plain", "diff", "listed", "any")),
    "tile": Key(
        "four powers of two",
        lambda x: isinstance(x, list) and len(x) == 4 and all(map(_is_power_of_two, x)),
    ),
    "warps": _POWER,
    "stages": _WHOLE,
    "descriptors": _FLAG,
    **dict.fromkeys(("c_in", "c_out", "c_out_max"), replace(_WHOLE, needed=False)),
    "measured": replace(_TEXT, needed=False),
}
GRADIENT = {
    "arch": _WHOLE,
    "dtype": _DTYPE,
    "first": _FLAG,
    **dict.fromkeys(("in_channels", "out_channels", "kernel_size", "stride"), _WHOLE),
    **dict.fromkeys(("kernel_ms", "aten_ms"), _TIME),
    "measured": _TEXT,
}
SOFTMAX = {key: GRADIENT[key] for key in ("arch", "measured")}
SOFTMAX |= {"classes": _WHOLE, "cuda_ms": _TIME, "triton_ms": _TIME}


@dataclass(frozen=True)
class Variable:
    """A variable: what it may hold, in words and by what that is checked (a list, a test, or the
    keys of a file's rows), and what it does."""

    name: str
    expected: str
    does: str
    allowed: Sequence[str] | Callable[[str], bool] | Mapping[str, Key] | None = None
    of_build: bool = False

    def error(self, text: str) -> str | None:
        """What it may hold instead of `text`, and why; None where it may hold that."""
        if isinstance(self.allowed, Mapping):
            try:
                _read_rows(text, self.allowed)
            except ValueError as error:
                return f"expected {self.expected}: {error}"
            return None
        if self.allowed is None:
            return None
        allows = self.allowed(text) if callable(self.allowed) else text in self.allowed
        return None if allows else f"expected {self.expected}"


def _of_build(name: str, expected: str, does: str, allowed: Any = None) -> Variable:
    return Variable(name, expected, does, allowed, of_build=True)


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
        Variable("GPL_FAST_SM90A", "0 or 1", "0: sm_90 takes the kernels of sm_80", ("0", "1")),
        Variable("GPL_FAST_TILES", _ROWS, "rows before tiles.json's, each for its own arch", TILES),
        Variable(
            "GPL_FAST_DATA_GRADIENT",
            _ROWS,
            "rows before those of fast/data_gradient.json",
            GRADIENT,
        ),
        Variable(
            "GPL_FAST_SOFTMAX_BWD", _ROWS, "rows before those of fast/softmax_bwd.json", SOFTMAX
        ),
        _of_build(
            "GPL_FAST_FORCE_CUDA",
            "0 or 1",
            "0: build the CPU operators alone; 1: no build without nvcc",
            ("0", "1"),
        ),
        _of_build("CUDACXX", "an nvcc that can be run", "the nvcc to build with", _is_program),
        _of_build(
            "CUDA_HOME", "the folder of a CUDA toolkit", "where to look for nvcc next, before PATH"
        ),
        _of_build(
            "TORCH_CUDA_ARCH_LIST", "entries like 8.0, 9.0a, 12.0+PTX", "the GPUs to build for"
        ),
        _of_build("MAX_JOBS", "a whole number > 0", "how many compilers run at once", _is_count),
        _of_build("CXX", "a C++17 compiler", "the compiler and linker"),
        _of_build("CXXFLAGS", "flags", "more flags of the C++ compiler"),
        _of_build("LDFLAGS", "flags", "more flags of the linker"),
        _of_build("NVCC_APPEND_FLAGS", "flags", "more flags of nvcc, read by itself"),
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
    if (error := VARIABLES[name].error(text)) is not None:
        raise ValueError(f"{name}: got {text!r}, {error}; or unset it")
    return text


def states() -> dict[str, dict[str, Any]]:
    """Of every variable: its value (None: unset), what is wrong with it or None, what is expected,
    and whether the build alone reads it."""
    found: dict[str, dict[str, Any]] = {}
    for name, variable in VARIABLES.items():
        text = os.environ.get(name)
        text = text if text and text.strip() else None
        found[name] = {
            "value": text,
            "error": None if text is None else variable.error(text),
            "expected": variable.expected,
            "of_build": variable.of_build,
        }
    return found


def rows(name: str) -> list[Any]:
    """The rows of the JSON file that a variable names; none where it is unset.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    path, keys = value(name), VARIABLES[name].allowed
    return [] if path is None or not isinstance(keys, Mapping) else _read_rows(path, keys)


def unknown() -> dict[str, str]:
    """Variables that are set and look like the package's own, each with the nearest known one."""
    own = [name for name in VARIABLES if name.startswith(PREFIX)]
    strange = [
        name
        for name in sorted(os.environ)
        if name.startswith(PREFIX) and not name.startswith(OF_TESTS) and name not in VARIABLES
    ]
    return {name: difflib.get_close_matches(name, own, 1, 0.0)[0] for name in strange}


def _read_rows(path: str, keys: Mapping[str, Key]) -> list[Any]:
    """The rows of a JSON file; ValueError where it holds no rows of such keys."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(error.strerror) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, list):
        raise ValueError("it holds no list")
    for i, row in enumerate(found):
        if (wrong := _wrong_in(row, keys)) is not None:
            raise ValueError(f"row {i + 1} of {len(found)}: {wrong}")
    return found


def _wrong_in(row: Any, keys: Mapping[str, Key]) -> str | None:
    if not isinstance(row, dict):
        return f"expected an object, got a {type(row).__name__}"
    for name in row:
        if name not in keys:
            near = difflib.get_close_matches(name, keys, 1, 0.0)[0]
            return f"nothing reads {name!r:.60}: did you mean {near}?"
    for name, key in keys.items():
        if name in row and not key.allows(row[name]):
            return f"{name}: expected {key.expected}, got {json.dumps(row[name]):.60}"
        if name not in row and key.needed:
            return f"{name} is missing, expected {key.expected}"
    return None
