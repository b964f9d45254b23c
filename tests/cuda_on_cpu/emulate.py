"""Builds csrc/cuda for the CPU as a Python module."""

from __future__ import annotations

import concurrent.futures
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11
import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
SOURCES = ("conv_block_bwd.cu", "conv_block_bwd_sm90.cu")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize=alignment", "-g1")


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


def compile_one(source: Path, target: Path, flags: tuple[str, ...], csrc: Path = CSRC) -> Path:
    """One source to an object; `csrc` may be a changed copy."""
    command = [
        os.environ.get("CXX", "c++"), "-std=c++20", "-fPIC", "-pthread", "-w", "-DCUDA_ON_CPU",
        f"-DGPL_FAST_TEST_MODULE={target.parent.name}", f"-I{HERE}", f"-I{csrc}",
        f"-isystem{headers()}", f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_paths()['include']}", *flags,
        "-x", "c++", "-c", str(source), "-o", str(target),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def build(
    folder: Path, flags: tuple[str, ...], csrc: Path = CSRC, sources: tuple[str, ...] = SOURCES
) -> Path:
    """The kernels and their binding as one module in `folder`, whose name it takes."""
    jobs = {folder / f"{Path(name).stem}.o": csrc / "cuda" / name for name in sources}
    jobs[folder / "binding.o"] = HERE / "binding.cpp"
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: compile_one(job[1], job[0], flags, csrc), jobs.items()))
    target = folder / f"{folder.name}.so"
    command = [os.environ.get("CXX", "c++"), "-shared", "-pthread", *flags, *map(str, objects)]
    subprocess.run([*command, "-o", str(target)], check=True)
    return target


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
