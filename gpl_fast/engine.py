"""Reference or fast: the weighted terms of each image, and the features of a target.

What comes in is checked (`gpl_fast.parts`); what goes out is not reduced yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpl_fast import backend as backends
from gpl_fast import reference
from gpl_fast.description import describe
from gpl_fast.fast import operator
from gpl_fast.layer_weights import check_channels
from gpl_fast.net.lossnet import LossNet
from gpl_fast.options import Options
from gpl_fast.precision import accumulation_dtype, has_autocast, no_autocast
from gpl_fast.target_features import encoded, target_features
from gpl_fast.targets import Target
from gpl_fast.terms import BinaryCrossEntropy, CrossEntropy, Terms, Weights


def weighted_terms(
    pred: Tensor,
    target: Target,
    net: LossNet,
    o: Options,
    weights: Weights,
    *,
    style_target: Target | None = None,
    cross_entropy: CrossEntropy | BinaryCrossEntropy | None = None,
) -> Terms:
    """The terms of `pred` (N, C, H, W), on the backend that is chosen.

    Args:
        weights: without any, nothing is compared.
        style_target: of the styles; None = `target`.
        cross_entropy: what `pred` is classified as: on the fast path it shares the passes.

    Raises:
        ValueError: stored features of other settings.
        BackendUnavailable: ``backend="fast"`` where it cannot run.
    """
    compared = bool(weights.features or weights.styles)
    dtype = compute_dtype(pred, target, o)
    if dtype == torch.float16:
        target = target.fitted(dtype)
    if compared and choose_backend(pred, dtype, net, o).name == "fast":
        return _fast(pred, target, style_target, net, o, weights, dtype, cross_entropy)
    classified = () if cross_entropy is None else _cross_entropy(pred, cross_entropy)
    if compared:
        feature, style = _reference(pred, target, style_target, net, o, weights, dtype)
    else:
        feature = style = nothing(pred)
    return Terms(feature, style, *classified)


def _fast(
    pred: Tensor,
    target: Target,
    style_target: Target | None,
    net: LossNet,
    o: Options,
    weights: Weights,
    dtype: torch.dtype,
    cross_entropy: CrossEntropy | BinaryCrossEntropy | None,
) -> Terms:
    if weights.distance.normalize:
        target = encoded(target, net, o, weights, dtype)
    tensors = _fast_tensors(pred, target, net, o, weights, dtype)
    if style_target is None:
        style_features = target.stored or {}
    else:
        style_features = target_features(style_target, net, tuple(weights.styles), o, dtype)
    for name in weights.styles:
        if name in style_features:
            tensors[f"gram.{name}"] = reference.gram(style_features[name].detach().float())
    smoothing = None
    if cross_entropy is not None:
        smoothing = cross_entropy.label_smoothing
        if isinstance(cross_entropy, BinaryCrossEntropy):
            tensors |= cross_entropy.tensors()
        elif tensors.get("labels") is not cross_entropy.labels:  # the operator takes none twice
            tensors["ce_labels"] = cross_entropy.labels
        if cross_entropy.class_weight is not None:
            tensors["class_weight"] = cross_entropy.class_weight.float()
        own = cross_entropy.mask is not target.valid
        if cross_entropy.mask is not None and own:  # the operator takes none twice
            tensors["ce_mask"] = cross_entropy.mask.contiguous()
    if target.elements is not None:
        tensors["multi_hot"] = target.elements
    if "multi_hot" in tensors and tensors.get("dense") is tensors["multi_hot"]:
        del tensors["dense"]  # nor here
    call = describe(
        net, o, target, weights, pred.device, dtype, tuple(tensors), smoothing,
        weighed=cross_entropy is not None and cross_entropy.mask is not None,
    )  # fmt: skip
    terms = operator.perceptual_terms(pred, tensors, call, cross_entropy is not None)
    seen = _seen(target, style_target)
    terms = terms if isinstance(seen, int) else terms + seen
    classified = () if cross_entropy is None else (terms[2], terms[3])
    return Terms(terms[0], terms[1], *classified)


def _fast_tensors(
    pred: Tensor, target: Target, net: LossNet, o: Options, weights: Weights, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The target's tensors and the weights of channels, by name."""
    if target.stored is not None:
        target.check(net, o, (*weights.features, *weights.styles))
    tensors = target.tensors(dtype)
    for name, c in weights.channels.items():
        tensors[f"weight.{name}"] = c.to(pred.device, torch.float32)
    return tensors


def fast_maps(
    pred: Tensor, target: Target, net: LossNet, o: Options, weights: Weights, dtype: torch.dtype
) -> Tensor:
    """Of normalised features the distance of each pixel, layer by layer, (N, Σ H_b W_b) float32."""
    target = encoded(target, net, o, weights, dtype)
    tensors = _fast_tensors(pred, target, net, o, weights, dtype)
    call = describe(net, o, target, weights, pred.device, dtype, tuple(tensors), spatial=True)
    return operator.perceptual_terms(pred, tensors, call, False)


def _reference(
    pred: Tensor,
    target: Target,
    style_target: Target | None,
    net: LossNet,
    o: Options,
    weights: Weights,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    acc = accumulation_dtype(pred.dtype)
    with no_autocast(pred):
        e_target = target_features(target, net, tuple(weights.features), o, dtype)
        e_style = target_features(style_target or target, net, tuple(weights.styles), o, dtype)
        y = reference_input(pred, target, net, o, dtype)
        check_channels(weights, e_target)
        parts = reference.perceptual_terms(
            y, net.features, e_target, e_style, weights.features, weights.styles, dtype,
            distance=weights.distance, channels=weights.channels,
        )  # fmt: skip
    seen = _seen(target, style_target)
    return parts["feature"].to(acc) + seen, parts["style"].to(acc) + seen


def reference_input(
    pred: Tensor, target: Target, net: LossNet, o: Options, dtype: torch.dtype
) -> Tensor:
    """What of `pred` (N, C, H, W) enters the first convolution, by definition."""
    wide = pred.to(torch.promote_types(accumulation_dtype(pred.dtype), dtype))
    wide = reference.zero_ignored(wide, target.elements)  # before and after, as `valid`
    y = reference.prediction_map(wide, o.activation, o.constant_temperature, target.valid)
    return net.network_input(reference.zero_ignored(y, target.elements), target.valid)


def _cross_entropy(
    pred: Tensor, cross_entropy: CrossEntropy | BinaryCrossEntropy
) -> tuple[Tensor, Tensor]:
    acc = accumulation_dtype(pred.dtype)
    weight = cross_entropy.class_weight
    with no_autocast(pred):
        if isinstance(cross_entropy, BinaryCrossEntropy):
            return reference.binary_cross_entropy(pred.to(acc), *cross_entropy.to(acc))
        return reference.cross_entropy(
            pred.to(acc),
            cross_entropy.labels,
            None if weight is None else weight.to(acc),
            cross_entropy.label_smoothing,
            cross_entropy.mask,
        )


def nothing(pred: Tensor) -> Tensor:
    """0 for each image, (N,), in the graph of `pred` (N, C, H, W) and not its NaN times 0."""
    return pred[:, :0].sum(dim=(1, 2, 3), dtype=accumulation_dtype(pred.dtype))


def compute_dtype(pred: Tensor, target: Target, o: Options) -> torch.dtype:
    """What the network computes in: the option's, float32 against stored features, autocast's for
    float32, or the prediction's."""
    if o.compute_dtype is not None:
        return o.compute_dtype
    if target.stored is not None and pred.dtype != torch.float64:
        return torch.float32
    kind = pred.device.type
    if pred.dtype == torch.float32 and has_autocast(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return pred.dtype


def choose_backend(pred: Tensor, dtype: torch.dtype, net: LossNet, o: Options) -> backends.Choice:
    """The backend for this prediction and compute dtype; see `gpl_fast.backend`."""
    dtype = torch.float64 if pred.dtype == torch.float64 else dtype
    return backends.choose(o.backend, pred.device, dtype, net)


def _seen(*targets: Target | None) -> int | Tensor:
    """0 that keeps what looked at the targets in a compiled graph."""
    zeros = [t.seen for t in targets if t is not None and t.seen is not None]
    return zeros[0] if len(zeros) == 1 else zeros[0] + zeros[1] if zeros else 0
