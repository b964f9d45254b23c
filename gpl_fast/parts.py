"""The parts of each loss from checked options: resolve the targets, ask the engine, reduce."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gpl_fast import engine, reference
from gpl_fast.input_checks import check_prediction
from gpl_fast.layer_weights import as_layer_names
from gpl_fast.net.lossnet import LossNet
from gpl_fast.normalizer import Normalizer, NormalizerLike, as_normalizer, divided
from gpl_fast.options import Options
from gpl_fast.precision import accumulation_dtype, no_autocast
from gpl_fast.sharded import PLAIN, local
from gpl_fast.target_features import target_features
from gpl_fast.targets import (
    IGNORED,
    Target,
    TargetFeatures,
    TargetLike,
    count_elements,
    count_labels,
    feature_settings,
    normalise_mask,
    resolve_element_teacher,
    resolve_elements,
    resolve_labels,
    resolve_style,
    resolve_target,
    resolve_teacher,
    weights_of_pixels,
)
from gpl_fast.terms import BinaryCrossEntropy, CrossEntropy, Segmentation, Weights


def generic_value(
    pred: Tensor,
    target: TargetLike,
    mask: Tensor | None,
    net: LossNet,
    weights: Weights,
    o: Options,
) -> Tensor:
    """`functional.generic_perceptual_loss` by the weight of each layer."""
    if not (type(pred) is type(target) is Tensor and type(mask) in PLAIN):
        pred, target, mask = local(pred, target, mask)
    check_prediction(pred, net)
    resolved = resolve_target(target, net.in_channels, o, mask=mask, pred=pred)
    pred = reference.input_edge(pred)
    terms = engine.weighted_terms(pred, resolved, net, o, weights)
    return _reduce(terms.feature, o.reduction)


def segmentation_parts(
    logits: Tensor,
    labels: Tensor,
    net: LossNet,
    taps: Weights,
    o: Options,
    s: Segmentation,
    *,
    teacher: TargetLike | None,
    mask: Tensor | None,
    normalizer: NormalizerLike | None = None,
) -> dict[str, Tensor]:
    """The weighted terms of `functional.segmentation_loss`: ``{"loss_ce", "loss_gpl"}``."""
    plain = type(logits) is type(labels) is Tensor
    if not (plain and type(teacher) in PLAIN and type(mask) in PLAIN):
        logits, labels, teacher, mask = local(logits, labels, teacher, mask)
    divisor = None if normalizer is None else as_normalizer(normalizer, o.reduction)
    resolve, compared = segmentation_resolvers(s)
    checked, given = resolve(labels, mask, logits, net, o)
    logits = reference.input_edge(logits)
    with no_autocast(logits):
        logits = reference.resize(logits, checked.shape[-2:])
    target = compared(teacher, checked, given, logits, o, s.gpl_ignore)
    mask = None if given is None else weights_of_pixels(target, checked, given)
    classified = _classified(checked, mask, s) if s.ce_weight else None
    weights = taps if s.gpl_weight else Weights({}, {})
    terms = engine.weighted_terms(logits, target, net, o, weights, cross_entropy=classified)
    if terms.cross_entropy is None or terms.normalizer is None:  # not computed, but connected
        ce = _reduce(engine.nothing(logits), o.reduction)
    else:
        ce = _mean_cross_entropy(terms.cross_entropy, terms.normalizer, o.reduction, divisor)
        ce = s.ce_weight * ce
    gpl = _reduce(terms.feature, o.reduction, None if divisor is None else divisor.images)
    return {"loss_ce": ce, "loss_gpl": s.gpl_weight * gpl if s.gpl_weight else gpl}


def segmentation_resolvers(s: Segmentation) -> tuple[Callable[..., Any], Callable[..., Target]]:
    """Who checks the labels, and who finds what the logits are compared with."""
    if s.by_element:
        return resolve_elements, resolve_element_teacher
    return resolve_labels, resolve_teacher


def _classified(
    labels: Tensor, mask: Tensor | None, s: Segmentation
) -> CrossEntropy | BinaryCrossEntropy:
    """What the logits are classified as, of labels that are checked and the weights of pixels."""
    weight, of_ones = (
        None if w is None else w.to(labels.device) for w in (s.class_weight, s.pos_weight)
    )
    if s.by_element:
        return BinaryCrossEntropy(labels, weight, of_ones, s.label_smoothing, mask)
    return CrossEntropy(labels, weight, s.label_smoothing, mask)


def _mean_cross_entropy(
    total: Tensor, norm: Tensor, reduction: str, divisor: Normalizer | None
) -> Tensor:
    """Mean over valid pixels of the batch or over as many as the caller says, or of each image and
    then their sum.

    0 where what it is divided by is 0, of a batch by one divisor not where an image's own weights
    sum to 0: with label smoothing `total`, whose smoothed part weighs every class, is none there.
    """
    if divisor is not None:
        return divided(total.sum(), divisor.pixels)
    if reduction == "mean":
        total, norm = total.sum(), norm.sum()
    mean = divided(total, norm)
    return mean.sum() if reduction == "sum" else mean


def count(
    labels: Tensor, mask: Tensor | None, channels: int, o: Options, s: Segmentation
) -> Tensor:
    """`SegmentationLoss.count`."""
    labels, mask = local(labels, mask)
    if s.by_element:
        checked, given = count_elements(labels, mask, channels, o)
        counted = (checked != IGNORED).sum(dim=1).double()
    else:
        checked, given = count_labels(labels, mask, channels, o)
        counted = (checked >= 0).double()
        if s.class_weight is not None:
            counted *= s.class_weight.to(counted)[checked.clamp_min(0)]
    if given is not None:
        counted *= torch.where(reference.counted(given), given, 0)
    pixels = counted.sum()
    return torch.stack([pixels, torch.full_like(pixels, checked.shape[0])])


def perceptual_parts(
    pred: Tensor,
    target: TargetLike,
    net: LossNet,
    o: Options,
    *,
    style_target: TargetLike | None,
    mask: Tensor | None,
    weights: Weights,
    tv_weight: float,
) -> dict[str, Tensor]:
    """The weighted terms of `functional.perceptual_loss`: ``{"loss_feature", "loss_style",
    "loss_tv"}``."""
    plain = type(pred) is type(target) is Tensor
    if not (plain and type(style_target) in PLAIN and type(mask) in PLAIN):
        pred, target, style_target, mask = local(pred, target, style_target, mask)
    check_prediction(pred, net)
    resolved = resolve_target(target, net.in_channels, o, mask=mask, pred=pred)
    style = None if style_target is None else resolve_style(style_target, net, o, pred)
    pred = reference.input_edge(pred)
    terms = engine.weighted_terms(pred, resolved, net, o, weights, style_target=style)
    feature = _reduce(terms.feature, o.reduction)
    if tv_weight:
        tv = total_variation(pred, resolved.valid, o)
        tv = tv_weight * _reduce(tv, o.reduction)
    else:
        tv = torch.zeros_like(feature)
    style_part = _reduce(terms.style, o.reduction)
    return {"loss_feature": feature, "loss_style": style_part, "loss_tv": tv}


def total_variation(pred: Tensor, valid: Tensor | None, o: Options) -> Tensor:
    """Of the activated prediction (N, C, H, W), where valid (N, H, W): (N,)."""
    with no_autocast(pred):
        wide = pred.to(accumulation_dtype(pred.dtype))
        y = reference.prediction_map(wide, o.activation, o.constant_temperature, valid)
        return reference.total_variation(y, valid)


def sum_of_parts(parts: Mapping[str, Tensor]) -> Tensor:
    """The total, added in order."""
    first, *rest = parts.values()
    for part in rest:
        first = first + part
    return first


@torch.inference_mode(False)  # a teacher's loop may be in it; its tensors cannot enter a graph
@torch.no_grad()
def encode_target(
    target: TargetLike, mask: Tensor | None, net: LossNet, layers: Sequence[str], o: Options
) -> TargetFeatures:
    """`functional.encode`."""
    target, mask = local(target, mask)
    o.check_channels(net.in_channels)
    layers = as_layer_names(net, layers)
    resolved = resolve_target(target, net.in_channels, o, mask=mask)
    if resolved.stored is not None:
        raise TypeError("encode: got TargetFeatures, which are encoded already")
    net.shapes(*resolved.size)
    data = resolved.data
    dtype = o.compute_dtype or accumulation_dtype(data.dtype)
    features = target_features(resolved, net, layers, o, dtype)
    given = normalise_mask(mask, data.shape[0], resolved.size, data.device)
    # Copies: the caller's mask may change, the features would not.
    kept = [None if m is None else m.clone() for m in (given, resolved.valid)]
    return TargetFeatures(features, feature_settings(net, o, resolved.size), *kept)


def _reduce(values: Tensor, reduction: str, images: float | Tensor | None = None) -> Tensor:
    """Of each image (N,); a mean over as many `images` as the caller says, or over N."""
    if reduction == "none":
        return values
    total = values.sum()
    if images is not None:
        return divided(total, images)
    return total / max(values.shape[0], 1) if reduction == "mean" else total
