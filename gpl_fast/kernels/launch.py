"""How every kernel here is launched: on its tensors' device, on the current stream."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import copy_context
from typing import Any

import torch
import triton
from torch import Tensor

from gpl_fast.stages import ACTIVATIONS, CRITERIA, POOLS

# Kernels compare names.
ACTIVATION_NAMES = {code: name for name, code in ACTIVATIONS.items()}
POOL_NAMES = {code: name for name, code in POOLS.items()}
CRITERION_NAMES = {code: name for name, code in CRITERIA.items()}

# `triton.jit` asks the same of each kernel when it is imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)


def launch(kernel: Any, grid: Sequence[int], x: Tensor, *args: Any, **meta: Any) -> None:
    """``kernel[grid](x, ...)`` on the device of `x`."""
    if INTERPRETED:
        kernel[tuple(grid)](x, *args, **meta)
        return
    with torch.cuda.device(x.device):
        if meta.get("DESCRIPTORS"):
            # Triton's allocator is a context variable: one that the caller has set stays.
            copy_context().run(_launch_with_memory, kernel[tuple(grid)], x, *args, **meta)
        else:
            kernel[tuple(grid)](x, *args, **meta)


def _launch_with_memory(kernel: Any, *args: Any, **meta: Any) -> None:
    triton.set_allocator(_allocate)
    kernel(*args, **meta)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for tensor descriptors: PyTorch's, so that a CUDA graph owns what it captures."""
    return torch.empty(size, device="cuda", dtype=torch.int8)


def image_strides(*maps: Tensor | None) -> tuple[int, ...]:
    """From one image to the next, in elements; 0 for a missing map."""
    return tuple(0 if t is None else t.stride(0) for t in maps)


def rows_apart(of: Tensor | None) -> int | None:
    """From one image to the next of (N, rows, W, C), which may be rows of taller images."""
    return None if of is None else of.stride(0) // max(of.shape[2] * of.shape[3], 1)


def pair(low: int, high: int) -> int:
    """Two numbers of 32 bits, the higher one not negative, as one argument: each costs time."""
    return high << 32 | low & 0xFFFFFFFF


def blocks_of_maps(channels: int) -> tuple[int, int]:
    """Pixels and channels of an elementwise program: 2048 elements, whole bytes of masks."""
    block_c = min(max(triton.next_power_of_2(channels), 8), 128)
    return max(2048 // block_c, 1), block_c


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
