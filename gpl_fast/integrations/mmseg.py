"""mmsegmentation: a loss as its decode heads call it."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from gpl_fast.segmentation import SegmentationLoss as Plain


class SegmentationLoss(nn.Module):
    """`gpl_fast.SegmentationLoss` for ``loss_decode=``: the cross-entropy is mmsegmentation's.

    Args:
        num_classes: C; 1 in mode "binary".
        loss_name: key of the head's losses; what begins with ``loss_`` is summed and trained.
        avg_non_ignore: whether the cross-entropy is a mean over the pixels that count; by default,
            as in mmsegmentation, it is one over all pixels, ignored ones with 0.
        **words: of `gpl_fast.SegmentationLoss`; `ignore_index` is the head's, at the call.
    Raises:
        TypeError, ValueError: as `gpl_fast.SegmentationLoss`; another reduction than "mean".
    """

    def __init__(
        self, num_classes: int, loss_name: str = "loss_gpl", avg_non_ignore: bool = False,
        **words: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        if "ignore_index" in words:
            raise TypeError("ignore_index: set it at the decode head, which gives it at each call")
        self.words, self.loss_name = {"num_classes": num_classes, **words}, loss_name
        self.over_all = not avg_non_ignore and words.get("class_weight") is None
        self._made: dict[tuple[tuple[str, object], ...], Plain] = {}
        self._loss(ignore_index=255 if num_classes <= 255 else None)  # refuses wrong words

    def forward(
        self, cls_score: Tensor, label: Tensor, weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None, reduction_override: str | None = None,
        ignore_index: int | None = 255,
    ) -> Tensor:  # fmt: skip
        """Logits (N, C, H, W), labels (N, H, W); `weight` (N, H, W), of a sampler, weighs the
        cross-entropy alone; `avg_factor` is what its sum is divided by."""
        if reduction_override not in (None, "mean"):
            raise ValueError(f"reduction_override: got {reduction_override!r}, expected 'mean'")
        loss = self._loss(ignore_index=ignore_index)
        if avg_factor is None:
            avg_factor = label.numel() if self.over_all else loss.count(label)[0]
        given: dict[str, Any] = {"normalizer": avg_factor, "return_parts": True}
        parts = loss(cls_score, label, **given)
        if weight is not None:
            entropy = self._loss(ignore_index=ignore_index, gpl_weight=0.0)
            parts["loss_ce"] = entropy(cls_score, label, mask=weight, **given)["loss_ce"]
        return cast(Tensor, parts["loss_ce"] + parts["loss_gpl"])

    def _loss(self, **words: object) -> Plain:
        if (key := tuple(words.items())) not in self._made:
            self._made[key] = Plain(**{**self.words, **words})
        return self._made[key]
