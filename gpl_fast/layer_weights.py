"""The weight of each layer that is compared: checked, and as a loss holds them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gpl_fast.device_copies import DeviceCopies
from gpl_fast.distance import Distance
from gpl_fast.graphs import constant
from gpl_fast.input_checks import Number, as_class_weight, as_weight
from gpl_fast.net.lossnet import LossNet
from gpl_fast.targets.values import may_look
from gpl_fast.terms import Weights

# A layer's weight as it may be given: one number, or one for each of its channels.
LayerWeight = Number | Tensor | Iterable[Number]


class HeldWeights:
    """`Weights` as a loss holds them: its numbers as text, as `Options.texts`; those of channels as
    plain tensors, since a buffer would appear in state_dict, copied to where the input is."""

    def __init__(self, weights: Weights) -> None:
        self._given, self.distance = weights, weights.distance
        self._features = {name: repr(w) for name, w in weights.features.items()}
        self._styles = {name: repr(w) for name, w in weights.styles.items()}
        with torch.inference_mode(False):  # copies that a graph may save, wherever a loss is made
            self.channels = {name: c.clone() for name, c in weights.channels.items()}
            self._single = {name: c.float() for name, c in self.channels.items()}
        self._copies = DeviceCopies()

    @property
    def features(self) -> dict[str, float]:
        """Weight by layer, constants in graphs; of channels what theirs are multiplied with."""
        return {name: float(text) for name, text in self._features.items()}

    @property
    def styles(self) -> dict[str, float]:
        """As `features`."""
        return {name: float(text) for name, text in self._styles.items()}

    def on(self, like: Tensor) -> Weights:
        """For a prediction `like` this, where it is."""
        if not (self.channels or torch.compiler.is_compiling()):
            return self._given
        wide = isinstance(like, Tensor) and like.dtype == torch.float64
        own = self.channels if wide else self._single
        found = {f"{name} {wide}": (name, c) for name, c in own.items()}
        copies = {name: self._copies.of(key, c, like) for key, (name, c) in found.items()}
        channels = {name: c for name, c in copies.items() if c is not None}
        return Weights(self.features, self.styles, self.distance, channels)

    def shown(self) -> dict[str, Any]:
        """The weights of features for a `repr`: a number, or a list of the channels'."""
        shown: dict[str, Any] = self.features
        return shown | {name: (shown[name] * c).tolist() for name, c in self.channels.items()}


def level_taps(
    net: LossNet,
    level_weights: Iterable[LayerWeight] | None,
    distance: Distance,
    *,
    once: bool = False,
) -> Weights:
    """The levels that are compared; None = the last one, weight 1.

    Args:
        once: a loss is made: values may be looked at wherever they are.

    Raises:
        ValueError: not one weight for each level, numbers or C_b of them, finite and >= 0, or all
            are 0.
    """
    if level_weights is None:
        return Weights({net.levels[-1]: 1.0}, {}, distance)
    expected = (
        f"{len(net.levels)} numbers, one for each of {list(net.levels)}, or None for the last"
    )
    if isinstance(level_weights, str | Mapping) or not isinstance(level_weights, Iterable):
        raise ValueError(f"level_weights: got {level_weights!r}, expected {expected}")
    given = list(level_weights)
    if len(given) != len(net.levels):
        raise ValueError(f"level_weights: got {len(given)} values, expected {expected}")
    by_level = dict(zip(net.levels, given, strict=True))
    numbers, channels = _of_features("level_weights", by_level, net, once)
    return Weights({name: w for name, w in numbers.items() if w}, {}, distance, channels)


def as_layer_names(net: LossNet, layers: Sequence[str]) -> tuple[str, ...]:
    """The layers whose features are kept.

    Raises:
        ValueError: none, text in place of a list, or names that the network does not have.
    """
    known = list(net.layer_names)
    if isinstance(layers, str):
        raise ValueError(
            f"encode: layers: got {layers!r}, expected a list of names of {known}; use [{layers!r}]"
        )
    unknown = [name for name in layers if name not in known]
    if unknown:
        raise ValueError(f"encode: layers: got {unknown}, expected names of {known}")
    if not layers:
        raise ValueError(
            "encode: got no layer that is compared, expected names in feature_layers or "
            f"style_layers, such as {known[-1]!r}: a total variation takes no target"
        )
    return tuple(layers)


def as_layers(
    net: LossNet,
    feature_layers: Mapping[str, LayerWeight],
    style_layers: Mapping[str, Number],
    tv_weight: Number,
    distance: Distance,
    *,
    once: bool = False,
) -> tuple[Weights, float]:
    """Weights of features and styles by layer, as `level_taps`, and of the total variation.

    Raises:
        TypeError, ValueError: unknown layers, bad weights, or nothing to compute.
    """
    for what, layers in (("feature_layers", feature_layers), ("style_layers", style_layers)):
        if not isinstance(layers, Mapping):
            raise TypeError(
                f"{what}: got {type(layers).__name__}, expected a dict of weights by layer, such "
                f"as {{{net.layer_names[-1]!r}: 1.0}}"
            )
        unknown = [name for name in layers if name not in net.layer_names]
        if unknown:
            raise ValueError(f"{what}: got {unknown}, expected names of {list(net.layer_names)}")
    features, channels = _of_features("feature_layers", feature_layers, net, once)
    for name, weight in style_layers.items():
        if _of_channels(weight):
            raise ValueError(
                f"style_layers: {name}: got weights of channels, expected one number: a Gram "
                "matrix has two channels an element; feature_layers takes them"
            )
    styles = _as_weights("style_layers", style_layers)
    tv = as_weight("tv_weight", tv_weight)
    if not feature_layers and not style_layers and not tv:
        raise ValueError("got no feature_layers, no style_layers and tv_weight=0: nothing to do")
    features, styles = ({k: w for k, w in of.items() if w} for of in (features, styles))
    return Weights(features, styles, distance, channels), tv


def check_channels(weights: Weights, features: Mapping[str, Tensor]) -> None:
    """Raises: ValueError where a layer has not as many channels as weights of them."""
    for name, c in weights.channels.items():
        if len(c) != features[name].shape[1]:
            raise ValueError(
                f"weights of {name}: got {len(c)}, expected one number, or one for each of its "
                f"{features[name].shape[1]} channels"
            )


def _of_channels(weight: object) -> bool:
    """Whether there is one for each channel: a list, or an array of some dimension."""
    if isinstance(weight, str | bytes | Mapping) or not isinstance(weight, Iterable):
        return False
    return getattr(weight, "ndim", 1) > 0


def _of_features(
    what: str, weights: Mapping[str, Any], net: LossNet, once: bool
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The number of each layer, and the weights of channels that it is multiplied with."""
    numbers, channels = dict(weights), {}
    for name, weight in weights.items():
        if _of_channels(weight):
            numbers[name], channels[name] = _split(f"{what}: {name}", weight, net, name, once)
    numbers = _as_weights(what, numbers)
    return numbers, {name: c for name, c in channels.items() if numbers[name]}


def _split(what: str, weight: Any, net: LossNet, name: str, once: bool) -> tuple[float, Tensor]:
    """A power of two, and weights of channels of which the largest is in (1/2, 1]: their product
    is exact, and 16-bit seeds keep their range. Where values may not be looked at: 1, and all."""
    if not isinstance(weight, Tensor):
        weight = list(weight)
    # A module's layers tell their channels only when they run; see `check_channels`.
    count = next((x.out_channels for x in net.layers if x.name == name), len(weight))
    exact = as_class_weight(weight, count, False, what, "channel", torch.float64)
    if once:
        exact = exact.cpu()
    if torch.compiler.is_compiling() or not (once or may_look(exact)):
        return 1.0, exact
    if not (exact.isfinite() & (exact >= 0)).all():
        raise ValueError(f"{what}: got {exact.tolist()}, expected finite numbers >= 0")
    half, exponent = math.frexp(float(exact.max()))
    number = 0.0 if half == 0 else math.ldexp(1.0, exponent - (half == 0.5))
    return number, exact / (number or 1.0)


def _as_weights(what: str, weights: Mapping[str, Number]) -> dict[str, float]:
    if not weights:
        return {}
    expected = "finite numbers >= 0, not all 0"
    try:
        numbers = {name: constant(as_weight(f"{what}: {name}", w)) for name, w in weights.items()}
    except ValueError as error:
        raise ValueError(f"{error}; {what} takes {expected}") from None
    if not any(numbers.values()):
        raise ValueError(f"{what}: got {list(numbers.values())}, expected {expected}")
    return numbers
