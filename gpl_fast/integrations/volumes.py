"""Losses of images on volumes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class VolumeLoss(nn.Module):
    """A loss of images on volumes (N, C, D, H, W), slice by slice: its images are the N·D slices.

    Args:
        loss: any loss of this package, or of another one, called ``loss(pred, target, ...)``.
        dim: the dimension that slices go along, 2, 3 or 4: D, H or W.

    Shape:
        Tensors (N, C, D, H, W) become (N·D, C, H, W), labels and masks (N, D, H, W) become
        (N·D, H, W); with reduction "none" the value is (N·D,). What is no tensor is passed on.
    """

    def __init__(self, loss: nn.Module, dim: int = 2) -> None:
        super().__init__()
        if dim not in (2, 3, 4):
            raise ValueError(f"dim: got {dim}, expected 2, 3 or 4 of (N, C, D, H, W)")
        self.loss, self.dim = loss, dim

    def forward(self, *maps: object, **words: object) -> Any:
        """`loss` of the slices of all these tensors."""
        sliced = {name: self.slices(word) for name, word in words.items()}
        return self.loss(*map(self.slices, maps), **sliced)

    def slices(self, x: Any) -> Any:
        """The slices of a volume as images."""
        if not isinstance(x, Tensor) or x.dim() not in (4, 5):
            return x
        return x.movedim(self.dim - (x.dim() == 4), 1).flatten(0, 1)
