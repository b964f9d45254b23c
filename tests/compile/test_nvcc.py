"""What nvcc makes of conv_block_bwd for each GPU: spills, registers, instructions."""

from __future__ import annotations

import collections
import functools
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

if (nvcc := shutil.which("nvcc")) is None:
    pytest.skip("nvcc is not there", allow_module_level=True)

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
FILES = ("conv_block_bwd", "conv_block_bwd_sm90")
SECONDS = 600  # for all of it, also on a busy machine
STATIC_SHARED = 1024  # bytes at most: the barriers of sm_90a
OPCODES = r"\b(HMMA|LDSM|LDGSTS|HGMMA|UTMALDG|LDL|STL|RED|ATOMG)\b"


def cuobjdump() -> str:
    """From the toolkit or Triton's wheel."""
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton")
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return found


@functools.cache
def compiled(folder: Path) -> tuple[dict[str, str], float]:
    """What ptxas says of each file, and the seconds of all; objects stay in `folder`."""
    said, start = {}, time.monotonic()
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    for name in FILES:
        command = [nvcc, "-std=c++17", "-O3", "--threads", "2", "-Xptxas", "-v", *targets, "-c",
                   str(CUDA / f"{name}.cu"), "-o", str(folder / f"{name}.o")]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said[name] = done.stderr
    return said, time.monotonic() - start


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("nvcc")


@functools.cache
def instructions(folder: Path, name: str, architecture: str) -> collections.Counter[str]:
    compiled(folder)
    command = [cuobjdump(), "-sass", "-arch", f"sm_{architecture}", str(folder / f"{name}.o")]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return collections.Counter(re.findall(OPCODES, sass))


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_no_spills(folder, name):
    said, seconds = compiled(folder)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", said[name])
    kernels = {"conv_block_bwd": 23, "conv_block_bwd_sm90": 12}[name]
    assert len(frames) == kernels * len(ARCHITECTURES)
    assert set(frames) == {("0", "0")}
    assert seconds < SECONDS


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_registers_and_static_shared_memory(folder, name):
    said = compiled(folder)[0][name]
    registers = [int(r) for r in re.findall(r"Used (\d+) registers", said)]
    # Threads of a block times registers stay within the 64 Ki of a multiprocessor.
    assert max(registers) <= (255 if name == "conv_block_bwd" else 168)
    assert all(int(b) <= STATIC_SHARED for b in re.findall(r"(\d+) bytes smem", said))


@pytest.mark.slow
def test_products_of_sm90a_are_not_serialized(folder):
    assert "serialized" not in compiled(folder)[0]["conv_block_bwd_sm90"]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tensor_core_and_copy_instructions(folder, architecture):
    found = instructions(folder, "conv_block_bwd", architecture)
    assert min(found["HMMA"], found["LDSM"], found["LDGSTS"]) > 0
    assert not found["RED"] + found["ATOMG"]  # deterministic


@pytest.mark.slow
def test_sm90a_has_wgmma_and_tma(folder):
    found = instructions(folder, "conv_block_bwd_sm90", "90a")
    assert min(found["HGMMA"], found["UTMALDG"], found["LDSM"]) > 0
    assert not found["RED"] + found["ATOMG"]
