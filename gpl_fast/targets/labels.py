"""Labels: one class at each pixel, or a mask of zeros and ones for one channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from gpl_fast import reference
from gpl_fast.input_checks import check_tensor, is_integer
from gpl_fast.options import Options
from gpl_fast.targets import values
from gpl_fast.targets.masks import normalise_mask, restricted
from gpl_fast.targets.target import Target, check_like


@dataclass(frozen=True)
class LabelTarget(Target):
    """The map that is 1 at each pixel's class and 0 elsewhere."""

    kind = "labels"

    labels: Tensor  # (N, H, W) int64, -1 = zero pixel
    channels: int

    @classmethod
    def takes(cls, given: object) -> bool:
        return isinstance(given, Tensor) and (is_integer(given) or given.dtype == torch.bool)

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
        assert isinstance(given, Tensor)
        plane = label_plane(given, channels)
        check_like(plane, "labels", pred, plane.shape[1:])
        size = (plane.shape[1], plane.shape[2])
        mask = normalise_mask(mask, plane.shape[0], size, plane.device)
        labels = check_labels(plane, mask, channels, o.ignored)
        valid = mask
        if o.ignored or labels.device.type not in ("cpu", "meta"):
            valid = restricted(mask, labels >= 0)
        return cls(size, valid, labels, channels)

    @property
    def data(self) -> Tensor:
        return self.labels

    def map(self, activation: str, temperature: float, dtype: torch.dtype) -> Tensor:
        y = reference.one_hot(self.labels, self.channels, dtype)
        return reference.zero_invalid(y, self.valid)

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        labels = self.labels.contiguous()
        # One channel: value 1 is the first class and value 0 none, so the map is the label itself.
        return super().tensors(dtype) | {"labels": labels - 1 if self.channels == 1 else labels}


def label_plane(
    labels: Tensor,
    channels: int,
    multi_hot: str = "give labels.float() with activation='sigmoid', target_activation='none'",
) -> Tensor:
    """Labels (N, H, W) or (N, 1, H, W) -> (N, H, W).

    Args:
        channels: C.
        multi_hot: the way out of maps of several classes at a pixel.

    Raises:
        ValueError: another shape; one-hot labels, with the way out.
    """
    if labels.dim() == 4 and labels.shape[1] == channels and channels > 1:
        raise ValueError(
            f"labels: got {tuple(labels.shape)}, a map for each class, expected class indices "
            "(N, H, W): of one-hot maps use labels.argmax(dim=1); of multi-hot maps (several "
            f"classes at a pixel) argmax would lose some: {multi_hot}; of images or other values "
            "give .float(), divided by 255 if that is their range"
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


def segmentation_labels(labels: object, channels: int, logits: Tensor | None = None) -> Tensor:
    """Labels (N, H, W) of C classes, and of logits (N, C, h, w), for `check_labels`.

    Raises:
        TypeError, ValueError: what no resize of the logits brings together with them.
    """
    check_tensor(
        "labels", labels, "an integer tensor (N, H, W); soft or stored targets go to teacher="
    )
    assert isinstance(labels, Tensor)
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(
            f"labels: got {labels.dtype}, expected integers (N, H, W); use labels.long(), or "
            "teacher= for soft targets"
        )
    labels = label_plane(labels, channels, "use mode='multilabel'")
    if logits is not None:
        check_beside_logits(labels, logits)
    return labels


def check_beside_logits(labels: Tensor, logits: Tensor) -> None:
    """Hold labels (N, …, H, W) to logits (N, C, h, w) that are resized to them.

    Raises:
        ValueError: another number of images, a smaller size, or another device.
    """
    size = tuple(labels.shape[-2:])
    if labels.shape[0] != logits.shape[0]:
        raise ValueError(
            f"labels: got {labels.shape[0]} images, expected {logits.shape[0]}, as many as logits; "
            "slice or .expand() them"
        )
    if size[0] < logits.shape[2] or size[1] < logits.shape[3]:
        raise ValueError(
            f"labels: got size {size}, expected {tuple(logits.shape[2:])} or "
            "larger (logits are resized up to the labels, never down); resize the labels with "
            "mode='nearest'"
        )
    if labels.device != logits.device:
        raise ValueError(
            f"labels: got device {labels.device}, expected {logits.device}; use .to(...)"
        )


def check_labels(
    labels: Tensor, mask: Tensor | None, channels: int, ignored: Sequence[int]
) -> Tensor:
    """Labels (N, H, W) of any integer dtype -> int64 with -1 at pixels that do not count: those of
    an `ignored` label, and outside of the mask.

    Raises:
        ValueError: a counted label outside ``[0, C)``, on the CPU; on CUDA, where looking costs a
            synchronisation, only with ``GPL_FAST_CHECK=1``: else that pixel does not count.
    """
    mask = None if mask is None else reference.counted(mask)
    out: Tensor = torch.ops.gpl_fast.check_labels(labels, mask, channels, ignored)
    return out


def _look(labels: Tensor, mask: Tensor | None, channels: int, ignored: Sequence[int]) -> Tensor:
    out = labels.to(torch.int64, copy=True, memory_format=torch.contiguous_format)
    skip = torch.zeros_like(out, dtype=torch.bool) if mask is None else ~mask
    for index in ignored:
        skip |= out == index
    out.masked_fill_(skip, -1)
    highest = max(channels, 2) - 1  # one channel: masks with values 0 and 1
    wrong = ((out < 0) & ~skip) | (out > highest)
    if values.may_look(labels) and bool(wrong.any()):
        found = torch.unique(out[wrong])
        raise ValueError(
            f"labels: got {int(wrong.sum())} pixels outside [0, {highest}], such as "
            f"{found[:5].tolist()}, expected classes in [0, {highest}]"
            + (f" or ignore_index={given_labels(ignored)}" if ignored else "")
            + _way_out(channels)
        )
    return out.masked_fill_(wrong, -1)


def given_labels(ignored: Sequence[int]) -> int | tuple[int, ...]:
    """As the user wrote them."""
    return ignored[0] if len(ignored) == 1 else tuple(ignored)


def _way_out(channels: int) -> str:
    if channels == 1:
        return (
            " of a mask; use (labels > 0) for a mask of other values, .float() for a map of values "
            "such as depth, and ignore_index= or mask= only for pixels that do not count"
        )
    return "; pass ignore_index= for pixels that do not count, or mask="


def _fake(labels: Tensor, mask: Tensor | None, channels: int, ignored: Sequence[int]) -> Tensor:
    return labels.new_empty(labels.shape, dtype=torch.int64)


values.define(
    "check_labels(Tensor labels, Tensor? mask, int channels, int[] ignored) -> Tensor",
    _look,
    _fake,
)
