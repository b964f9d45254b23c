"""What the user gives to a segmentation whose classes each have labels of their own."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gpl_fast.input_checks import REMAKE, TakesMaps, check_prediction, check_tensor, describe
from gpl_fast.options import Options
from gpl_fast.targets.labels import LabelTarget, check_beside_logits
from gpl_fast.targets.masks import normalise_mask
from gpl_fast.targets.multi_hot import IGNORED, MultiHotTarget, check_elements
from gpl_fast.targets.resolve import resolve_target, resolve_teacher
from gpl_fast.targets.target import Target


def resolve_elements(
    labels: object, mask: Tensor | None, logits: Tensor, net: TakesMaps, o: Options
) -> tuple[Tensor, Tensor | None]:
    """Labels (N, C, H, W) uint8: 0, 1, or 2 = does not count, and the mask (N, H, W).

    Args:
        labels: (N, C, H, W), of one class (N, H, W) too: bool, integers, or floating.
        mask: (N, H, W) or (N, 1, H, W), of all classes of a pixel.
        logits: (N, C, h, w), of the labels' size or smaller.

    Raises:
        TypeError, ValueError: of labels, mask or logits.
    """
    several = "of several classes use mode='multiclass' (one of them at a pixel) or 'multilabel' "
    check_prediction(
        logits, net, needs_size=False,
        remake=several + "(any number) with num_classes = {}" if net.in_channels == 1 else REMAKE,
    )  # fmt: skip
    maps = element_maps(labels, net.in_channels)
    check_beside_logits(maps, logits)
    net.shapes(maps.shape[2], maps.shape[3])
    return _checked(maps, mask, o)


def count_elements(
    labels: object, mask: Tensor | None, channels: int, o: Options
) -> tuple[Tensor, Tensor | None]:
    """`resolve_elements` without the logits that the labels are of."""
    return _checked(element_maps(labels, channels), mask, o)


def _checked(maps: Tensor, mask: Tensor | None, o: Options) -> tuple[Tensor, Tensor | None]:
    size = (maps.shape[2], maps.shape[3])
    mask = normalise_mask(mask, maps.shape[0], size, maps.device)
    counted = mask if mask is None or mask.dtype == torch.bool else mask > 0
    return check_elements(maps, counted, o.ignored), mask


def element_maps(labels: object, channels: int) -> Tensor:
    """Labels as (N, C, H, W).

    Raises:
        TypeError, ValueError: no tensor, complex numbers, another shape.
    """
    check_tensor("labels", labels, f"a tensor (N, {channels}, H, W) of 0, 1 and ignored labels")
    assert isinstance(labels, Tensor)
    if labels.is_complex():
        raise TypeError(f"labels: got {labels.dtype}, expected bool, integers or floats of 0 and 1")
    if channels == 1 and labels.dim() == 3:
        return labels.unsqueeze(1)
    if labels.dim() == 4 and labels.shape[1] == channels:
        return labels
    way_out = "of class indices use mode='multiclass', or one_hot them"
    if labels.dim() == 4 and labels.shape[3] == channels:
        way_out = "of maps with their classes last use labels.movedim(-1, 1)"
    elif channels == 1:
        way_out = "of several classes use mode='multilabel'"
    expected = "(N, H, W) or (N, 1, H, W)" if channels == 1 else f"(N, {channels}, H, W)"
    raise ValueError(
        f"labels: got shape {tuple(labels.shape)}, expected {expected}, a map for each class; "
        f"{way_out}"
    )


def resolve_element_teacher(
    teacher: object,
    labels: Tensor,
    mask: Tensor | None,
    logits: Tensor,
    o: Options,
    gpl_ignore: bool | str,
) -> Target:
    """What the perceptual term compares the logits with, as `resolve_teacher`.

    Args:
        labels, mask: as `resolve_elements` gives them.

    Raises:
        TypeError, ValueError: as `resolve_target`; a teacher that ignored elements cannot leave.
    """
    channels = labels.shape[1]
    if teacher is None:
        elements = None if gpl_ignore is False else labels
        return MultiHotTarget((labels.shape[2], labels.shape[3]), mask, labels, elements=elements)
    if channels == 1:  # an element is a pixel
        plane = torch.where(labels[:, 0] == IGNORED, -1, 0)
        return resolve_teacher(teacher, plane, mask, logits, o, gpl_ignore)
    given = teacher if isinstance(teacher, Tensor) and teacher.dim() == 4 else None
    if given is not None and LabelTarget.takes(given) and given.shape[1] == channels:
        raise ValueError(
            f"teacher: got {describe(teacher)}, expected floating maps (N, {channels}, h, w), or "
            "class indices (N, H, W); of a map of 0 and 1 for each class use teacher.float() with "
            'target_activation="none"'
        )
    target = resolve_target(teacher, channels, o, mask=mask, pred=logits, what="teacher")
    if gpl_ignore is not True:
        return target
    if target.kind != "dense":
        raise ValueError(
            f"gpl_ignore=True: got a teacher of {target.kind}, which no single elements can leave, "
            "expected a floating map (N, C, H, W); or gpl_ignore='auto', where a teacher speaks "
            "for ignored elements too"
        )
    return replace(target, elements=labels)
