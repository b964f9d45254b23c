"""How every kernel here is launched: on its tensors' device, on the current stream."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import copy_context
from typing import Any

import torch
import triton
from torch import Tensor

NONE, SOFTMAX, SIGMOID = 0, 1, 2
MAX, AVG = 0, 1
CLASSES = 64  # of a tile of logits, at most


def launch(kernel: Any, grid: Sequence[int], x: Tensor, *args: Any, **meta: Any) -> None:
    """``kernel[grid](x, ...)`` on the device of `x`."""
    if not x.is_cuda:  # the interpreter
        kernel[tuple(grid)](x, *args, **meta)
        return
    with torch.cuda.device(x.device):
        # Triton's allocator is a context variable: one that the caller has set stays.
        copy_context().run(_launch, kernel[tuple(grid)], x, *args, **meta)


def _launch(kernel: Any, *args: Any, **meta: Any) -> None:
    triton.set_allocator(_allocate)
    kernel(*args, **meta)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for tensor descriptors: PyTorch's, so that a CUDA graph owns what it captures."""
    return torch.empty(size, device="cuda", dtype=torch.int8)


def image_strides(*maps: Tensor | None) -> tuple[int, ...]:
    """From one image to the next, in elements; 0 for a missing map."""
    return tuple(0 if t is None else t.stride(0) for t in maps)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
