"""The keywords of every loss: as they may be given, and checked."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict, cast

import torch

from gpl_fast.backend import BACKENDS
from gpl_fast.distance import Distance
from gpl_fast.graphs import constant
from gpl_fast.input_checks import Integer, Number, as_float, as_float_dtype, as_int
from gpl_fast.stages import ACTIVATIONS, CRITERIA

IgnoreIndex = Integer | Sequence[Integer] | torch.Tensor | None

TARGET_ACTIVATIONS = ("auto", "same", *ACTIVATIONS)
REDUCTIONS = ("mean", "sum", "none")


class TermWords(TypedDict, total=False):
    """Keywords of a perceptual term; see `gpl_fast.GenericPerceptualLoss`.

    Numbers may be Python's, numpy's or 0-dim tensors; a dtype may be named by its text.
    """

    activation: str
    target_activation: str
    temperature: Number
    criterion: str
    normalize_features: bool
    compute_dtype: torch.dtype | str | None
    backend: str
    workspace_mb: Number | str


class LabelWords(TermWords, total=False):
    """The same where labels may be the target."""

    ignore_index: IgnoreIndex


class OptionWords(LabelWords, total=False):
    """All that `Options` are made of."""

    reduction: str


@dataclass(frozen=True)
class Options:
    """What `OptionWords` say, checked; see `gpl_fast.GenericPerceptualLoss`.

    Raises:
        ValueError: an unknown word or a number out of range.
    """

    activation: str = "softmax"
    target_activation: str = "auto"
    temperature: float = 1.0
    ignore_index: int | tuple[int, ...] | None = None
    reduction: str = "mean"
    criterion: str = "l2"
    normalize_features: bool = False
    compute_dtype: torch.dtype | None = None
    backend: str = "auto"
    workspace_mb: float | str = "auto"
    # `ignore_index`, as many as there are.
    ignored: tuple[int, ...] = field(init=False, repr=False, compare=False)
    # The numbers as text, on which torch.compile guards: a float that differs between two losses
    # becomes a symbol in the second one's graph, which no constant can be made of.
    texts: Mapping[str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _one_of("activation", self.activation, tuple(ACTIVATIONS))
        _one_of("target_activation", self.target_activation, TARGET_ACTIVATIONS)
        _one_of("reduction", self.reduction, REDUCTIONS)
        _one_of("criterion", self.criterion, tuple(CRITERIA))
        if not isinstance(self.normalize_features, bool):
            raise ValueError(
                f"normalize_features: got {self.normalize_features!r}, expected True or False"
            )
        _one_of("backend", self.backend, BACKENDS)
        self._set(
            "temperature", constant(as_float("temperature", self.temperature, "a number > 0"))
        )
        if self.temperature <= 0:
            raise ValueError(f"temperature: got {self.temperature!r}, expected a number > 0")
        if self.workspace_mb != "auto":
            expected = "'auto' or a number of megabytes > 0"
            megabytes = constant(as_float("workspace_mb", self.workspace_mb, expected))
            if megabytes <= 0:
                raise ValueError(f"workspace_mb: got {self.workspace_mb!r}, expected {expected}")
            self._set("workspace_mb", megabytes)
        ignored = as_ignored(self.ignore_index)
        self._set("ignored", ignored)
        self._set("ignore_index", ignored if len(ignored) > 1 else ignored[0] if ignored else None)
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
        refuse_unknown(taker, given, OPTION_NAMES)
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
    def distance(self) -> Distance:
        """How features are compared."""
        return Distance(self.criterion, self.normalize_features)

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


# The keywords of `Options`.
OPTION_NAMES = tuple(f.name for f in fields(Options) if f.init)


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


def as_ignore_index(given: IgnoreIndex | str, classes: int, by_element: bool) -> IgnoreIndex:
    """What `Options` take of ``ignore_index``: "auto" is 255, where that is no class.

    Raises:
        ValueError: another word; "auto" where 255 is a class.
    """
    if not isinstance(given, str):
        return given
    if given != "auto":
        raise ValueError(f"ignore_index: got {given!r}, expected 'auto', integers or None")
    if classes > 255 and not by_element:
        raise ValueError(
            f"ignore_index: got 'auto' with {classes} classes, where 255 is a class; "
            "expected an explicit label, such as 65535 or -1, or None = ignore nothing"
        )
    return 255


def as_ignored(value: IgnoreIndex) -> tuple[int, ...]:
    """The labels that do not count: none, one, or several.

    Raises:
        ValueError: not an integer of 64 bits.
    """
    if value is None:
        return ()
    if isinstance(value, torch.Tensor):
        several = value.dim() == 1 and not value.is_meta
    else:
        several = type(value) is not int and getattr(value, "ndim", 0) == 1
    if several:
        value = cast(Any, value).tolist()  # of a tensor or an array
    given = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    return tuple(dict.fromkeys(map(_as_label, given)))


def _as_label(value: Integer | Sequence[Integer]) -> int:
    expected = "an integer, several of them, or None = ignore nothing"
    index = as_int("ignore_index", value, expected)  # type: ignore[arg-type]  # refused there
    if not -(2**63) <= index < 2**63:
        raise ValueError(
            f"ignore_index: got {index}, expected an integer that a label can hold, in "
            "[-2**63, 2**63)"
        )
    return index


def _one_of(what: str, got: object, known: Sequence[str]) -> None:
    if not isinstance(got, str) or got not in known:
        raise ValueError(f"{what}: got {got!r}, expected one of {tuple(known)}")
