"""Whatever the user gives, validated: targets, style targets, a segmentation's labels and teacher.

Errors say what was got, what is expected, and the way out.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gpl_fast.input_checks import TakesMaps, check_prediction, check_tensor
from gpl_fast.options import Options
from gpl_fast.targets.data import Batch, TargetFeatures
from gpl_fast.targets.dense import DenseTarget
from gpl_fast.targets.features import FeatureTarget
from gpl_fast.targets.labels import LabelTarget, check_labels, segmentation_labels
from gpl_fast.targets.masks import check_same_mask, normalise_mask, restricted
from gpl_fast.targets.target import Target
from gpl_fast.targets.topk import TopKTarget

# The first that takes what was given; the last takes any tensor, and says why not.
KINDS: tuple[type[Target], ...] = (FeatureTarget, TopKTarget, LabelTarget, DenseTarget)


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
        mask: (N, H, W) or (N, 1, H, W), bool or floating; of a dense target of another size also
            (N, h, w) or (N, 1, h, w).
        pred: (N, C, H, W) that the target must match; None = it may have any size.
        what: the argument's name, for errors.

    Raises:
        TypeError, ValueError: no kind takes it, or its own does not as it is.
    """
    if not isinstance(target, Batch):
        expected = "a tensor (floating maps or integer labels), gpl_fast.TopK or "
        check_tensor(what, target, f"{expected}gpl_fast.TargetFeatures")
    for kind in KINDS:
        if kind.takes(target):
            break
    return kind.resolve(target, channels, o, mask=mask, pred=pred, what=what)


def resolve_style(target: object, net: TakesMaps, o: Options, pred: Tensor) -> Target:
    """A style target, of any size, for the N images of `pred` (N, C, H, W) or one for all.

    Raises:
        TypeError, ValueError: as `resolve_target`; neither N images nor one; another device.
    """
    style = resolve_target(target, net.in_channels, o, what="style_target")
    if style.stored is None:
        net.shapes(*style.size)
    data = style.data
    if data.shape[0] not in (1, pred.shape[0]):
        raise ValueError(
            f"style_target: got {data.shape[0]} images, expected 1 or {pred.shape[0]}, as many as "
            "the prediction; slice or .expand() it"
        )
    if data.device != pred.device:
        raise ValueError(
            f"style_target: got device {data.device}, expected {pred.device}; use .to(...)"
        )
    return style


def resolve_labels(
    labels: object, mask: Tensor | None, logits: Tensor, net: TakesMaps, o: Options
) -> tuple[Tensor, Tensor | None]:
    """A segmentation's labels (N, H, W) int64, -1 = does not count, and its mask (N, H, W).

    Args:
        labels: (N, H, W) or (N, 1, H, W) of any integer dtype.
        mask: (N, H, W) or (N, 1, H, W), bool or floating.
        logits: (N, C, h, w), of the labels' size or smaller.

    Raises:
        TypeError, ValueError: of labels, mask or logits.
    """
    check_prediction(logits, net, needs_size=False)
    plane = segmentation_labels(labels, net.in_channels, logits)
    size = (plane.shape[1], plane.shape[2])
    net.shapes(*size)
    mask = normalise_mask(mask, plane.shape[0], size, plane.device)
    return check_labels(plane, mask, net.in_channels, o.ignored), mask


def count_labels(
    labels: object, mask: Tensor | None, channels: int, o: Options
) -> tuple[Tensor, Tensor | None]:
    """`resolve_labels` without the logits that the labels are of.

    Raises:
        TypeError, ValueError: as `resolve_labels`.
    """
    plane = segmentation_labels(labels, channels)
    mask = normalise_mask(mask, plane.shape[0], (plane.shape[1], plane.shape[2]), plane.device)
    return check_labels(plane, mask, channels, o.ignored), mask


def resolve_teacher(
    teacher: object,
    labels: Tensor,
    mask: Tensor | None,
    logits: Tensor,
    o: Options,
    gpl_ignore: bool | str,
) -> Target:
    """What a segmentation's perceptual term compares its logits with.

    Args:
        teacher: what `resolve_target` takes; None = the labels.
        labels, mask: as `resolve_labels` gives them.
        logits: (N, C, H, W), of the labels' size.
        gpl_ignore: as `gpl_fast.SegmentationLoss`.

    Raises:
        TypeError, ValueError: as `resolve_target`; stored features with ignored pixels in them
            where these are to leave.
    """
    counted, channels = labels >= 0, logits.shape[1]
    if mask is not None:
        counted = restricted(mask, counted)
    if teacher is None:
        valid = mask if gpl_ignore is False else counted
        return LabelTarget((labels.shape[1], labels.shape[2]), valid, labels, channels)
    if isinstance(teacher, TargetFeatures) and gpl_ignore is True:
        return _features_without_ignored(teacher, mask, counted, logits, o)
    given = counted if gpl_ignore is True else mask
    return resolve_target(teacher, channels, o, mask=given, pred=logits, what="teacher")


def _features_without_ignored(
    teacher: TargetFeatures, mask: Tensor | None, counted: Tensor, logits: Tensor, o: Options
) -> Target:
    """Stored features where ignored pixels are to leave the perceptual term: those pixels must have
    been left out when they were made."""
    target = resolve_target(teacher, logits.shape[1], o, pred=logits, what="teacher")
    without = "labels != ignore_index" + ("" if mask is None else " and the mask")
    message = (
        "gpl_ignore=True: got teacher features that were not made without this batch's ignored "
        f"pixels, expected encode(teacher, mask=...) with {without}; or gpl_ignore='auto', where a "
        "teacher speaks for ignored pixels too"
    )
    return replace(target, seen=check_same_mask(counted, teacher.valid, message))


def weights_of_pixels(target: Target, labels: Tensor, mask: Tensor) -> Tensor | None:
    """The weights that a cross-entropy takes of labels and mask as `resolve_labels` gives them, or
    None = 1.

    The target's own where they differ at pixels without a label alone, so that one map serves both:
    not those of a teacher that leaves out pixels of its own.
    """
    if mask.dtype == torch.bool:
        return None
    alike = target.kind == "dense" or target.data is labels
    return target.valid if alike and target.valid is not None else mask
