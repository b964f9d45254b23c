"""MONAI: labels as its transforms and `DiceCELoss` have them, MetaTensors, volumes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpl_fast import segmentation
from gpl_fast.integrations.volumes import VolumeLoss
from gpl_fast.targets.values import may_look


class SegmentationLoss(segmentation.SegmentationLoss):
    """`gpl_fast.SegmentationLoss`, called as MONAI calls its losses, ``loss(logits, labels)``; what
    `monai.losses.DeepSupervisionLoss` needs.

    Shape:
        Logits (N, C, H, W), or volumes (N, C, D, H, W), which go through slice by slice; labels
        are classes (N, 1, H, W) of any dtype, or one-hot maps (N, C, H, W), of volumes with their
        D. A pixel whose one-hot map is 0 in all channels is ignored, as `ignore_index` is.
    Raises:
        ValueError: labels that are no classes, or maps that are not one-hot, as interpolation makes
            them: looked at on the CPU. Else as `gpl_fast.SegmentationLoss`.
    """

    def forward(self, logits: Tensor, labels: Tensor, *args: Any, **words: Any) -> Any:
        """The total; further arguments as of `gpl_fast.SegmentationLoss`."""
        logits, labels = _plain(logits), _plain(labels)
        if logits.dim() == 5 == labels.dim():
            return VolumeLoss(self)(logits, labels, *args, **words)
        return super().forward(logits, self._classes(labels), *args, **words)

    def count(self, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """As `gpl_fast.SegmentationLoss.count`, of labels as `forward` takes them."""
        if labels.dim() == 5:
            labels, mask = map(VolumeLoss(self).slices, (labels, mask))
        return super().count(self._classes(_plain(labels)), mask)

    def _classes(self, labels: Tensor) -> Tensor:
        """In mode "multiclass" (N, 1, H, W) or (N, H, W) int64; else as they are."""
        if self.mode != "multiclass":
            return labels
        if may_look(labels) and bool((labels % 1 != 0).any()):
            raise ValueError(
                "labels: got fractions, expected classes; resample with mode='nearest'"
            )
        if labels.dim() != 4 or labels.shape[1] != self.net.in_channels:
            return labels.long()
        (none, *_), ones = self.gpl.options.ignored or (-1,), labels.sum(dim=1)  # -1: out of range
        if may_look(labels) and bool((ones > 1).any() | (labels < 0).any()):
            raise ValueError("labels: got several classes at a pixel, expected one-hot maps")
        return torch.where(ones > 0, labels.byte().argmax(dim=1), none)


def _plain(x: Tensor) -> Tensor:
    """Without what a MetaTensor carries along."""
    return x if type(x) is Tensor else x.as_subclass(Tensor)
