"""Any kind of target and its mask, validated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

import torch
from torch import Tensor

from gpl_fast import reference
from gpl_fast.input_checks import (
    FLOAT_DTYPES,
    check_tensor,
    describe,
    is_integer,
    way_out_of_shape,
)
from gpl_fast.options import Options
from gpl_fast.targets.features import TargetFeatures
from gpl_fast.targets.topk import TopK
from gpl_fast.targets.values import (
    check_dense,
    check_labels,
    check_same_mask,
    check_topk,
    may_look,
    refuse_dense,
)


@dataclass(frozen=True)
class Target:
    """A target after validation: exactly one kind, and the pixels that count."""

    kind: str  # "dense", "labels", "topk" or "features"
    size: tuple[int, int]  # H, W of the maps that are compared
    valid: Tensor | None = None  # (N, H, W) bool
    dense: Tensor | None = None  # (N, C, h, w) as given
    dense_valid: Tensor | None = None  # (N, h, w) bool, the mask of its own size if it is resized
    labels: Tensor | None = None  # (N, H, W) int64, -1 = zero pixel
    topk: TopK | None = None  # indices int64, in range
    features: TargetFeatures | None = None
    channels: int = field(default=0)
    seen: Tensor | None = None  # 0, where a compiled graph has to keep what looked at it

    def map(self, activation: str, temperature: float, dtype: torch.dtype) -> Tensor:
        """The target's map ``y`` (N, C, H, W) by definition, 0 where not valid."""
        if self.dense is not None:
            y = reference.resize(self.dense.detach().to(dtype), self.size, self.dense_valid)
            if activation == "softmax" and tuple(self.dense.shape[2:]) != self.size:
                y = y.clamp(min=torch.finfo(dtype).min)  # a mean may round to -inf
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
    o: Options,
    *,
    mask: Tensor | None = None,
    pred: Tensor | None = None,
    what: str = "target",
) -> Target:
    """Validate whatever `target` is; see `gpl_fast.GenericPerceptualLoss` for the kinds.

    Args:
        target: floating (N, C, h, w), integer labels, TopK, or TargetFeatures.
        channels: C.
        o: the loss' options.
        mask: (N, H, W) or (N, 1, H, W) bool, True = valid; of a dense target of another size also
            (N, h, w) or (N, 1, h, w).
        pred: (N, C, H, W) that the target must match; None for `encode`.
        what: the argument's name, for errors.

    Raises:
        TypeError, ValueError: as api.md lists, with what was got, expected, and the way out.
    """
    if isinstance(target, TargetFeatures):
        return _resolve_features(target, mask, pred)
    if isinstance(target, TopK):
        return _resolve_topk(target, channels, mask, pred)
    check_tensor(
        what,
        target,
        "a tensor (floating maps or integer labels), gpl_fast.TopK or gpl_fast.TargetFeatures",
    )
    assert isinstance(target, Tensor)
    if is_integer(target) or target.dtype == torch.bool:
        return _resolve_labels(target, channels, mask, pred, o.ignore_index)
    if target.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{what}: got {target.dtype}, expected floating maps of {FLOAT_DTYPES} or integer "
            "labels; use .float() or .long()"
        )
    _check_dense(target, channels, pred, what)
    return _resolve_dense(target.detach(), mask, pred, o, what)


def _resolve_dense(
    target: Tensor, mask: Tensor | None, pred: Tensor | None, o: Options, what: str
) -> Target:
    like = target if pred is None else pred
    size = (int(like.shape[2]), int(like.shape[3]))
    own = (int(target.shape[2]), int(target.shape[3]))
    n, device = target.shape[0], target.device
    own_valid: Tensor | None = None
    if own != size and _has_size(mask, own):
        own_valid = normalise_mask(mask, n, own, device)
        assert own_valid is not None
        valid: Tensor | None = reference.resize_mask(own_valid, size)
    else:
        valid = normalise_mask(mask, n, size, device)
    holes = own != size and valid is not None and own_valid is None
    looked_at = valid if own == size else own_valid
    seen = check_dense(target, looked_at, _unasked(o), holes, what)
    return Target(
        "dense", size, valid, dense=target, dense_valid=own_valid, channels=int(target.shape[1]),
        seen=seen,
    )  # fmt: skip


def _unasked(o: Options) -> str:
    """The activation that a dense target gets without having been asked for."""
    return o.target if o.target_activation == "auto" else "none"


def first_look(o: Options, **targets: tuple[object, Tensor | None]) -> bool:
    """Refuse targets (by name: target, mask) that hold probabilities, on a device where calls do
    not look: the one synchronisation of a loss' first call. Whether there was one to look at.

    Raises:
        ValueError: as `check_dense`.
    """
    looked = False
    for what, (t, mask) in targets.items():
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.is_meta or may_look(t):
            continue
        if t.is_cuda and torch.cuda.is_current_stream_capturing():
            continue
        valid = mask.reshape(-1, *t.shape[2:]) if _has_size(mask, tuple(t.shape[2:])) else None
        refuse_dense(t, valid, _unasked(o), False, what)
        looked = True
    return looked


def _has_size(mask: Tensor | None, size: tuple[int, ...]) -> TypeGuard[Tensor]:
    return isinstance(mask, Tensor) and mask.dim() in (3, 4) and tuple(mask.shape[-2:]) == size


def _resolve_topk(target: TopK, channels: int, mask: Tensor | None, pred: Tensor | None) -> Target:
    target = TopK(target.values, target.indices, target.rest)  # a mapped one was not checked
    _check_like(target.values, "TopK target", pred, target.values.shape[2:])
    size = (int(target.values.shape[2]), int(target.values.shape[3]))
    mask = normalise_mask(mask, target.values.shape[0], size, target.values.device)
    indices, in_range = check_topk(
        target.values.detach(), target.indices, mask, channels, target.rest
    )
    # On the CPU out-of-range indices raise, so the mask alone decides; on CUDA they invalidate.
    keep = mask if indices.device.type in ("cpu", "meta") else in_range
    topk = TopK(target.values, indices, target.rest)
    return Target("topk", size, keep, topk=topk, channels=channels)


def _resolve_labels(
    target: Tensor,
    channels: int,
    mask: Tensor | None,
    pred: Tensor | None,
    ignore_index: int | None,
) -> Target:
    plane = label_plane(target, channels)
    _check_like(plane, "labels", pred, plane.shape[1:])
    size = (int(target.shape[-2]), int(target.shape[-1]))
    mask = normalise_mask(mask, target.shape[0], size, target.device)
    labels = check_labels(plane, mask, channels, ignore_index)
    valid = mask
    if ignore_index is not None or labels.device.type not in ("cpu", "meta"):
        valid = labels >= 0
    return Target("labels", size, valid, labels=labels, channels=channels)


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
            f"{(batch, 1, *size)}, the prediction's size, or that of a dense target; resize it "
            "with mode='nearest'"
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
    seen = None
    if mask is not None:
        message = (
            "mask: got one that differs from the mask the target features were encoded with; "
            "leave it out (the stored one is used), or encode(target, mask=mask) again"
        )
        seen = check_same_mask(mask, target.mask, message)
    valid = None if target.valid is None else _savable(target.valid)
    return Target("features", (height, width), valid, features=target, seen=seen)


def label_plane(labels: Tensor, channels: int, multi_hot: str | None = None) -> Tensor:
    """Labels (N, H, W) or (N, 1, H, W) -> (N, H, W).

    Args:
        channels: C.
        multi_hot: what takes maps of several classes at a pixel, where the caller does not.

    Raises:
        ValueError: another shape; one-hot labels, with the way out.
    """
    if labels.dim() == 4 and labels.shape[1] == channels and channels > 1:
        raise ValueError(
            f"labels: got {tuple(labels.shape)}, a map for each class, expected class indices "
            "(N, H, W): of one-hot maps use labels.argmax(dim=1); of multi-hot maps (several "
            f"classes at a pixel) argmax would lose some: give labels.float() {multi_hot or 'here'}"
            " with activation='sigmoid', target_activation='none'; of images or other values give "
            ".float(), divided by 255 if that is their range"
        )
    if labels.dim() not in (3, 4) or (labels.dim() == 4 and labels.shape[1] != 1):
        way_out = "one image: use labels.unsqueeze(0)"
        if labels.dim() == 4 and labels.shape[3] == 1:
            way_out = "use labels.squeeze(-1)"
        elif labels.dim() == 4 and labels.shape[3] == channels:
            way_out = "one-hot maps with their classes last: use labels.argmax(-1)"
        elif labels.dim() in (4, 5):
            way_out = "a volume (N, D, H, W) goes through in slices: use labels.flatten(0, 1)"
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)}, expected (N, H, W) or (N, 1, H, W); "
            f"{way_out}"
        )
    return labels.squeeze(1) if labels.dim() == 4 else labels


def _check_dense(target: Tensor, channels: int, pred: Tensor | None, what: str) -> None:
    shape = tuple(target.shape)
    if channels > 1 and (target.dim() == 3 or (target.dim() == 4 and shape[1] == 1)):
        raise ValueError(
            f"{what}: got {target.dtype} {shape}, expected floating maps (N, {channels}, h, w) or "
            "integer labels (N, H, W); labels must be integers: use labels.long()"
        )
    if target.dim() != 4 or shape[1] != channels:
        way_out = way_out_of_shape(target, channels)
        if target.dim() == 4 and shape[3] != channels:
            way_out = (
                "map a teacher of other classes to the student's first, such as "
                "teacher[:, [class of each student class]]"
            )
        raise ValueError(
            f"{what}: got shape {shape}, expected (N, {channels}, h, w), the prediction's "
            f"channels; {way_out}"
        )
    if min(shape[2:]) < 1:
        raise ValueError(f"{what}: got an empty map {shape}, expected (N, {channels}, h, w)")
    _check_like(target, what, pred, None)


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
