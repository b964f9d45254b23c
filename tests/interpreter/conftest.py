"""Kernels run by Triton's interpreter on CPU tensors; such a process can no longer compile."""

from __future__ import annotations

import os
import sys

import pytest

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError(
        "tests/interpreter needs a process of its own, but Triton is already imported to compile; "
        "run `pytest tests/interpreter` alone"
    )
os.environ["TRITON_INTERPRET"] = "1"

import program_order
import repairs
import sanitizer as checks
import torch

repairs.install()
program_order.install()
checks.install()


@pytest.fixture(autouse=True)
def sanitizer():
    """What kernels did in this test; every launch is checked whether a test asks or not."""
    checks.current.forget()
    yield checks.current
    checks.current.forget()


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """`torch.empty` is NaN, or the largest integer, as it may be on a GPU."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
