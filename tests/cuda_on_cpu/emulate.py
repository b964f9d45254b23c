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
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1")


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
        f"-I{HERE}", f"-I{csrc}",
        f"-isystem{headers()}", f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_paths()['include']}", *flags,
        "-x", "c++", "-c", str(source), "-o", str(target),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def build(
    folder: Path, flags: tuple[str, ...], csrc: Path = CSRC, made: dict[str, Path] | None = None
) -> Path:
    """The kernels and their binding as one module in `folder`; `made`: objects, by source."""
    sources = {name: csrc / "cuda" / name for name in SOURCES}
    sources["binding.cpp"] = HERE / "binding.cpp"
    objects = {name: folder / f"{Path(name).stem}.o" for name in sources} | (made or {})
    missing = [name for name in sources if name not in (made or {})]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda n: compile_one(sources[n], objects[n], flags, csrc), missing))
    target = folder / "kernels.so"
    command = [os.environ.get("CXX", "c++"), "-shared", "-pthread", *flags]
    subprocess.run([*command, *map(str, objects.values()), "-o", str(target)], check=True)
    return target


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
