"""The weight of each layer that is compared: checked, and as a loss holds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import SupportsFloat

from gpl_fast.graphs import constant
from gpl_fast.input_checks import as_weight
from gpl_fast.net.lossnet import LossNet


def level_taps(net: LossNet, level_weights: Iterable[SupportsFloat] | None) -> dict[str, float]:
    """Weight by layer; None = the last level, weight 1.

    Raises:
        ValueError: not one finite weight >= 0 for each level, or all are 0.
    """
    if level_weights is None:
        return {net.levels[-1]: 1.0}
    expected = (
        f"{len(net.levels)} numbers, one for each of {list(net.levels)}, or None for the last"
    )
    if isinstance(level_weights, str | Mapping) or not isinstance(level_weights, Iterable):
        raise ValueError(f"level_weights: got {level_weights!r}, expected {expected}")
    given = list(level_weights)
    if len(given) != len(net.levels):
        raise ValueError(f"level_weights: got {len(given)} values, expected {expected}")
    weights = _as_weights("level_weights", dict(zip(net.levels, given, strict=True)))
    return {name: w for name, w in weights.items() if w}


def as_layers(
    net: LossNet,
    feature_layers: Mapping[str, SupportsFloat],
    style_layers: Mapping[str, SupportsFloat],
    tv_weight: SupportsFloat,
) -> tuple[dict[str, float], dict[str, float], float]:
    """Weights of features and styles by layer and of the total variation, as floats.

    Raises:
        TypeError, ValueError: unknown layers, bad weights, or nothing to compute.
    """
    weights: list[dict[str, float]] = []
    for what, layers in (("feature_layers", feature_layers), ("style_layers", style_layers)):
        if not isinstance(layers, Mapping):
            raise TypeError(
                f"{what}: got {type(layers).__name__}, expected a dict of weights by layer, such "
                f"as {{{net.layer_names[-1]!r}: 1.0}}"
            )
        unknown = [name for name in layers if name not in net.layer_names]
        if unknown:
            raise ValueError(f"{what}: got {unknown}, expected names of {list(net.layer_names)}")
        weights.append(_as_weights(what, layers) if layers else {})
    tv = as_weight("tv_weight", tv_weight)
    if not feature_layers and not style_layers and not tv:
        raise ValueError("got no feature_layers, no style_layers and tv_weight=0: nothing to do")
    return weights[0], weights[1], tv


def as_texts(weights: Mapping[str, float]) -> dict[str, str]:
    """Weights by layer as a loss holds them, for the same reason as `Options.texts`."""
    return {name: repr(w) for name, w in weights.items()}


def as_numbers(texts: Mapping[str, str]) -> dict[str, float]:
    """What `as_texts` was given, constants in graphs."""
    return {name: float(text) for name, text in texts.items()}


def _as_weights(what: str, weights: Mapping[str, SupportsFloat]) -> dict[str, float]:
    expected = "finite numbers >= 0, not all 0"
    try:
        numbers = {name: constant(as_weight(f"{what}: {name}", w)) for name, w in weights.items()}
    except ValueError as error:
        raise ValueError(f"{error}; {what} takes {expected}") from None
    if not any(numbers.values()):
        raise ValueError(f"{what}: got {list(numbers.values())}, expected {expected}")
    return numbers
