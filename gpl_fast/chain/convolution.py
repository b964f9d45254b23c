"""ATen's convolutions on NHWC maps."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

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


def _fixed_order() -> AbstractContextManager[None]:
    """Some of cuDNN's data gradients add in no fixed order."""
    cudnn = torch.backends.cudnn
    return cudnn.flags(
        enabled=cudnn.enabled,
        benchmark=cudnn.benchmark,
        deterministic=True,
        allow_tf32=cudnn.allow_tf32,
    )


def zero_outside(z: Tensor, lo: int, height: int) -> None:
    """Rows of `z`, whose first is row `lo` of an image of `height` rows, that lie outside of it."""
    if lo < 0:
        z[:, :-lo] = 0
    if lo + z.shape[1] > height:
        z[:, height - lo :] = 0
