"""How every kernel here is launched: on its tensors' device, on the current stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NONE, SOFTMAX, SIGMOID = 0, 1, 2
MAX, AVG = 0, 1


def launch(kernel: Any, grid: Sequence[int], x: Tensor, *args: Any, **meta: Any) -> None:
    """``kernel[grid](x, ...)`` on the device of `x`."""
    if x.is_cuda:
        with torch.cuda.device(x.device):
            kernel[tuple(grid)](x, *args, **meta)
    else:  # the interpreter
        kernel[tuple(grid)](x, *args, **meta)


def image_strides(*maps: Tensor | None) -> tuple[int, ...]:
    """From one image to the next, in elements; 0 for a missing map."""
    return tuple(0 if t is None else t.stride(0) for t in maps)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
