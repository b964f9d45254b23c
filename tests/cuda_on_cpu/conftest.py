"""Walks whose backward is CUDA's, run on the CPU, after a forward of the CPU or of Triton."""

from __future__ import annotations

import interpreting
import operators
import pytest

interpreting.repaired()


@pytest.fixture(scope="session")
def emulated():
    """torch.ops.gpl_fast_emulated."""
    return operators.load().operators


@pytest.fixture(autouse=True)
def _as_on_a_gpu(decide):
    """Where a CPU stands for a GPU, convolutions are in the maps' dtype."""
    decide(arithmetic="own")
