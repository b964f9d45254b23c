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
        ValueError: floating labels that are no classes, as interpolation makes them: looked at on
            the CPU. Else as `gpl_fast.SegmentationLoss`.
    """

    def forward(self, logits: Tensor, labels: Tensor, *args: Any, **words: Any) -> Any:
        """The total; further arguments as of `gpl_fast.SegmentationLoss`."""
        logits, labels = logits.as_subclass(Tensor), labels.as_subclass(Tensor)  # of MetaTensors
        if logits.dim() == 5:
            return VolumeLoss(self)(logits, labels, *args, **words)
        if self.mode == "multiclass":
            labels = self._classes(labels, logits.shape[1])
        return super().forward(logits, labels, *args, **words)

    def _classes(self, labels: Tensor, channels: int) -> Tensor:
        """(N, 1, H, W) or (N, H, W) int64."""
        if labels.dim() == 4 and labels.shape[1] == channels > 1:
            counted, ignored = labels.any(dim=1), self.gpl.options.ignored
            classes = labels.long().argmax(dim=1)
            return torch.where(counted, classes, ignored[0]) if ignored else classes
        if labels.is_floating_point() and may_look(labels) and bool((labels % 1).any()):
            raise ValueError(
                "labels: got fractions, expected classes; resample labels with mode='nearest'"
            )
        return labels.long()
