"""What the tests of operators share: who runs, random operands, room for large ones."""

from __future__ import annotations

import importlib
import os

import pytest
import torch

from gpl_fast import ops

# A library of the CUDA operators for CPU tensors: tests/cuda_on_cpu proves these tests with it.
EMULATED = os.environ.get("GPL_FAST_TEST_OPERATORS")
if EMULATED:
    torch.ops.load_library(EMULATED)


def implementation(kind, name, device):
    """A compiled operator, or a Triton kernel's launcher of the same arguments."""
    if kind == "compiled":
        if EMULATED:
            return getattr(torch.ops.gpl_fast_emulated, name).default
        if device.type == "cuda" and (why := ops.cuda_obstacle(device)) is not None:
            pytest.fail(why)
        key = device.type.upper()
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"gpl_fast::{name}", key):
            pytest.skip(f"{name} has no compiled kernel for {key}")
        return getattr(ops, name)
    if device.type != "cuda":
        pytest.skip("Triton's kernels have tests of their own without a GPU")
    return getattr(importlib.import_module("gpl_fast.kernels"), name)


def nan(*shape, dtype=torch.float32):
    return torch.full(shape, float("nan"), dtype=dtype)


def codes(n, h, w, c):
    winner = torch.randint(5, (n, h, w, c + c % 2)).byte()
    return winner[..., ::2] | winner[..., 1::2] << 4


def to(device, arguments):
    """Arguments on the device, a list of them or by name."""
    if isinstance(arguments, dict):
        return dict(zip(arguments, to(device, arguments.values()), strict=True))
    return [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]


def huge(device, big, small, bytes_needed):
    """`big` on a GPU with room for it, `small` on the CPU."""
    if device.type != "cuda":
        return small
    free = torch.cuda.mem_get_info(device)[0]
    if free < bytes_needed:
        pytest.skip(f"needs {bytes_needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free")
    return big
