"""ATen's convolutions on NHWC maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


def conv(y: Tensor, w: Tensor, stride: int, pad: tuple[int, int]) -> Tensor:
    """NHWC -> NHWC, `pad` = rows and columns of zeros on each side."""
    z = torch.conv2d(y.permute(0, 3, 1, 2), w, None, stride, pad)
    return z.permute(0, 2, 3, 1).contiguous()


def conv_transpose(
    dz: Tensor, w: Tensor, stride: int, pad: tuple[int, int], extra: Sequence[int]
) -> Tensor:
    """Eq. (4), NHWC -> NHWC."""
    with _fixed_order() if dz.is_cuda else nullcontext():
        dy = torch.conv_transpose2d(dz.permute(0, 3, 1, 2), w, None, stride, pad, extra)
    return dy.permute(0, 2, 3, 1).contiguous()


@contextmanager
def _fixed_order() -> Iterator[None]:
    """Some of cuDNN's data gradients add in no fixed order."""
    cudnn = torch.backends.cudnn
    before, cudnn.deterministic = cudnn.deterministic, True
    try:
        yield
    finally:
        cudnn.deterministic = before


def tf32_allowed() -> bool:
    """Whether PyTorch's own convolutions of float32 run as TF32.

    ``allow_tf32`` sets this too, but raises where it is read after ``fp32_precision`` was set.
    """
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return bool(conv.fp32_precision == "tf32")


def zero_outside(z: Tensor, lo: int, height: int) -> None:
    """Rows of `z`, whose first is row `lo` of an image of `height` rows, that lie outside of it."""
    if lo < 0:
        z[:, :-lo] = 0
    if lo + z.shape[1] > height:
        z[:, height - lo :] = 0
