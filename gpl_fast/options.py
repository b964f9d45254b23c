"""What a loss is made with: its keywords and weights, validated."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, SupportsFloat, SupportsIndex

import torch
from torch import Tensor

from gpl_fast.backend import BACKENDS
from gpl_fast.input_checks import FLOAT_DTYPES, as_float, as_int
from gpl_fast.net.lossnet import LossNet

ACTIVATIONS = ("softmax", "sigmoid", "none")
TARGET_ACTIVATIONS = ("auto", "same", *ACTIVATIONS)
REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class Options:
    """Keywords that every loss takes; see `gpl_fast.GenericPerceptualLoss`.

    Numbers may be Python's, numpy's or 0-dim tensors; a dtype may be named by its text.

    Raises:
        ValueError: an unknown word or a number out of range.
    """

    activation: str = "softmax"
    target_activation: str = "auto"
    temperature: float = 1.0
    ignore_index: int | None = None
    reduction: str = "mean"
    compute_dtype: torch.dtype | str | None = None
    backend: str = "auto"
    workspace_mb: float | str = "auto"
    # The numbers as text, on which torch.compile guards: a float that differs between two losses
    # becomes a symbol in the second one's graph, which no constant can be made of.
    texts: Mapping[str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("target_activation", self.target_activation, TARGET_ACTIVATIONS)
        _one_of("reduction", self.reduction, REDUCTIONS)
        _one_of("backend", self.backend, BACKENDS)
        self._set("temperature", as_float("temperature", self.temperature, "a number > 0"))
        if self.temperature <= 0:
            raise ValueError(f"temperature: got {self.temperature!r}, expected a number > 0")
        if self.workspace_mb != "auto":
            expected = "'auto' or a number of megabytes > 0"
            megabytes = as_float("workspace_mb", self.workspace_mb, expected)
            if megabytes <= 0:
                raise ValueError(f"workspace_mb: got {self.workspace_mb!r}, expected {expected}")
            self._set("workspace_mb", megabytes)
        self._set("ignore_index", as_ignore_index(self.ignore_index))
        self._set("compute_dtype", as_float_dtype("compute_dtype", self.compute_dtype))
        numbers = {"temperature": self.temperature, "workspace_mb": self.workspace_mb}
        self._set("texts", {name: str(number) for name, number in numbers.items()})

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def of(cls, taker: str, given: Mapping[str, Any], **defaults: Any) -> Options:
        """The options that `taker`, a loss or a function, was `given`, over its `defaults`.

        Raises:
            TypeError: a keyword that no loss takes, with those that there are.
            ValueError: as `Options`.
        """
        refuse_unknown(taker, given, option_names())
        return cls(**{**defaults, **given})

    def changed(self, **defaults: Any) -> str:
        """What differs from the defaults, as a `repr` shows it: ``", name=value"`` each."""
        usual = {f.name: f.default for f in fields(self) if f.init} | defaults
        words = {name: getattr(self, name) for name in usual}
        return "".join(f", {k}={v!r}" for k, v in words.items() if v != usual[k])

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
        own = self.target_activation not in ("auto", "same")
        return self.target_activation if own else self.activation

    @property
    def target_temperature(self) -> float:
        """T of a dense target: a map that is taken as it is beside an activated prediction is not
        divided either."""
        as_it_is = self.target == "none" and self.activation != "none"
        return 1.0 if as_it_is else self.constant_temperature

    @property
    def constant_temperature(self) -> float:
        """`temperature`, a constant in graphs."""
        return float(self.texts["temperature"])

    @property
    def constant_workspace(self) -> float | str:
        """`workspace_mb`, a constant in graphs."""
        text = self.texts["workspace_mb"]
        return text if text == "auto" else float(text)

    @property
    def dtype(self) -> torch.dtype | None:
        """`compute_dtype` as a dtype."""
        assert not isinstance(self.compute_dtype, str)
        return self.compute_dtype


def option_names() -> list[str]:
    """The keywords of `Options`."""
    return [f.name for f in fields(Options) if f.init]


def as_texts(weights: Mapping[str, float]) -> dict[str, str]:
    """Weights by layer as a loss holds them, for the same reason as `Options.texts`."""
    return {name: repr(w) for name, w in weights.items()}


def as_numbers(texts: Mapping[str, str]) -> dict[str, float]:
    """What `as_texts` was given, constants in graphs."""
    return {name: float(text) for name, text in texts.items()}


def refuse_unknown(taker: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raises: TypeError naming `taker`, the keywords that it does not know, and those it does."""
    unknown = [name for name in given if name not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise TypeError(
            f"{taker}: got an unknown option {', '.join(map(repr, unknown))}{hint}, expected some "
            f"of {', '.join(known)}"
        )


def as_ignore_index(value: SupportsIndex | None) -> int | None:
    """A label that does not count, or None.

    Raises:
        ValueError: not an integer of 64 bits.
    """
    if value is None:
        return None
    index = as_int("ignore_index", value, "an integer, or None = ignore nothing")
    if not -(2**63) <= index < 2**63:
        raise ValueError(
            f"ignore_index: got {index}, expected an integer that a label can hold, in "
            "[-2**63, 2**63)"
        )
    return index


def as_float_dtype(what: str, value: object) -> torch.dtype | None:
    """A floating dtype or its name, "bfloat16" or "torch.bfloat16".

    Raises:
        ValueError: anything else.
    """
    for dtype in FLOAT_DTYPES:
        if value is dtype or value in (str(dtype), str(dtype).removeprefix("torch.")):
            return dtype
    if value is not None:
        known = ", ".join(map(str, FLOAT_DTYPES))
        raise ValueError(f"{what}: got {value!r}, expected None or one of {known}")
    return None


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


def check_gpl_ignore(word: bool | str) -> None:
    """Raises: ValueError for anything but "auto", True and False."""
    if not (word == "auto" or isinstance(word, bool)):
        raise ValueError(f"gpl_ignore: got {word!r}, expected 'auto', True or False")


def as_num_classes(value: SupportsIndex) -> int:
    """C of a segmentation.

    Raises:
        ValueError: not an integer >= 2.
    """
    expected = (
        "an integer >= 2; for one channel use GenericPerceptualLoss(1, activation='sigmoid') "
        "beside a binary cross-entropy"
    )
    classes = as_int("num_classes", value, expected)
    if classes < 2:
        raise ValueError(f"num_classes: got {classes}, expected {expected}")
    return classes


def as_weight(what: str, value: SupportsFloat) -> float:
    """A number >= 0.

    Raises:
        ValueError: anything else.
    """
    number = as_float(what, value, "a number >= 0")
    if number < 0:
        raise ValueError(f"{what}: got {number}, expected a number >= 0")
    return number


def as_label_smoothing(value: SupportsFloat) -> float:
    """A number in [0, 1].

    Raises:
        ValueError: anything else.
    """
    number = as_float("label_smoothing", value, "a number in [0, 1]")
    if not 0 <= number <= 1:
        raise ValueError(f"label_smoothing: got {number}, expected a number in [0, 1]")
    return number


def as_class_weight(
    weight: Tensor | Iterable[SupportsFloat], channels: int, look: bool = True
) -> Tensor:
    """A weight for each class, (C,) float32: a copy, which a graph may save also where the weights
    were made under `torch.inference_mode`; the numbers are looked at once, where a loss is made.

    Raises:
        ValueError: not C finite numbers >= 0.
    """
    expected = f"({channels},): {channels} numbers, finite and >= 0, one weight a class"
    if isinstance(weight, Tensor) and weight.is_meta:
        raise ValueError(
            "class_weight: got a tensor on 'meta', which holds no numbers, expected "
            f"{expected}: a list of them is taken as it is under any default device"
        )
    try:
        if not isinstance(weight, Tensor):
            given = [as_float("class_weight", w) for w in weight]
            weight = torch.tensor(given, dtype=torch.float32, device="cpu")
        with torch.inference_mode(False):
            copied = weight.detach().to(torch.float32, copy=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"class_weight: got {weight!r}, expected {expected}") from error
    if tuple(copied.shape) != (channels,):
        raise ValueError(f"class_weight: got shape {tuple(copied.shape)}, expected {expected}")
    if look and not (copied.isfinite() & (copied >= 0)).all():
        raise ValueError(f"class_weight: got {copied.tolist()}, expected {expected}")
    return copied


def _one_of(what: str, got: object, known: Sequence[str]) -> None:
    if not isinstance(got, str) or got not in known:
        raise ValueError(f"{what}: got {got!r}, expected one of {tuple(known)}")


def _as_weights(what: str, weights: Mapping[str, SupportsFloat]) -> dict[str, float]:
    expected = "finite numbers >= 0, not all 0"
    try:
        numbers = {name: as_weight(f"{what}: {name}", w) for name, w in weights.items()}
    except ValueError as error:
        raise ValueError(f"{error}; {what} takes {expected}") from None
    if not any(numbers.values()):
        raise ValueError(f"{what}: got {list(numbers.values())}, expected {expected}")
    return numbers
