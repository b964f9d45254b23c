"""`LPIPS` with its backward by CUDA's kernels on the CPU: the bounds of tests/cpu/test_lpips.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from gpl_fast import ops

sys.path.append(str(Path(__file__).parents[1] / "interpreter"))
import cpu_tests

if (reason := ops.load()) is not None:
    pytest.skip(reason, allow_module_level=True)

lpips_tests = cpu_tests.load("lpips")
TF32 = 2e-3  # the kernel's; ATen's on the CPU is float32


@pytest.mark.parametrize(("backend", "dtype", "kind"), lpips_tests.cells("fast", "cuda"))
def test_value_and_gradient_by_definition(emulated, backend, dtype, kind, decide, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    decide(kernels=True, backward="emulated", stages={"emulated": emulated})
    slack = TF32 if dtype == torch.float32 else 0.0
    lpips_tests.assert_exact(backend, dtype, kind, 9, slack=slack)


@pytest.mark.parametrize(
    ("backend", "dtype", "kind"),
    lpips_tests.cells("fast", "cuda", (torch.float32, torch.float16), ("dense", "features")),
)
def test_a_map_and_its_gradient_by_definition(emulated, backend, dtype, kind, decide, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    decide(kernels=True, backward="emulated", stages={"emulated": emulated})
    slack = TF32 if dtype == torch.float32 else 0.0
    lpips_tests.assert_exact(backend, dtype, kind, 9, slack=slack, spatial=True)
