"""What the engine is asked for, and what it answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Self, SupportsFloat

from torch import Tensor

from gpl_fast.input_checks import (
    as_class_weight,
    as_label_smoothing,
    as_num_classes,
    as_weight,
)


class Weights(NamedTuple):
    """The weight of each layer that is compared, by name; none of them is 0."""

    features: Mapping[str, float]
    styles: Mapping[str, float]


class CrossEntropy(NamedTuple):
    """The one that is computed beside the perceptual terms.

    ``labels`` (N, H, W) int64 with -1 = does not count, ``class_weight`` (C,) float32 or None,
    ``mask`` (N, H, W) float32, the weights of pixels, or None = 1.
    """

    labels: Tensor
    class_weight: Tensor | None
    label_smoothing: float
    mask: Tensor | None = None


class Segmentation(NamedTuple):
    """How a segmentation's two terms are made and weighed, checked; see `SegmentationLoss`."""

    gpl_weight: float
    ce_weight: float
    class_weight: Tensor | None  # (C,) float32
    label_smoothing: float
    gpl_ignore: bool | str

    @classmethod
    def of(
        cls,
        channels: int,
        *,
        gpl_weight: SupportsFloat,
        ce_weight: SupportsFloat,
        class_weight: Tensor | Iterable[SupportsFloat] | None,
        label_smoothing: SupportsFloat,
        gpl_ignore: bool | str,
        look: bool = True,
    ) -> Self:
        """What was given for C classes, checked; of a class weight the numbers only with `look`.

        Raises:
            ValueError: an argument outside of what `SegmentationLoss` lists.
        """
        as_num_classes(channels)
        if not (gpl_ignore == "auto" or isinstance(gpl_ignore, bool)):
            raise ValueError(f"gpl_ignore: got {gpl_ignore!r}, expected 'auto', True or False")
        return cls(
            as_weight("gpl_weight", gpl_weight),
            as_weight("ce_weight", ce_weight),
            None if class_weight is None else as_class_weight(class_weight, channels, look),
            as_label_smoothing(label_smoothing),
            gpl_ignore,
        )


class Terms(NamedTuple):
    """Of each image, (N,) float32, float64 for a float64 prediction.

    ``cross_entropy`` is the sum over the pixels that count, ``normalizer`` that of their weights;
    None where none was asked for.
    """

    feature: Tensor
    style: Tensor
    cross_entropy: Tensor | None = None
    normalizer: Tensor | None = None
