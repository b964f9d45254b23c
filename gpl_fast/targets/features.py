"""Stored features: a target that went through the network already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from gpl_fast.options import Options
from gpl_fast.targets import values
from gpl_fast.targets.data.features import TargetFeatures
from gpl_fast.targets.masks import check_same_mask, normalise_mask, savable
from gpl_fast.targets.target import Network, Target, check_like


@dataclass(frozen=True)
class EncodedTarget(Target):
    """φ of a map; `stored` are the tensors."""

    kind = "features"

    @property
    def data(self) -> Tensor:
        assert self.stored is not None
        return next(iter(self.stored.values()))

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        assert self.stored is not None
        return super().tensors(dtype) | {
            f"feature.{name}": e.detach().to(dtype).permute(0, 2, 3, 1).contiguous()
            for name, e in self.stored.items()
        }


@dataclass(frozen=True)
class FeatureTarget(EncodedTarget):
    """Those that the user stored, which have to be what this loss would have made."""

    features: TargetFeatures

    @classmethod
    def takes(cls, given: object) -> bool:
        return isinstance(given, TargetFeatures)

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
        assert isinstance(given, TargetFeatures)
        height, width = given.settings["size"]
        if pred is None:  # of any size: no pixel of a prediction is compared with one of these
            return cls((height, width), None, given, stored=given.features)
        seen = check_size(pred, (height, width))
        height, width = pred.shape[2:]
        check_like(next(iter(given.features.values())), "target features", pred)
        mask = normalise_mask(mask, len(given), (height, width), pred.device)
        if mask is not None:
            message = (
                "mask: got one that differs from the mask the target features were encoded with; "
                "leave it out (the stored one is used), or encode(target, mask=mask) again"
            )
            same = check_same_mask(mask, given.mask, message)
            seen = same if seen is None or same is None else seen + same
        valid = None if given.valid is None else savable(given.valid)
        return cls((height, width), valid, given, stored=given.features, seen=seen)

    def check(self, net: Network, o: Options, layers: Sequence[str]) -> None:
        settings, found = self.features.settings, self.features.features
        expected = feature_settings(net, o, settings["size"])  # which `check_size` has looked at
        for name in {**expected, **settings}:
            want = expected.get(name)
            if settings.get(name) != want:
                raise ValueError(
                    f"target features: {name}: got {settings.get(name)!r}, expected {want!r}, this "
                    "loss' own; encode the target again with this loss"
                )
        missing = [layer for layer in layers if layer not in found]
        if missing:
            raise ValueError(
                f"target features: got levels {list(found)}, expected also {missing}; encode the "
                "target again with this loss"
            )
        shapes = net.shapes(*self.size)
        for layer in layers:
            if layer in shapes and tuple(found[layer].shape[1:]) != shapes[layer]:
                raise ValueError(
                    f"target features: {layer}: got shape {tuple(found[layer].shape)}, expected "
                    f"(N, {', '.join(map(str, shapes[layer]))})"
                )


def check_size(pred: Tensor, size: tuple[int, int]) -> Tensor | None:
    """Hold the prediction (N, C, H, W) to the size that stored features were made at.

    Returns:
        In a compiled graph, which takes any H and W and this size as it is, a 0 that has to reach
        the result, or the graph would leave the look out; else None.

    Raises:
        ValueError: another size.
    """
    if torch.compiler.is_compiling():
        seen: Tensor = torch.ops.gpl_fast.check_size(pred.detach(), size)
        return seen
    _refuse_size(pred, size)
    return None


def _refuse_size(pred: Tensor, size: Sequence[int]) -> None:
    if tuple(size) != tuple(pred.shape[2:]):
        raise ValueError(
            f"target features: got those of a {size[0]} x {size[1]} target, expected "
            f"{pred.shape[2]} x {pred.shape[3]}, the prediction's size; encode the target again"
        )


def _look(pred: Tensor, size: list[int]) -> Tensor:
    _refuse_size(pred, size)
    return _fake(pred, size)


def _fake(pred: Tensor, size: list[int]) -> Tensor:
    return pred.new_zeros((), dtype=torch.float32)


values.define("check_size(Tensor pred, SymInt[] size) -> Tensor", _look, _fake)


def feature_settings(net: Network, o: Options, size: Sequence[int]) -> dict[str, Any]:
    """What stored features must agree in with the loss that uses them."""
    return {
        "fingerprint": net.fingerprint(),
        "activation": o.target,
        "temperature": o.target_temperature,
        "size": list(size),
    }
