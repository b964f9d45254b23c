"""Any kind of target and its mask, validated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpl_fast import reference
from gpl_fast.input_checks import FLOAT_DTYPES, describe, is_integer
from gpl_fast.targets.features import TargetFeatures
from gpl_fast.targets.topk import TopK
from gpl_fast.targets.values import check_labels, check_topk, may_look


@dataclass(frozen=True)
class Target:
    """A target after validation: exactly one kind, and the pixels that count."""

    kind: str  # "dense", "labels", "topk" or "features"
    size: tuple[int, int]  # H, W of the maps that are compared
    valid: Tensor | None = None  # (N, H, W) bool
    dense: Tensor | None = None  # (N, C, h, w) as given
    labels: Tensor | None = None  # (N, H, W) int64, -1 = zero pixel
    topk: TopK | None = None  # indices int64, in range
    features: TargetFeatures | None = None
    channels: int = field(default=0)

    def map(self, activation: str, temperature: float, dtype: torch.dtype) -> Tensor:
        """The target's map ``y`` (N, C, H, W) by definition, 0 where not valid."""
        if self.dense is not None:
            y = reference.resize(self.dense.detach().to(dtype), self.size)
            y = reference.zero_invalid(y, self.valid)
            y = reference.activate(y, activation, temperature)
        elif self.labels is not None:
            y = reference.one_hot(self.labels, self.channels, dtype)
        else:
            assert self.topk is not None
            values, indices = self.topk.values.detach(), self.topk.indices
            values = reference.zero_invalid(values, self.valid)
            y = reference.dense_topk(values, indices, self.topk.rest, self.channels, dtype)
        return reference.zero_invalid(y, self.valid)


def resolve_target(
    target: object,
    channels: int,
    *,
    mask: Tensor | None = None,
    ignore_index: int | None = None,
    pred: Tensor | None = None,
) -> Target:
    """Validate whatever `target` is; see `gpl_fast.GenericPerceptualLoss` for the kinds.

    Args:
        target: floating (N, C, h, w), integer labels, TopK, or TargetFeatures.
        channels: C.
        mask: (N, H, W) or (N, 1, H, W) bool, True = valid.
        ignore_index: label of pixels that do not count.
        pred: (N, C, H, W) that the target must match; None for `encode`.

    Raises:
        TypeError, ValueError: as api.md lists, with what was got, expected, and the way out.
    """
    if isinstance(target, TargetFeatures):
        return _resolve_features(target, mask, pred)
    if isinstance(target, TopK):
        _check_like(target.values, "TopK target", pred, target.values.shape[2:])
        size = (int(target.values.shape[2]), int(target.values.shape[3]))
        mask = normalise_mask(mask, target.values.shape[0], size, target.values.device)
        indices, in_range = check_topk(
            target.values.detach(), target.indices, mask, channels, target.rest
        )
        # On the CPU out-of-range indices raise, so the mask alone decides; on CUDA they invalidate.
        keep = mask if indices.device.type in ("cpu", "meta") else in_range
        return Target(
            "topk",
            size,
            keep,
            topk=TopK(target.values, indices, target.rest),
            channels=channels,
        )
    if not isinstance(target, Tensor):
        raise TypeError(
            f"target: got {type(target).__name__}, expected a tensor (floating maps or integer "
            "labels), gpl_fast.TopK or gpl_fast.TargetFeatures"
        )
    if is_integer(target) or target.dtype == torch.bool:
        plane = label_plane(target, channels)
        _check_like(plane, "labels", pred, plane.shape[1:])
        size = (int(target.shape[-2]), int(target.shape[-1]))
        mask = normalise_mask(mask, target.shape[0], size, target.device)
        labels = check_labels(plane, mask, channels, ignore_index)
        valid = mask
        if ignore_index is not None or labels.device.type not in ("cpu", "meta"):
            valid = labels >= 0
        return Target("labels", size, valid, labels=labels, channels=channels)
    if target.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"target: got {target.dtype}, expected floating maps of {FLOAT_DTYPES} or integer "
            "labels; use .float() or .long()"
        )
    _check_dense(target, channels, pred)
    like = target if pred is None else pred
    size = (int(like.shape[2]), int(like.shape[3]))
    mask = normalise_mask(mask, target.shape[0], size, target.device)
    return Target("dense", size, mask, dense=target.detach(), channels=channels)


def normalise_mask(
    mask: Tensor | None, batch: int, size: tuple[int, int], device: torch.device
) -> Tensor | None:
    """(N, H, W) or (N, 1, H, W) bool -> (N, H, W) bool, checked."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(
            f"mask: got {describe(mask)}, expected torch.bool, True = valid; use (mask > 0)"
        )
    if tuple(mask.shape) not in ((batch, *size), (batch, 1, *size)):
        raise ValueError(
            f"mask: got shape {tuple(mask.shape)}, expected {(batch, *size)} or "
            f"{(batch, 1, *size)}, the prediction's size; resize it with mode='nearest'"
        )
    if mask.device != device:
        raise ValueError(f"mask: got device {mask.device}, expected {device}; use mask.to(...)")
    return _savable(mask).reshape(batch, *size)


def _resolve_features(target: TargetFeatures, mask: Tensor | None, pred: Tensor | None) -> Target:
    if pred is None:
        raise TypeError("encode: got TargetFeatures, which are encoded already")
    height, width = (int(v) for v in target.settings["size"])
    if (height, width) != tuple(pred.shape[2:]):
        raise ValueError(
            f"target features: got those of a {height} x {width} target, expected "
            f"{pred.shape[2]} x {pred.shape[3]}, the prediction's size; encode the target again"
        )
    first = next(iter(target.features.values()))
    _check_like(first, "target features", pred, None)
    mask = normalise_mask(mask, len(target), (height, width), pred.device)
    if mask is not None:
        stored = target.mask
        if stored is None or (may_look(mask) and not torch.compiler.is_compiling()
                              and not torch.equal(mask, stored)):  # fmt: skip
            raise ValueError(
                "mask: got one that differs from the mask the target features were encoded with; "
                "leave it out (the stored one is used), or encode(target, mask=mask) again"
            )
    valid = None if target.valid is None else _savable(target.valid)
    return Target("features", (height, width), valid, features=target)


def label_plane(labels: Tensor, channels: int) -> Tensor:
    """Labels (N, H, W) or (N, 1, H, W) -> (N, H, W).

    Raises:
        ValueError: another shape; one-hot labels, with the way out.
    """
    if labels.dim() == 4 and labels.shape[1] == channels and channels > 1:
        raise ValueError(
            f"labels: got {tuple(labels.shape)}, which looks one-hot, expected class indices "
            "(N, H, W); use labels.argmax(dim=1)"
        )
    if labels.dim() not in (3, 4) or (labels.dim() == 4 and labels.shape[1] != 1):
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)}, expected (N, H, W) or (N, 1, H, W); one "
            "image: use labels.unsqueeze(0)"
        )
    return labels.squeeze(1) if labels.dim() == 4 else labels


def _check_dense(target: Tensor, channels: int, pred: Tensor | None) -> None:
    if target.dim() == 3 or (target.dim() == 4 and target.shape[1] == 1 and channels > 1):
        raise ValueError(
            f"target: got {target.dtype} {tuple(target.shape)}, expected floating maps "
            f"(N, {channels}, h, w) or integer labels (N, H, W); labels must be integers: use "
            "labels.long()"
        )
    if target.dim() != 4 or target.shape[1] != channels:
        raise ValueError(
            f"target: got shape {tuple(target.shape)}, expected (N, {channels}, h, w), the "
            "prediction's channels; map a teacher of other classes to the student's first, such as "
            "teacher[:, [class of each student class]]"
        )
    if min(target.shape[2:]) < 1:
        raise ValueError(f"target: got an empty map {tuple(target.shape)}")
    _check_like(target, "target", pred, None)


def _check_like(t: Tensor, what: str, pred: Tensor | None, size: Sequence[int] | None) -> None:
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


def _savable(mask: Tensor) -> Tensor:
    """A copy of a tensor made under `torch.inference_mode`, which no graph may save."""
    if torch.compiler.is_compiling() or not mask.is_inference():
        return mask
    return mask.clone()
