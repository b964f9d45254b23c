"""Compiles csrc/cuda for the CPU. Objects are kept by what they were made of, so that the parts of
the test suite compile a source once."""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
KEPT = ROOT / "build" / "gpuless"
CONVOLUTIONS = ("conv_block/conv_block_bwd.cu", "conv_block/conv_block_bwd_sm90.cu")
FORWARD = ("conv_block/conv_block_fwd_sm90.cu",)
ELEMENTWISE = ("relu.cu", "relu_pool.cu", "softmax_bwd.cu", "binary_ce.cu")
MACHINE = ("-mavx2", "-mfma", "-mf16c")
FLAGS = ("-O2", *MACHINE)
SANITIZED = ("-O1", *MACHINE, "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1")


def compiler() -> str:
    return os.environ.get("CXX", "c++")


@functools.cache
def missing() -> str | None:
    """Why CUDA sources cannot be compiled here, or None."""
    if shutil.which("nvcc") is None:
        return "the headers of CUDA are not there (no nvcc)"
    return None


@functools.cache
def headers() -> str:
    """The folder of CUDA's headers; nvcc may be a script that calls another one."""
    if (reason := missing()) is not None:
        pytest.skip(reason, allow_module_level=True)
    dry = subprocess.run(
        ["nvcc", "--dryrun", "-E", "-x", "cu", "none"], capture_output=True, text=True
    )
    top = re.search(r"^#\$ TOP=(.*)$", dry.stderr, re.M)
    assert top is not None, dry.stderr
    return f"{top[1]}/include"


def digest(*parts: str | Path) -> str:
    """Of texts, and of files with their contents."""
    found = hashlib.sha256()
    for part in parts:
        content = part.read_bytes() if isinstance(part, Path) else b""
        found.update(f"{part}\0{len(content)}\0".encode() + content)
    return found.hexdigest()[:16]


def compiled(
    source: Path, flags: tuple[str, ...] = FLAGS, csrc: Path = CSRC, kept: Path = KEPT
) -> Path:
    """One source as an object in the folder `kept`; `csrc` may be a changed copy."""
    command = [
        compiler(), "-std=c++20", "-fPIC", "-pthread", "-w", "-DCUDA_ON_CPU", f"-I{HERE}",
        f"-I{csrc}", f"-isystem{headers()}", *flags, "-x", "c++", "-c", str(source),
    ]  # fmt: skip
    read = [source, *sorted(HERE.glob("*.h")), *sorted(csrc.rglob("*.h*")),
            *sorted(csrc.rglob("*.cuh"))]  # fmt: skip
    stem = f"{source.stem}.{digest(*command)}"
    target = kept / f"{stem}.{digest(*read)}.o"
    with alone(kept / stem):
        if not target.exists():
            for old in kept.glob(f"{stem}.*.o"):
                old.unlink()
            done = subprocess.run([*command, "-o", f"{target}.new"], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            Path(f"{target}.new").rename(target)
    return target


@contextlib.contextmanager
def alone(target: Path) -> Iterator[None]:
    """While no other process is at work on a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{target}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def kernels(
    names: Iterable[str], flags: tuple[str, ...] = FLAGS, csrc: Path = CSRC, kept: Path = KEPT
) -> list[Path]:
    """Sources of csrc/cuda as objects."""
    return side_by_side([csrc / "cuda" / name for name in names], flags, csrc, kept)


def side_by_side(
    sources: Iterable[Path], flags: tuple[str, ...], csrc: Path = CSRC, kept: Path = KEPT
) -> list[Path]:
    """Sources as objects, several compiled at a time."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda source: compiled(source, flags, csrc, kept), sources))


def link(objects: Iterable[Path], target: Path, *flags: str) -> Path:
    """A shared library. Of a function that several objects have, the first one's is taken."""
    command = [compiler(), "-shared", "-pthread", *map(str, objects), *flags]
    subprocess.run([*command, "-o", str(target)], check=True)
    return target
