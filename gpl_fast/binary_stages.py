"""The seam's part of the binary cross-entropy; as `gpl_fast.stages`, which has all others.

Labels are (N, C, H, W) uint8, planes contiguous: 0, 1, or 2 = this element does not count. A label
y is smoothed to y (1 − ε) + ε / 2.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class BinaryBackwardStages(Protocol):
    """What a CPU, CUDA and Triton offer."""

    def binary_ce_bwd(
        self,
        x: Tensor,  # (N, C, H, W), any strides
        *,
        labels: Tensor, row0: int, rows: int,
        dx: Tensor,  # as x: to rows of the image in the strip the gradient is added
        clear: bool,  # dx becomes 0 where an element does not count
        label_smoothing: float = 0.0,
        ce_scale: Tensor | None = None,  # (N,) float32; None: nothing is added
        class_weight: Tensor | None = None,  # (C,) float32
        pos_weight: Tensor | None = None,  # (C,) float32, of what is labelled 1
        ce_mask: Tensor | None = None,  # (N, H, W) float32, by which a pixel's elements count
    ) -> None:  # fmt: skip
        """The gradient of `binary_ce_fwd`'s losses, behind `softmax_bwd`."""


class BinaryStages(BinaryBackwardStages, Protocol):
    """What a CPU and Triton offer."""

    def binary_ce_fwd(
        self,
        x: Tensor,  # (N, C, H, W), any strides
        *,
        labels: Tensor, row0: int, rows: int,
        ce_rows: Tensor,  # (N, H, 2) float64: Σ losses, Σ elements that count, each by ce_mask
        label_smoothing: float = 0.0, class_weight: Tensor | None = None,
        pos_weight: Tensor | None = None, ce_mask: Tensor | None = None,
    ) -> None:  # fmt: skip
        """The binary cross-entropy with logits of each row in the strip."""
