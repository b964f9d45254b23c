"""Memory that is not to be had, and what an internal check says of the sources."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from gpl_fast import ops

SCARCE = """
import resource, torch
from gpl_fast import ops
from gpl_fast.stages import ACTIVATIONS

torch.set_num_threads(1)
ops.load()
channels = 2**21
x = torch.zeros(1, channels, 1, 16)
lse = torch.zeros(1, 1, 16)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**24, size + 2**24))
softmax = ACTIVATIONS["softmax"]
ops.softmax_pack_fwd(
    x, activation=softmax, target_activation=softmax, temperature=1.0, row0=0, rows=1, core0=0,
    core_rows=1, lse=lse,
)
"""


def test_a_kernel_without_memory_says_so():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCARCE], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1, done.stderr
    assert "gpl_fast: out of memory" in done.stderr
    assert "bytes" in done.stderr


def test_no_path_of_the_machine_that_built_it():
    with pytest.raises(RuntimeError, match="z must be") as caught:
        ops.relu_fwd(torch.zeros(2, 3), y=torch.zeros(2, 3), mask=None)
    assert "csrc/operators/relu.cpp" in str(caught.value)
    root = str(ops.LIBRARY.parents[1])
    assert root not in str(caught.value)
    assert root.encode() not in ops.LIBRARY.read_bytes()
