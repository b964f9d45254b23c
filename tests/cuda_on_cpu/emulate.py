"""Builds csrc/cuda for the CPU as Python modules."""

from __future__ import annotations

import concurrent.futures
import functools
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pybind11
import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CONVOLUTIONS = ("conv_block/conv_block_bwd.cu", "conv_block/conv_block_bwd_sm90.cu")
ELEMENTWISE = ("relu.cu", "relu_pool.cu", "softmax_bwd.cu")
MACHINE = ("-mavx2", "-mfma", "-mf16c")
FLAGS = ("-O2", *MACHINE)
SANITIZED = ("-O1", *MACHINE, "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1")
BINDING = ("-O0",)  # it hands on addresses and numbers; kernels' functions come from their objects


@functools.cache
def scratch() -> tuple[tempfile.TemporaryDirectory[str], Iterator[int]]:
    """A folder of objects, which goes with the process, and their numbers."""
    return tempfile.TemporaryDirectory(prefix="cuda_on_cpu_"), itertools.count()


@functools.cache
def headers() -> str:
    """The folder of CUDA's headers; nvcc may be a script that calls another one."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("the headers of CUDA are not there (no nvcc)", allow_module_level=True)
    dry = subprocess.run(
        [nvcc, "--dryrun", "-E", "-x", "cu", "none"], capture_output=True, text=True
    )
    top = re.search(r"^#\$ TOP=(.*)$", dry.stderr, re.M)
    assert top is not None, dry.stderr
    return f"{top[1]}/include"


@functools.cache
def compiled(source: Path, flags: tuple[str, ...], csrc: Path = CSRC) -> Path:
    """One source as an object, once for all builds; `csrc` may be a changed copy."""
    folder, numbers = scratch()
    target = Path(folder.name) / f"{source.stem}.{next(numbers)}.o"
    command = [
        os.environ.get("CXX", "c++"), "-std=c++20", "-fPIC", "-pthread", "-w", "-DCUDA_ON_CPU",
        f"-I{HERE}", f"-I{csrc}",
        f"-isystem{headers()}", f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_paths()['include']}", *flags,
        "-x", "c++", "-c", str(source), "-o", str(target),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def kernels(names: Iterable[str], flags: tuple[str, ...] = FLAGS, csrc: Path = CSRC) -> list[Path]:
    """Sources of csrc/cuda as objects."""
    return side_by_side([csrc / "cuda" / name for name in names], flags, csrc)


def side_by_side(sources: Iterable[Path], flags: tuple[str, ...], csrc: Path = CSRC) -> list[Path]:
    """Sources as objects, several compiled at a time."""
    scratch()  # made here: two threads would make two, and one of them would go
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda source: compiled(source, flags, csrc), sources))


def link(objects: Iterable[Path], target: Path, *flags: str) -> Path:
    """A shared library. Of a function that several objects have, the first one's is taken."""
    command = [os.environ.get("CXX", "c++"), "-shared", "-pthread", *map(str, objects), *flags]
    subprocess.run([*command, "-o", str(target)], check=True)
    return target


def build(folder: Path, objects: Iterable[Path], binding: str, *flags: str) -> Path:
    """Kernels and what binds them to Python as a module in `folder`."""
    objects = [*objects, compiled(HERE / binding, BINDING)]
    return link(objects, folder / f"{Path(binding).stem}.so", *flags)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
