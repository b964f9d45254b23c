"""What every kind of target offers: a class a kind, each in a file of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from gpl_fast.input_checks import TakesMaps
from gpl_fast.options import Options
from gpl_fast.targets.masks import check_weights


class Network(TakesMaps, Protocol):
    """What stored features are held to."""

    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Target:
    """A target after validation.

    A new kind is a subclass in a file of its own and a place in `resolve.KINDS`.
    """

    # The way into the fast path, with the names of `tensors`: "dense", "labels", "topk" (a short
    # list of classes at each pixel) or "features". Several kinds may share one.
    kind: ClassVar[str]

    size: tuple[int, int]  # H, W of the maps that are compared
    # (N, H, W) bool, the pixels that count, or float32, their weights; None = all
    valid: Tensor | None
    # What was given has another size, and the map is made by a resize.
    resized: bool = field(default=False, kw_only=True)
    # Features by layer, (N, C_b, H_b, W_b), of a target that brings them instead of a map.
    stored: Mapping[str, Tensor] | None = field(default=None, kw_only=True)
    # 0, where a compiled graph has to keep what looked at the values.
    seen: Tensor | None = field(default=None, kw_only=True)

    # (N, C, H, W) uint8, labels of single elements: where one is 2, both maps are 0 there alone.
    elements: Tensor | None = field(default=None, kw_only=True)

    @classmethod
    def takes(cls, given: object) -> bool:
        """Whether what the user gave is of this kind."""
        raise NotImplementedError

    @classmethod
    def resolve(
        cls,
        given: object,
        channels: int,
        o: Options,
        *,
        mask: Tensor | None,
        pred: Tensor | None,
        what: str,
    ) -> Self:
        """Validate what `takes` said yes to; see `resolve.resolve_target`."""
        raise NotImplementedError

    @property
    def data(self) -> Tensor:
        """The values, (N, ...): they say how many images there are, where and of which dtype."""
        raise NotImplementedError

    def activation(self, o: Options) -> str:
        """What a dense map still has to go through."""
        return o.target

    @property
    def encodable(self) -> bool:
        """Whether the fast path makes the features of `tensors` alone, without `map`."""
        return not self.resized and self.elements is None

    def map(self, activation: str, temperature: float, dtype: torch.dtype) -> Tensor:
        """The map ``y`` (N, C, H, W) by definition, 0 where not valid, unless it is `stored`; not
        weighted yet."""
        raise NotImplementedError

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What the fast path reads, by name, for a chain that computes in `dtype`."""
        return {} if self.valid is None else {"valid": self.valid.contiguous()}

    def fitted(self, dtype: torch.dtype) -> Self:
        """This target, whose weights of pixels were held to what maps of `dtype` hold.

        Raises:
            ValueError: one is too large.
        """
        seen = check_weights(self.valid, dtype)
        if seen is None:
            return self
        return replace(self, seen=seen if self.seen is None else self.seen + seen)

    def check(self, net: Network, o: Options, layers: Sequence[str]) -> None:
        """Raises: ValueError if `stored` features are not what this loss would have made."""


def check_like(
    t: Tensor, what: str, pred: Tensor | None, size: Sequence[int] | None = None
) -> None:
    """Hold a target (N, ...) of `size` (H, W), or of any, to the prediction (N, C, H, W).

    Raises:
        ValueError: another number of images, another size, or another device.
    """
    if pred is None:
        return
    if t.shape[0] != pred.shape[0]:
        raise ValueError(
            f"{what}: got {t.shape[0]} images, expected {pred.shape[0]}, as many as the "
            "prediction; slice or .expand() it"
        )
    if size is not None and tuple(size) != tuple(pred.shape[2:]):
        raise ValueError(
            f"{what}: got size {tuple(size)}, expected {tuple(pred.shape[2:])}, the prediction's; "
            "resize the prediction (F.interpolate) or the labels (mode='nearest')"
        )
    if t.device != pred.device:
        raise ValueError(f"{what}: got device {t.device}, expected {pred.device}; use .to(...)")
