"""What a loss is made with: its keywords and weights, validated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpl_fast.backend import BACKENDS
from gpl_fast.input_checks import FLOAT_DTYPES
from gpl_fast.lossnet import LossNet

ACTIVATIONS = ("softmax", "sigmoid", "none")
REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class Options:
    """Keywords that every loss takes; see `gpl_fast.GenericPerceptualLoss`.

    Raises:
        ValueError: an unknown word or a number out of range.
    """

    activation: str = "softmax"
    target_activation: str = "same"
    temperature: float = 1.0
    ignore_index: int | None = None
    reduction: str = "mean"
    compute_dtype: torch.dtype | None = None
    backend: str = "auto"
    workspace_mb: float = 256

    def __post_init__(self) -> None:
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("target_activation", self.target_activation, ("same", *ACTIVATIONS))
        _one_of("reduction", self.reduction, REDUCTIONS)
        _one_of("backend", self.backend, BACKENDS)
        if not (_is_number(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature: got {self.temperature!r}, expected a number > 0")
        if not (_is_number(self.workspace_mb) and self.workspace_mb > 0):
            raise ValueError(f"workspace_mb: got {self.workspace_mb!r}, expected megabytes > 0")
        if self.ignore_index is not None and not isinstance(self.ignore_index, int):
            raise ValueError(f"ignore_index: got {self.ignore_index!r}, expected an int or None")
        if self.compute_dtype is not None and self.compute_dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"compute_dtype: got {self.compute_dtype!r}, expected None or one of {FLOAT_DTYPES}"
            )

    def check_channels(self, channels: int) -> None:
        """Softmax over one channel is constant 1: refuse it.

        Raises:
            ValueError: `channels` is 1 and an activation is softmax.
        """
        if channels == 1 and "softmax" in (self.activation, self.target_activation):
            raise ValueError(
                "activation: got 'softmax' with in_channels=1, whose softmax is constant 1; "
                "expected activation='sigmoid' (masks from logits) or 'none' (depth, probabilities)"
            )

    @property
    def target(self) -> str:
        """Activation of a dense target."""
        return self.activation if self.target_activation == "same" else self.target_activation


def level_taps(net: LossNet, level_weights: Sequence[float] | None) -> dict[str, float]:
    """Weight by layer; None = the last level, weight 1.

    Raises:
        ValueError: not one finite weight >= 0 for each level, or all are 0.
    """
    if level_weights is None:
        return {net.levels[-1]: 1.0}
    try:
        weights = [float(w) for w in level_weights]
    except (TypeError, ValueError):
        raise ValueError(
            f"level_weights: got {level_weights!r}, expected {len(net.levels)} numbers, one for "
            f"each of {list(net.levels)}, or None for the last level alone"
        ) from None
    if len(weights) != len(net.levels):
        raise ValueError(
            f"level_weights: got {len(weights)} values, expected {len(net.levels)}, one for each "
            f"of {list(net.levels)}"
        )
    _check_weights("level_weights", weights)
    return {name: w for name, w in zip(net.levels, weights, strict=True) if w}


def check_layers(
    net: LossNet,
    feature_layers: Mapping[str, float],
    style_layers: Mapping[str, float],
    tv_weight: float,
) -> None:
    """Raises: TypeError, ValueError for unknown layers, bad weights, or nothing to compute."""
    for what, layers in (("feature_layers", feature_layers), ("style_layers", style_layers)):
        if not isinstance(layers, Mapping):
            raise TypeError(
                f"{what}: got {type(layers).__name__}, expected a dict of weights by layer, such "
                f"as {{{net.layer_names[-1]!r}: 1.0}}"
            )
        unknown = [name for name in layers if name not in net.layer_names]
        if unknown:
            raise ValueError(f"{what}: got {unknown}, expected names of {list(net.layer_names)}")
        if layers:
            _check_weights(what, layers.values())
    if not (_is_number(tv_weight) and tv_weight >= 0):
        raise ValueError(f"tv_weight: got {tv_weight!r}, expected a number >= 0")
    if not feature_layers and not style_layers and not tv_weight:
        raise ValueError("got no feature_layers, no style_layers and tv_weight=0: nothing to do")


def check_segmentation(
    num_classes: int,
    gpl_weight: float,
    ce_weight: float,
    label_smoothing: float,
    gpl_ignore: bool | str,
) -> None:
    """Raises: ValueError for numbers out of range or unknown words."""
    if not isinstance(num_classes, int) or num_classes < 2:
        raise ValueError(
            f"num_classes: got {num_classes!r}, expected an integer >= 2; for one channel use "
            "GenericPerceptualLoss(1, activation='sigmoid') beside a binary cross-entropy"
        )
    for what, value in (("gpl_weight", gpl_weight), ("ce_weight", ce_weight)):
        if not (_is_number(value) and value >= 0):
            raise ValueError(f"{what}: got {value!r}, expected a number >= 0")
    if not (_is_number(label_smoothing) and 0 <= label_smoothing <= 1):
        raise ValueError(f"label_smoothing: got {label_smoothing!r}, expected a number in [0, 1]")
    if not (gpl_ignore == "auto" or isinstance(gpl_ignore, bool)):
        raise ValueError(f"gpl_ignore: got {gpl_ignore!r}, expected 'auto', True or False")


def check_class_weight(weight: Tensor, channels: int) -> Tensor:
    if not isinstance(weight, Tensor) or tuple(weight.shape) != (channels,):
        got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(
            f"class_weight: got {got}, expected a tensor of shape ({channels},), one weight a class"
        )
    return weight.detach()


def _one_of(what: str, got: object, known: Sequence[str]) -> None:
    if got not in known:
        raise ValueError(f"{what}: got {got!r}, expected one of {tuple(known)}")


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _check_weights(what: str, weights: Iterable[float]) -> None:
    weights = list(weights)
    try:
        good = all(math.isfinite(w) and w >= 0 for w in weights) and any(weights)
    except TypeError:
        good = False
    if not good:
        raise ValueError(f"{what}: got {weights}, expected finite numbers >= 0, not all 0")
