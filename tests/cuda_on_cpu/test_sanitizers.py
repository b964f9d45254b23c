"""The border cases once more under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import emulate
import pytest

HERE = Path(__file__).resolve().parent
# Of both sizes of elements; whole logits of bfloat16 alone.
CASES = "(test_sizes or test_strip or test_stride_2 or shared_memory or test_channels"
CASES += " or (test_softmax and dtype1)) and not dtype2"


def library(name: str) -> str:
    compiler = os.environ.get("CXX", "c++")
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True)
    return found.stdout.strip()


@pytest.mark.timeout(1800)  # minutes on a machine that has other work too
def test_borders_under_sanitizers(tmp_path):
    objects = emulate.kernels(emulate.CONVOLUTIONS, emulate.SANITIZED)
    built = emulate.build(tmp_path, objects, "kernels.cpp", *emulate.SANITIZED)
    env = os.environ | {
        "GPL_FAST_TEST_KERNELS": str(built),
        "LD_PRELOAD": " ".join(map(library, ("libasan.so", "libubsan.so"))),
        # Every CUDA thread has its own stack; Python leaks on purpose.
        "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    files = [str(HERE / f"test_{name}.py") for name in ("conv_block_bwd", "logits_bwd")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-s",
        "-p",
        "no:cacheprovider",
        *files,
        "-k",
        CASES,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
