"""The losses as plain functions: validate, choose the backend, reduce.

`gpl_fast.GenericPerceptualLoss`, `SegmentationLoss` and `PerceptualLoss` are thin modules around
these. Conventions: docs/derivation.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gpl_fast import autograd, reference
from gpl_fast import backend as backends
from gpl_fast.input_checks import FLOAT_DTYPES
from gpl_fast.lossnet import LossNet, constant_in_graphs
from gpl_fast.options import (
    Options,
    check_class_weight,
    check_layers,
    check_segmentation,
    level_taps,
)
from gpl_fast.targets import (
    Target,
    TargetFeatures,
    check_labels,
    label_plane,
    normalise_mask,
    resolve_target,
)


def generic_perceptual_loss(
    pred: Tensor,
    target: Tensor | Any,
    net: LossNet,
    *,
    mask: Tensor | None = None,
    level_weights: Sequence[float] | None = None,
    **options: Any,
) -> Tensor:
    """Eq. (1): ``Σ_b w_b / (C_b H_b W_b) ‖E'_b − E_b‖²`` (Liu et al., Section 3.1).

    Args:
        pred: (N, C, H, W) floating.
        target: floating (N, C, h, w), integer labels (N, H, W) or (N, 1, H, W), `TopK`, or
            `TargetFeatures`. Never gets a gradient.
        net: the frozen network, ``net.in_channels == C``.
        mask: (N, H, W) or (N, 1, H, W) bool, True = valid.
        level_weights: one for each block; None = the last block only, weight 1.
        **options: the fields of `Options`.

    Returns:
        0-dim, or (N,) with ``reduction="none"``; float32, float64 for float64 input.

    Raises:
        TypeError, ValueError: bad input, with what was got, expected, and the way out.
        BackendUnavailable: ``backend="fast"`` where it cannot run.
    """
    o = Options(**options)
    weights = level_taps(net, level_weights)
    check_prediction(pred, net)
    o.check_channels(net.in_channels)
    resolved = resolve_target(
        target, net.in_channels, mask=mask, ignore_index=o.ignore_index, pred=pred
    )
    pred = reference.input_edge(pred)
    parts = _perceptual_terms(pred, resolved, None, net, weights, {}, o)
    return _reduce(parts["feature"], o.reduction)


def segmentation_loss(
    logits: Tensor,
    labels: Tensor,
    net: LossNet,
    *,
    teacher: Tensor | Any = None,
    mask: Tensor | None = None,
    gpl_weight: float = 0.1,
    ce_weight: float = 1.0,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    gpl_ignore: bool | str = "auto",
    level_weights: Sequence[float] | None = None,
    return_parts: bool = False,
    **options: Any,
) -> Tensor | dict[str, Tensor]:
    """Cross-entropy plus the Generic Perceptual Loss: the paper's eq. (2).

    Args:
        logits: (N, C, h, w) floating; resized bilinearly to the labels' size if smaller.
        labels: (N, H, W) or (N, 1, H, W) integer.
        net: the frozen network, ``net.in_channels == C``.
        teacher: what `generic_perceptual_loss` takes as a target; None = the labels.
        mask: (N, H, W) or (N, 1, H, W) bool, True = valid, for both terms.
        gpl_weight, ce_weight: of the two terms.
        class_weight: (C,) of the cross-entropy, as ``F.cross_entropy(weight=)``.
        label_smoothing: of the cross-entropy, in [0, 1].
        gpl_ignore: whether pixels with an ignored label leave the perceptual term: "auto" = only
            when the labels are its target; True; False (such a label is then a zero map).
        level_weights: see `generic_perceptual_loss`.
        return_parts: return ``{"loss_ce", "loss_gpl"}``, weighted, instead of their sum.
        **options: the fields of `Options`.

    Raises:
        TypeError, ValueError: bad input, with what was got, expected, and the way out.
        BackendUnavailable: ``backend="fast"`` where it cannot run.
    """
    o = Options(**options)
    weights = level_taps(net, level_weights)
    check_segmentation(net.in_channels, gpl_weight, ce_weight, label_smoothing, gpl_ignore)
    check_prediction(logits, net, needs_size=False)
    labels = _check_segmentation_labels(labels, logits)
    size = (int(labels.shape[1]), int(labels.shape[2]))
    net.shapes(*size)
    mask = normalise_mask(mask, logits.shape[0], size, logits.device)
    labels = check_labels(labels, mask, net.in_channels, o.ignore_index)

    logits = reference.input_edge(logits)
    with _no_autocast(logits):
        logits_full = reference.resize(logits, size)
    counted = labels >= 0
    if teacher is None:
        valid = mask if gpl_ignore is False else counted
        target = Target("labels", size, valid, labels=labels, channels=net.in_channels)
    else:
        teacher_mask = counted if gpl_ignore is True else mask
        target = resolve_target(teacher, net.in_channels, mask=teacher_mask, pred=logits_full)

    if class_weight is not None:
        class_weight = check_class_weight(class_weight, net.in_channels).to(logits.device)
    if gpl_weight and ce_weight:
        dtype = compute_dtype(logits_full, target, o)
        if choose_backend(logits_full, dtype, net, o).name == "fast":
            shared = autograd.CrossEntropy(labels, class_weight, label_smoothing)
            terms = _fast_terms(logits_full, target, None, net, weights, {}, o, dtype, shared)
            ce = ce_weight * _mean_cross_entropy(terms[2], terms[3], o.reduction)
            gpl = gpl_weight * _reduce(terms[0], o.reduction)
            return {"loss_ce": ce, "loss_gpl": gpl} if return_parts else ce + gpl
    acc = _accumulation_dtype(logits.dtype)
    with _no_autocast(logits):
        weight = None if class_weight is None else class_weight.to(acc)
        total, norm = reference.cross_entropy(logits_full.to(acc), labels, weight, label_smoothing)
        ce = ce_weight * _mean_cross_entropy(total, norm, o.reduction)
    if gpl_weight:
        parts = _perceptual_terms(logits_full, target, None, net, weights, {}, o)
        gpl = gpl_weight * _reduce(parts["feature"], o.reduction)
    else:
        gpl = torch.zeros_like(ce)
    return {"loss_ce": ce, "loss_gpl": gpl} if return_parts else ce + gpl


def _mean_cross_entropy(total: Tensor, norm: Tensor, reduction: str) -> Tensor:
    """Mean over valid pixels of the batch, or of each image and then their sum; 0 for none."""
    if reduction == "mean":
        total, norm = total.sum(), norm.sum()
    mean = total / torch.where(norm == 0, 1, norm)
    return mean.sum() if reduction == "sum" else mean


def perceptual_loss(
    pred: Tensor,
    target: Tensor | Any,
    net: LossNet,
    *,
    style_target: Tensor | Any = None,
    mask: Tensor | None = None,
    feature_layers: Mapping[str, float],
    style_layers: Mapping[str, float],
    tv_weight: float = 0.0,
    return_parts: bool = False,
    **options: Any,
) -> Tensor | dict[str, Tensor]:
    """Feature reconstruction, style and total variation (Johnson et al. 2016, Section 3.2).

    Args:
        pred: (N, C, H, W) floating.
        target: as in `generic_perceptual_loss`.
        net: any network with the layers named.
        style_target: like `target`, of any size, for N images or one; None = `target`.
        mask: (N, H, W) or (N, 1, H, W) bool, True = valid, for `pred` and `target`.
        feature_layers: weight of ``‖φ' − φ‖² / (C H W)`` by layer.
        style_layers: weight of ``‖G' − G‖_F²`` by layer.
        tv_weight: of the mean squared neighbour difference of the activated prediction.
        return_parts: return ``{"loss_feature", "loss_style", "loss_tv"}``, weighted.
        **options: the fields of `Options`; ``activation`` is "none" by default here.

    Raises:
        TypeError, ValueError: bad input, with what was got, expected, and the way out.
        BackendUnavailable: ``backend="fast"`` where it cannot run.
    """
    o = Options(**{"activation": "none", **options})
    check_layers(net, feature_layers, style_layers, tv_weight)
    check_prediction(pred, net)
    o.check_channels(net.in_channels)
    resolved = resolve_target(
        target, net.in_channels, mask=mask, ignore_index=o.ignore_index, pred=pred
    )
    style = None
    if style_target is not None:
        style = _resolve_style(style_target, net, pred, o)
    pred = reference.input_edge(pred)
    features = {k: w for k, w in feature_layers.items() if w}
    styles = {k: w for k, w in style_layers.items() if w}
    parts = _perceptual_terms(pred, resolved, style, net, features, styles, o)
    parts = {k: _reduce(v, o.reduction) for k, v in parts.items()}
    if tv_weight:
        acc = _accumulation_dtype(pred.dtype)
        with _no_autocast(pred):
            valid = resolved.valid
            y = reference.prediction_map(pred.to(acc), o.activation, o.temperature, valid)
            tv = tv_weight * _reduce(reference.total_variation(y, valid), o.reduction)
    else:
        tv = torch.zeros_like(parts["feature"])
    if return_parts:
        return {"loss_feature": parts["feature"], "loss_style": parts["style"], "loss_tv": tv}
    return parts["feature"] + parts["style"] + tv


@torch.inference_mode(False)  # a teacher's loop may be in it; its tensors cannot enter a graph
@torch.no_grad()
def encode(
    target: Tensor | Any,
    net: LossNet,
    layers: Sequence[str],
    *,
    mask: Tensor | None = None,
    **options: Any,
) -> TargetFeatures:
    """φ(target) at `layers`, to be used as a target any number of times.

    In float32 (float64 for a float64 target) unless ``compute_dtype`` says otherwise: the
    difference of stored features cannot be computed in the difference form.

    Args:
        target: floating (N, C, H, W), integer labels or `TopK`.
        net: the frozen network.
        layers: whose outputs are kept.
        mask: (N, H, W) or (N, 1, H, W) bool, True = valid; kept with the features.
        **options: the fields of `Options`.

    Raises:
        TypeError, ValueError: bad input, with what was got, expected, and the way out.
    """
    o = Options(**options)
    o.check_channels(net.in_channels)
    resolved = resolve_target(target, net.in_channels, mask=mask, ignore_index=o.ignore_index)
    net.shapes(*resolved.size)
    dtype = o.compute_dtype or _default_target_dtype(resolved)
    features = _target_features(resolved, net, tuple(layers), o, dtype)
    given = normalise_mask(mask, len(next(iter(features.values()))), resolved.size, _device(target))
    return TargetFeatures(features, feature_settings(net, o, resolved.size), given, resolved.valid)


# ----------------------------------------------------------------------------------- the one engine


def _perceptual_terms(
    pred: Tensor,
    target: Target,
    style: Target | None,
    net: LossNet,
    feature_weights: Mapping[str, float],
    style_weights: Mapping[str, float],
    o: Options,
) -> dict[str, Tensor]:
    """Weighted ``{"feature", "style"}`` of each sample, (N,), on the backend that is chosen."""
    dtype = compute_dtype(pred, target, o)
    acc = _accumulation_dtype(pred.dtype)
    if not feature_weights and not style_weights:
        zero = pred[:, :0].sum(dim=(1, 2, 3), dtype=acc)  # in the graph, and not NaN * 0
        return {"feature": zero, "style": zero}
    if choose_backend(pred, dtype, net, o).name == "fast":
        terms = _fast_terms(pred, target, style, net, feature_weights, style_weights, o, dtype)
        return {"feature": terms[0], "style": terms[1]}
    y_pred_dtype = torch.promote_types(acc, dtype)
    with _no_autocast(pred):
        e_target = _target_features(target, net, tuple(feature_weights), o, dtype)
        e_style = _target_features(style or target, net, tuple(style_weights), o, dtype)
        y = reference.prediction_map(
            pred.to(y_pred_dtype), o.activation, o.temperature, target.valid
        )
        y = net.network_input(y, target.valid)
        parts = reference.perceptual_terms(
            y, net.features, e_target, e_style, feature_weights, style_weights, dtype
        )
    return {name: part.to(acc) for name, part in parts.items()}


def _fast_terms(
    pred: Tensor,
    target: Target,
    style: Target | None,
    net: LossNet,
    feature_weights: Mapping[str, float],
    style_weights: Mapping[str, float],
    o: Options,
    dtype: torch.dtype,
    cross_entropy: autograd.CrossEntropy | None = None,
) -> Tensor:
    if target.features is not None:
        check_features(target.features, net, o, tuple((*feature_weights, *style_weights)))
    styles = {}
    if style is not None:
        styles = _target_features(style, net, tuple(style_weights), o, dtype)
    return autograd.perceptual_terms(
        pred,
        target,
        net,
        feature_weights=feature_weights,
        style_weights=style_weights,
        style_features=styles,
        activation=o.activation,
        target_activation=o.target,
        temperature=o.temperature,
        dtype=dtype,
        workspace_mb=o.workspace_mb,
        cross_entropy=cross_entropy,
    )


def _target_features(
    target: Target, net: LossNet, layers: Sequence[str], o: Options, dtype: torch.dtype
) -> dict[str, Tensor]:
    if not layers:
        return {}
    if target.features is not None:
        check_features(target.features, net, o, layers)
        return {k: target.features.features[k].detach().to(dtype) for k in layers}
    acc = torch.float64 if torch.float64 in (dtype, _target_dtype(target)) else torch.float32
    dense = target.dense
    if dense is not None and acc == torch.float32:
        choice = backends.choose(o.backend, dense.device, dtype, net)
        if choice.name == "fast" and tuple(dense.shape[2:]) == target.size:
            return autograd.encode(
                dense,
                target.valid,
                net,
                layers,
                activation=o.target,
                temperature=o.temperature,
                dtype=dtype,
                workspace_mb=o.workspace_mb,
            )
    with torch.no_grad():
        y = target.map(o.target, o.temperature, acc)
        with _no_autocast(y):
            return net.features(net.network_input(y, target.valid).to(dtype), layers)


def compute_dtype(pred: Tensor, target: Target, o: Options) -> torch.dtype:
    """What the network computes in: api.md's rule for dtypes."""
    if o.compute_dtype is not None:
        return o.compute_dtype
    if target.kind == "features" and pred.dtype != torch.float64:
        return torch.float32
    kind = pred.device.type
    if pred.dtype == torch.float32 and _has_autocast(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return pred.dtype


def choose_backend(pred: Tensor, dtype: torch.dtype, net: LossNet, o: Options) -> backends.Choice:
    """The backend for this prediction and compute dtype; see `gpl_fast.backend`."""
    dtype = torch.float64 if pred.dtype == torch.float64 else dtype
    return backends.choose(o.backend, pred.device, dtype, net)


def check_prediction(pred: Tensor, net: LossNet, needs_size: bool = True) -> None:
    """Raises: TypeError, ValueError if `pred` is not floating (N, in_channels, H, W) of a size."""
    if not isinstance(pred, Tensor):
        raise TypeError(f"prediction: got {type(pred).__name__}, expected a torch.Tensor")
    if pred.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"prediction: got {pred.dtype}, expected one of {FLOAT_DTYPES}; the prediction is the "
            "logits or maps, before any argmax, not class indices"
        )
    if pred.dim() != 4 or pred.shape[1] != net.in_channels:
        way_out = "one image: use .unsqueeze(0)"
        if pred.dim() == 4:
            way_out = f"make it with in_channels (num_classes) = {pred.shape[1]}, or fix the input"
        raise ValueError(
            f"prediction: got shape {tuple(pred.shape)}, expected (N, {net.in_channels}, H, W), "
            f"the channels that the loss was made for; {way_out}"
        )
    if needs_size:
        net.shapes(int(pred.shape[2]), int(pred.shape[3]))


def feature_settings(net: LossNet, o: Options, size: tuple[int, int]) -> dict[str, Any]:
    """What stored features must agree in with the loss that uses them."""
    return {
        "fingerprint": net.fingerprint(),
        "activation": o.target,
        "temperature": float(o.temperature),
        "size": list(size),
    }


def check_features(f: TargetFeatures, net: LossNet, o: Options, layers: Sequence[str]) -> None:
    """Raises: ValueError naming the first setting in which stored features differ."""
    expected = feature_settings(net, o, (f.settings["size"][0], f.settings["size"][1]))
    for name, want in expected.items():
        if f.settings.get(name) != want:
            raise ValueError(
                f"target features: {name}: got {f.settings.get(name)!r}, expected {want!r}, this "
                "loss' own; encode the target again with this loss"
            )
    missing = [layer for layer in layers if layer not in f.features]
    if missing:
        raise ValueError(
            f"target features: got levels {list(f.features)}, expected also {missing}; encode the "
            "target again with this loss"
        )
    shapes = net.shapes(*f.settings["size"])
    for layer in layers:
        if layer in shapes and tuple(f.features[layer].shape[1:]) != shapes[layer]:
            raise ValueError(
                f"target features: {layer}: got shape {tuple(f.features[layer].shape)}, expected "
                f"(N, {', '.join(map(str, shapes[layer]))})"
            )


def _resolve_style(style_target: object, net: LossNet, pred: Tensor, o: Options) -> Target:
    if isinstance(style_target, TargetFeatures):
        size = (style_target.settings["size"][0], style_target.settings["size"][1])
        resolved = Target("features", size, features=style_target)
    else:
        resolved = resolve_target(style_target, net.in_channels, ignore_index=o.ignore_index)
        net.shapes(*resolved.size)
    data = next(
        t
        for t in (resolved.dense, resolved.labels, _values(resolved), _first(resolved))
        if t is not None
    )
    if data.shape[0] not in (1, pred.shape[0]):
        raise ValueError(
            f"style_target: got {data.shape[0]} images, expected 1 or {pred.shape[0]}, as many as "
            "the prediction; slice or .expand() it"
        )
    if data.device != pred.device:
        raise ValueError(
            f"style_target: got device {data.device}, expected {pred.device}; use .to(...)"
        )
    return resolved


def _check_segmentation_labels(labels: object, logits: Tensor) -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"labels: got {type(labels).__name__}, expected an integer tensor (N, H, W); soft or "
            "stored targets go to teacher="
        )
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(
            f"labels: got {labels.dtype}, expected integers (N, H, W); use labels.long(), or "
            "teacher= for soft targets"
        )
    labels = label_plane(labels, logits.shape[1])
    if labels.shape[0] != logits.shape[0]:
        raise ValueError(
            f"labels: got {labels.shape[0]} images, expected {logits.shape[0]}, as many as logits; "
            "slice or .expand() them"
        )
    if labels.shape[1] < logits.shape[2] or labels.shape[2] < logits.shape[3]:
        raise ValueError(
            f"labels: got size {tuple(labels.shape[1:])}, expected {tuple(logits.shape[2:])} or "
            "larger (logits are resized up to the labels, never down); resize the labels with "
            "mode='nearest'"
        )
    if labels.device != logits.device:
        raise ValueError(
            f"labels: got device {labels.device}, expected {logits.device}; use .to(...)"
        )
    return labels


def _reduce(values: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return values
    total = values.sum()
    return total / max(values.shape[0], 1) if reduction == "mean" else total


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _target_dtype(target: Target) -> torch.dtype | None:
    if target.dense is not None:
        return target.dense.dtype
    return target.topk.values.dtype if target.topk is not None else None


def _default_target_dtype(target: Target) -> torch.dtype:
    return torch.float64 if _target_dtype(target) == torch.float64 else torch.float32


def _values(target: Target) -> Tensor | None:
    return None if target.topk is None else target.topk.values


def _first(target: Target) -> Tensor | None:
    return None if target.features is None else next(iter(target.features.features.values()))


def _device(target: object) -> torch.device:
    data = target if isinstance(target, Tensor) else getattr(target, "values", None)
    assert isinstance(data, Tensor)
    return data.device


@constant_in_graphs  # torch 2.11 cannot trace it
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def _no_autocast(t: Tensor) -> Any:
    kind = t.device.type if _has_autocast(t.device.type) else "cpu"
    return torch.autocast(kind, enabled=False)
