"""Cross-entropy and the Generic Perceptual Loss in one module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpl_fast import functional
from gpl_fast.loss import GenericPerceptualLoss
from gpl_fast.lossnet import LossNet
from gpl_fast.options import check_class_weight, check_segmentation
from gpl_fast.targets import TargetFeatures, TopK


class SegmentationLoss(nn.Module):
    """``ce_weight · CE(x, labels) + gpl_weight · L(softmax(x), target)``: the paper's eq. (2).

    Args:
        num_classes: C >= 2.
        gpl_weight: λ; the paper uses 0.1.
        ce_weight: of the cross-entropy.
        ignore_index: label of pixels that do not count; "auto" = 255 where C <= 255; None = none.
        class_weight: (C,) of the cross-entropy: a tensor or a sequence of numbers.
        label_smoothing: of the cross-entropy, in [0, 1].
        gpl_ignore: whether pixels with an ignored label leave the perceptual term: "auto" = only
            when the labels are its target; True; False.
        **gpl: everything that `GenericPerceptualLoss` takes.

    Raises:
        TypeError, ValueError: an argument outside of what is listed.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        gpl_weight: float = 0.1,
        ce_weight: float = 1.0,
        ignore_index: int | str | None = "auto",
        class_weight: Tensor | Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        gpl_ignore: bool | str = "auto",
        **gpl: Any,
    ) -> None:
        super().__init__()
        check_segmentation(num_classes, gpl_weight, ce_weight, label_smoothing, gpl_ignore)
        if ignore_index == "auto":
            if num_classes > 255:
                raise ValueError(
                    f"ignore_index: got 'auto' with {num_classes} classes, where 255 is a class; "
                    "expected an explicit label, such as 65535 or -1, or None = ignore nothing"
                )
            ignore_index = 255
        elif isinstance(ignore_index, str):
            raise ValueError(f"ignore_index: got {ignore_index!r}, expected 'auto', an int or None")
        self.gpl = GenericPerceptualLoss(num_classes, ignore_index=ignore_index, **gpl)
        self.gpl_weight, self.ce_weight = gpl_weight, ce_weight
        self.label_smoothing, self.gpl_ignore = label_smoothing, gpl_ignore
        if class_weight is not None:
            try:
                class_weight = torch.as_tensor(class_weight, dtype=torch.float32).detach().clone()
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"class_weight: got {class_weight!r}, expected {num_classes} numbers, one "
                    "weight a class"
                ) from error
            check_class_weight(class_weight, num_classes)
            if not (class_weight.isfinite() & (class_weight >= 0)).all():
                raise ValueError(
                    f"class_weight: got {class_weight.tolist()}, expected finite numbers >= 0"
                )
        # A plain attribute: a buffer would appear in state_dict and be broadcast by DDP.
        self.class_weight = class_weight

    @property
    def net(self) -> LossNet:
        """The frozen network of the perceptual term."""
        return self.gpl.net

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        teacher: Tensor | TopK | TargetFeatures | None = None,
        mask: Tensor | None = None,
        return_parts: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The total for `logits` (N, C, h, w); see `functional.segmentation_loss`."""
        return functional.segmentation_loss(
            logits,
            labels,
            self.net,
            teacher=teacher,
            mask=mask,
            gpl_weight=self.gpl_weight,
            ce_weight=self.ce_weight,
            class_weight=self.class_weight,
            label_smoothing=self.label_smoothing,
            gpl_ignore=self.gpl_ignore,
            level_weights=self.gpl.level_weights,
            return_parts=return_parts,
            **self.gpl.options,
        )

    def encode(
        self, teacher: Tensor | TopK, mask: Tensor | None = None
    ) -> TargetFeatures:  # fmt: skip
        """φ(teacher), to be used as `teacher`; see `functional.encode`."""
        return self.gpl.encode(teacher, mask)

    def fingerprint(self) -> str:
        """Hex digest of the network's structure and weights: the same on every machine."""
        return self.gpl.fingerprint()

    def extra_repr(self) -> str:
        names = ("gpl_weight", "ce_weight", "label_smoothing", "gpl_ignore")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
