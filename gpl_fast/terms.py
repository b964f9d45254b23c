"""What the engine is asked for, and what it answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from gpl_fast.distance import Distance
from gpl_fast.graphs import constant
from gpl_fast.input_checks import (
    Number,
    as_class_weight,
    as_label_smoothing,
    as_num_classes,
    as_weight,
)

# Weights of classes as they may be given: (C,), of a binary cross-entropy also one number.
ClassWeight = Tensor | Iterable[Number] | Number


class Weights(NamedTuple):
    """The weight of each layer that is compared, by name; none of them is 0.

    ``distance`` says how; ``channels`` are (C_b,) floating: the weights of a layer's channels,
    multiplied with its number in ``features``.
    """

    features: Mapping[str, float]
    styles: Mapping[str, float]
    distance: Distance = Distance()
    channels: Mapping[str, Tensor] = {}

    @property
    def layers(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(dict.fromkeys((*self.features, *self.styles)))

    @property
    def normalized(self) -> bool:
        """Whether features are compared over their norm."""
        return self.distance.normalize and bool(self.features)


class CrossEntropy(NamedTuple):
    """The one that is computed beside the perceptual terms.

    ``labels`` (N, H, W) int64 with -1 = does not count, ``class_weight`` (C,) float32 or None,
    ``mask`` (N, H, W) float32, the weights of pixels, or None = 1.
    """

    labels: Tensor
    class_weight: Tensor | None
    label_smoothing: float
    mask: Tensor | None = None


class BinaryCrossEntropy(NamedTuple):
    """The same of labels of single elements.

    ``labels`` (N, C, H, W) uint8: 0, 1, or 2 = does not count; ``class_weight``, ``pos_weight``
    (C,) float32 or None; ``mask`` (N, H, W) float32 by which a pixel's elements count, or None.
    """

    labels: Tensor
    class_weight: Tensor | None
    pos_weight: Tensor | None
    label_smoothing: float
    mask: Tensor | None = None

    def to(self, dtype: torch.dtype) -> BinaryCrossEntropy:
        """With weights in `dtype`."""
        of_class, of_ones = self.class_weight, self.pos_weight
        return self._replace(
            class_weight=None if of_class is None else of_class.to(dtype),
            pos_weight=None if of_ones is None else of_ones.to(dtype),
        )

    def tensors(self) -> dict[str, Tensor]:
        """What the fast path reads, by name, but the weights of classes and pixels."""
        named = {"multi_hot": self.labels}
        return named if self.pos_weight is None else named | {"pos_weight": self.pos_weight.float()}


def activation_of(mode: str, given: object) -> str:
    """The prediction's in a segmentation of this mode.

    Raises:
        ValueError: another one than the mode has.
    """
    usual = "softmax" if mode == "multiclass" else "sigmoid"
    if mode != "multiclass" and given not in (None, "sigmoid"):
        raise ValueError(
            f"activation: got {given!r} with mode={mode!r}, where each class is by itself, "
            "expected 'sigmoid', or mode='multiclass'"
        )
    return usual if given is None else str(given)


class Segmentation(NamedTuple):
    """How a segmentation's two terms are made and weighed, checked; see `SegmentationLoss`."""

    gpl_weight: float
    ce_weight: float
    class_weight: Tensor | None  # (C,) float32
    label_smoothing: float
    gpl_ignore: bool | str
    mode: str = "multiclass"
    pos_weight: Tensor | None = None  # (C,) float32

    @property
    def by_element(self) -> bool:
        """Whether each class has labels of its own."""
        return self.mode != "multiclass"

    @classmethod
    def of(
        cls,
        channels: int,
        *,
        gpl_weight: Number,
        ce_weight: Number,
        class_weight: ClassWeight | None,
        label_smoothing: Number,
        gpl_ignore: bool | str,
        mode: str = "multiclass",
        pos_weight: ClassWeight | None = None,
        look: bool = True,
    ) -> Self:
        """What was given for C classes, checked; of a class weight the numbers only with `look`.

        Raises:
            ValueError: an argument outside of what `SegmentationLoss` lists.
        """
        as_num_classes(channels, mode)
        if mode == "multiclass" and pos_weight is not None:
            raise ValueError(
                "pos_weight: got one with mode='multiclass', expected class_weight, or "
                "mode='binary' or 'multilabel', where labels are positive or negative"
            )
        if not (gpl_ignore == "auto" or isinstance(gpl_ignore, bool)):
            raise ValueError(f"gpl_ignore: got {gpl_ignore!r}, expected 'auto', True or False")
        return cls(
            as_weight("gpl_weight", gpl_weight),
            as_weight("ce_weight", ce_weight),
            _by_class("class_weight", class_weight, channels, look, mode != "multiclass"),
            as_label_smoothing(label_smoothing),
            gpl_ignore,
            mode,
            _by_class("pos_weight", pos_weight, channels, look),
        )


def _by_class(
    what: str, weight: Any, channels: int, look: bool, broadcasts: bool = True
) -> Tensor | None:
    """Weights (C,), also of what PyTorch `broadcasts` to maps (N, C, H, W): a number, (C, 1, 1)."""
    if weight is None:
        return None
    if broadcasts and type(weight) in (float, int):  # also a symbol in a graph, which has no shape
        weight = [constant(weight)] * channels
    shape = tuple(getattr(weight, "shape", ()))
    if broadcasts and shape in ((channels, 1, 1), (1, channels, 1, 1)):
        weight = weight.reshape(channels)
    elif broadcasts and not shape and isinstance(weight, Tensor):
        weight = weight.expand(channels)
    elif broadcasts and not shape and (hasattr(weight, "ndim") or not isinstance(weight, Iterable)):
        weight = [weight] * channels
    return as_class_weight(weight, channels, look, what)


class Terms(NamedTuple):
    """Of each image, (N,) float32, float64 for a float64 prediction.

    ``cross_entropy`` is the sum over the pixels that count, ``normalizer`` that of their weights,
    of a binary one over the elements and how many these are; None where none was asked for.
    """

    feature: Tensor
    style: Tensor
    cross_entropy: Tensor | None = None
    normalizer: Tensor | None = None
