"""CUDA's kernels once more under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys

import emulate
import operators
import pytest

STAGES = ("conv_block_bwd", "conv_block_logits_bwd", "conv_block_counts", "conv_block_halo",
          "relu", "relu_pool", "softmax_bwd")  # fmt: skip
# Of blocks the border cases, of both sizes of elements; whole logits of bfloat16 alone.
BLOCKS = "test_sizes or test_strip or test_stride_2 or shared_memory or test_channels"
BLOCKS += " or (test_softmax and dtype1)"
CASES = f"(not conv_block or {BLOCKS}) and not dtype2 and not orders"


def library(name: str) -> str:
    command = [emulate.compiler(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
@pytest.mark.timeout(1800)  # minutes on a machine that has other work too
def test_borders(tmp_path):
    """Out of bounds, misaligned and undefined accesses."""
    names = (*emulate.CONVOLUTIONS, *emulate.FORWARD, *emulate.ELEMENTWISE)
    kernels = emulate.kernels(names, emulate.SANITIZED)
    built = operators.linked(kernels, tmp_path / "libsanitized.so", *emulate.SANITIZED)
    environment = os.environ | {
        "GPL_FAST_TEST_OPERATORS": str(built),
        "LD_PRELOAD": " ".join(map(library, ("libasan.so", "libubsan.so"))),
        # Every CUDA thread has its own stack; Python leaks on purpose.
        "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    files = [f"tests/stages/test_{stage}.py" for stage in STAGES]
    command = [sys.executable, "-m", "pytest", "-x", "-s", "-p", "no:cacheprovider", *files,
               "--implementation", "cuda", "-k", CASES]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=emulate.ROOT, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 200, done.stdout[-2000:]
