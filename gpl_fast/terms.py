"""What the engine is asked for, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from gpl_fast.distance import Distance


class Weights(NamedTuple):
    """The weight of each layer that is compared, by name; none of them is 0.

    ``distance`` says how; ``channels`` are (C_b,) floating: the weights of a layer's channels,
    multiplied with its number in ``features``.
    """

    features: Mapping[str, float]
    styles: Mapping[str, float]
    distance: Distance = Distance()
    channels: Mapping[str, Tensor] = {}


class CrossEntropy(NamedTuple):
    """The one that is computed beside the perceptual terms.

    ``labels`` (N, H, W) int64 with -1 = does not count, ``class_weight`` (C,) float32 or None.
    """

    labels: Tensor
    class_weight: Tensor | None
    label_smoothing: float


class Terms(NamedTuple):
    """Of each image, (N,) float32, float64 for a float64 prediction.

    ``cross_entropy`` is the sum over the pixels that count, ``normalizer`` that of their weights;
    None where none was asked for.
    """

    feature: Tensor
    style: Tensor
    cross_entropy: Tensor | None = None
    normalizer: Tensor | None = None
