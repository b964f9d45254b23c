"""What a prediction is compared with: dense maps, labels, top-k maps, stored features, masks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from gpl_fast import reference
from gpl_fast.files import read_safetensors
from gpl_fast.label_checks import check_labels, check_topk, may_look

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
RESTS = ("renormalize", "uniform", "drop")


@dataclass(frozen=True)
class TopK:
    """A target map stored sparsely: the k largest classes of each pixel.

    Args:
        values: (N, k, H, W) floating, >= 0 and finite; duplicates in a pixel add up.
        indices: (N, k, H, W) integer classes in ``[0, C)``.
        rest: where the mass that is not listed goes: "renormalize" (values / their sum; a sum of
            0 gives a zero pixel), "uniform" (spread over the classes that are not listed) or
            "drop".

    Raises:
        TypeError: values are not floating or indices not integer.
        ValueError: the shapes differ or are not 4-d; an unknown `rest`.
    """

    values: Tensor
    indices: Tensor
    rest: str = "renormalize"

    def __post_init__(self) -> None:
        if not isinstance(self.values, Tensor) or self.values.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"TopK: values: got {_describe(self.values)}, expected a floating tensor "
                "(N, k, H, W), such as probabilities.topk(k, dim=1).values"
            )
        if not isinstance(self.indices, Tensor) or not _is_integer(self.indices):
            raise TypeError(
                f"TopK: indices: got {_describe(self.indices)}, expected an integer tensor "
                "(N, k, H, W), such as probabilities.topk(k, dim=1).indices"
            )
        if self.values.dim() != 4 or self.values.shape != self.indices.shape:
            raise ValueError(
                f"TopK: got values {tuple(self.values.shape)} and indices "
                f"{tuple(self.indices.shape)}, expected both (N, k, H, W)"
            )
        if self.rest not in RESTS:
            raise ValueError(f"TopK: rest: got {self.rest!r}, expected one of {RESTS}")


@dataclass(frozen=True)
class TargetFeatures:
    """φ(target), computed once by `encode`: usable as a target, and stored in 300 times less.

    Attributes:
        features: ``{layer: (N, C_b, H_b, W_b)}``.
        settings: fingerprint, target activation, temperature and input size they were made with.
        mask: (N, H, W) bool as given to `encode`, or None.
        valid: (N, H, W) bool, `mask` without ignored labels, or None; used for the prediction too.
    """

    features: Mapping[str, Tensor]
    settings: Mapping[str, Any]
    mask: Tensor | None = None
    valid: Tensor | None = None

    def save(self, path: str | PathLike[str]) -> None:
        """Write to a safetensors file."""
        from safetensors.torch import save_file

        tensors = {f"feature.{k}": v.detach().cpu() for k, v in self.features.items()}
        for name in ("mask", "valid"):
            if (t := getattr(self, name)) is not None:
                tensors[name] = t.cpu()
        tensors = {k: v.contiguous().clone() for k, v in tensors.items()}
        header = json.dumps({"settings": dict(self.settings), "layers": list(self.features)})
        save_file(tensors, str(path), metadata={"gpl_fast.features": header})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> TargetFeatures:
        """Read what `save` wrote, onto the CPU; nothing is unpickled.

        Raises:
            ValueError: not a safetensors file, truncated, or not of TargetFeatures.
        """
        header, tensors = read_safetensors(path, "gpl_fast.features", "TargetFeatures.save")
        try:
            features = {name: tensors.pop(f"feature.{name}") for name in header["layers"]}
            settings = dict(header["settings"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: features are missing or malformed: {error!r}") from error
        loaded = cls(features, settings, tensors.pop("mask", None), tensors.pop("valid", None))
        height, width = _check_size_entry(path, settings)
        batch = {t.shape[0] for t in features.values() if t.dim() == 4}
        masks = [t for t in (loaded.mask, loaded.valid) if t is not None]
        if tensors or len(batch) != 1 or not all(t.dim() == 4 for t in features.values()):
            raise ValueError(f"{path}: expected features (N, C, H, W) of one batch size only")
        shape = (batch.pop(), height, width)
        if any(tuple(t.shape) != shape or t.dtype != torch.bool for t in masks):
            raise ValueError(f"{path}: expected masks {shape} of torch.bool")
        return loaded

    def to(self, *args: Any, **kwargs: Any) -> TargetFeatures:
        """The same on another device, or with features of another dtype, as ``Tensor.to``."""
        features = {k: v.to(*args, **kwargs) for k, v in self.features.items()}
        device = next(iter(features.values())).device
        mask = None if self.mask is None else self.mask.to(device)
        valid = None if self.valid is None else self.valid.to(device)
        return TargetFeatures(features, self.settings, mask, valid)

    def __len__(self) -> int:
        return int(next(iter(self.features.values())).shape[0])

    def __getitem__(self, index: int | slice | Tensor) -> TargetFeatures:
        """Some images of the batch (an integer keeps the batch dimension)."""
        if isinstance(index, int) and not -len(self) <= index < len(self):
            raise IndexError(f"TargetFeatures: got image {index}, expected one of {len(self)}")
        i = slice(index, index + 1 or None) if isinstance(index, int) else index
        features = {k: v[i] for k, v in self.features.items()}
        mask = None if self.mask is None else self.mask[i]
        valid = None if self.valid is None else self.valid[i]
        return TargetFeatures(features, self.settings, mask, valid)

    @staticmethod
    def cat(items: Sequence[TargetFeatures]) -> TargetFeatures:
        """One batch of several: what a DataLoader's `collate_fn` needs.

        Raises:
            ValueError: nothing given, or settings or layers that differ.
        """
        made = [(dict(x.settings), list(x.features)) for x in items]
        if not made or any(m != made[0] for m in made):
            raise ValueError("TargetFeatures.cat: expected features made with the same settings")
        features = {k: torch.cat([x.features[k] for x in items]) for k in items[0].features}
        return TargetFeatures(
            features, items[0].settings, _cat_masks(items, "mask"), _cat_masks(items, "valid")
        )


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
    if _is_integer(target) or target.dtype == torch.bool:
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
            f"mask: got {_describe(mask)}, expected torch.bool, True = valid; use (mask > 0)"
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


def _check_size_entry(path: object, settings: Mapping[str, Any]) -> tuple[int, int]:
    size = settings.get("size")
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(v, int) for v in size)):
        raise ValueError(f"{path}: its settings hold no input size")
    return size[0], size[1]


def _cat_masks(items: Sequence[TargetFeatures], name: str) -> Tensor | None:
    masks = [getattr(x, name) for x in items]
    if all(m is None for m in masks):
        return None
    filled = []
    for x, m in zip(items, masks, strict=True):
        device = next(iter(x.features.values())).device
        ones = torch.ones(len(x), *x.settings["size"], dtype=torch.bool, device=device)
        filled.append(ones if m is None else m)
    return torch.cat(filled)


def _savable(mask: Tensor) -> Tensor:
    """A copy of a tensor made under `torch.inference_mode`, which no graph may save."""
    if torch.compiler.is_compiling() or not mask.is_inference():
        return mask
    return mask.clone()


def _is_integer(t: Tensor) -> bool:
    return not t.is_floating_point() and not t.is_complex() and t.dtype != torch.bool


def _describe(x: object) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
