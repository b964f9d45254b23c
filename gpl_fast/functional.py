"""The losses as plain functions: validate, choose the backend, reduce.

`gpl_fast.GenericPerceptualLoss`, `SegmentationLoss` and `PerceptualLoss` are thin modules around
these. Conventions: docs/math.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gpl_fast import autograd, reference
from gpl_fast import backend as backends
from gpl_fast.fast import operator
from gpl_fast.graphs import constant_in_graphs
from gpl_fast.input_checks import check_prediction, check_tensor
from gpl_fast.net.lossnet import LossNet
from gpl_fast.options import (
    Options,
    as_class_weight,
    as_label_smoothing,
    as_layers,
    as_num_classes,
    as_weight,
    check_gpl_ignore,
    level_taps,
)
from gpl_fast.targets import (
    Target,
    TargetFeatures,
    check_labels,
    check_same_mask,
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
    """Eq. (1) of docs/math.md: ``Σ_b w_b / (C_b H_b W_b) ‖E'_b − E_b‖²`` (Liu et al., eq. (1)
    and Section 3.1).

    Args:
        pred: (N, C, H, W) floating.
        target: floating (N, C, h, w), integer labels (N, H, W) or (N, 1, H, W), `TopK`, or
            `TargetFeatures`. Never gets a gradient.
        net: the frozen network, ``net.in_channels == C``.
        mask: (N, H, W) or (N, 1, H, W) bool, True = valid; of a dense target of another size also
            (N, h, w): that target is then resized with what is valid alone.
        level_weights: one for each block; None = the last block only, weight 1.
        **options: the fields of `Options`. A dense target that holds probabilities is refused
            under ``target_activation="auto"``, as `GenericPerceptualLoss` says; on a GPU only
            with ``GPL_FAST_CHECK=1``.

    Returns:
        0-dim, or (N,) with ``reduction="none"``; float32, float64 for float64 input.

    Raises:
        TypeError, ValueError: bad input, with what was got, expected, and the way out.
        BackendUnavailable: ``backend="fast"`` where it cannot run.
    """
    o = Options.of("generic_perceptual_loss", options)
    o.check_channels(net.in_channels)
    return generic_value(pred, target, mask, net, level_taps(net, level_weights), o)


def generic_value(
    pred: Tensor,
    target: Tensor | Any,
    mask: Tensor | None,
    net: LossNet,
    taps: Mapping[str, float],
    o: Options,
) -> Tensor:
    """`generic_perceptual_loss` by the weight of each layer, with options that are checked."""
    check_prediction(pred, net)
    resolved = resolve_target(target, net.in_channels, o, mask=mask, pred=pred)
    pred = reference.input_edge(pred)
    parts = _perceptual_terms(pred, resolved, None, net, taps, {}, o)
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
    class_weight: Tensor | Sequence[float] | None = None,
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
        gpl_weight, ce_weight: of the two terms; a term of weight 0 is not computed.
        class_weight: (C,) of the cross-entropy, as ``F.cross_entropy(weight=)``. Where the weights
            of all counted pixels are 0, so is the cross-entropy.
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
    o = Options.of("segmentation_loss", options)
    as_num_classes(net.in_channels)
    o.check_channels(net.in_channels)
    check_gpl_ignore(gpl_ignore)
    if class_weight is not None:
        class_weight = as_class_weight(class_weight, net.in_channels, look=False)
    parts = segmentation_parts(
        logits,
        labels,
        teacher,
        mask,
        net,
        level_taps(net, level_weights),
        o,
        gpl_weight=as_weight("gpl_weight", gpl_weight),
        ce_weight=as_weight("ce_weight", ce_weight),
        class_weight=class_weight,
        label_smoothing=as_label_smoothing(label_smoothing),
        gpl_ignore=gpl_ignore,
    )
    return parts if return_parts else parts["loss_ce"] + parts["loss_gpl"]


def segmentation_parts(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor | Any,
    mask: Tensor | None,
    net: LossNet,
    taps: Mapping[str, float],
    o: Options,
    *,
    gpl_weight: float,
    ce_weight: float,
    class_weight: Tensor | None,
    label_smoothing: float,
    gpl_ignore: bool | str,
) -> dict[str, Tensor]:
    """The weighted terms of `segmentation_loss`, with options that are checked."""
    check_prediction(logits, net, needs_size=False)
    labels = segmentation_labels(labels, logits)
    size = (int(labels.shape[1]), int(labels.shape[2]))
    net.shapes(*size)
    mask = normalise_mask(mask, logits.shape[0], size, logits.device)
    labels = check_labels(labels, mask, net.in_channels, o.ignore_index)

    logits = reference.input_edge(logits)
    with _no_autocast(logits):
        logits_full = reference.resize(logits, size)
    target = segmentation_target(logits_full, labels, teacher, mask, net, o, gpl_ignore)

    if class_weight is not None:
        class_weight = class_weight.to(logits.device)
    if gpl_weight and ce_weight:
        dtype = compute_dtype(logits_full, target, o)
        if choose_backend(logits_full, dtype, net, o).name == "fast":
            shared = autograd.CrossEntropy(labels, class_weight, label_smoothing)
            terms = _fast_terms(logits_full, target, None, net, taps, {}, o, dtype, shared)
            ce = ce_weight * _mean_cross_entropy(terms[2], terms[3], o.reduction)
            gpl = gpl_weight * _reduce(terms[0], o.reduction)
            return {"loss_ce": ce, "loss_gpl": gpl}
    acc = _accumulation_dtype(logits.dtype)
    # A term of weight 0 is not computed, but connected.
    ce = gpl = _reduce(logits_full[:, :0].sum(dim=(1, 2, 3), dtype=acc), o.reduction)
    if ce_weight:
        with _no_autocast(logits):
            weight = None if class_weight is None else class_weight.to(acc)
            total, norm = reference.cross_entropy(
                logits_full.to(acc), labels, weight, label_smoothing
            )
            ce = ce_weight * _mean_cross_entropy(total, norm, o.reduction)
    if gpl_weight:
        parts = _perceptual_terms(logits_full, target, None, net, taps, {}, o)
        gpl = gpl_weight * _reduce(parts["feature"], o.reduction)
    return {"loss_ce": ce, "loss_gpl": gpl}


def segmentation_target(
    pred: Tensor,
    labels: Tensor,
    teacher: Tensor | Any,
    mask: Tensor | None,
    net: LossNet,
    o: Options,
    gpl_ignore: bool | str,
) -> Target:
    """What the perceptual term of `segmentation_loss` compares logits (N, C, H, W) with.

    Args:
        labels: (N, H, W) int64, -1 = does not count, from `check_labels`.
        Others: as `segmentation_loss`.
    """
    counted = labels >= 0
    if teacher is None:
        valid = mask if gpl_ignore is False else counted
        size = (int(labels.shape[1]), int(labels.shape[2]))
        return Target("labels", size, valid, labels=labels, channels=net.in_channels)
    if isinstance(teacher, TargetFeatures) and gpl_ignore is True:
        return _features_without_ignored(teacher, mask, counted, net, pred, o)
    teacher_mask = counted if gpl_ignore is True else mask
    return resolve_target(teacher, net.in_channels, o, mask=teacher_mask, pred=pred, what="teacher")


def _features_without_ignored(
    teacher: TargetFeatures,
    mask: Tensor | None,
    counted: Tensor,
    net: LossNet,
    pred: Tensor,
    o: Options,
) -> Target:
    """Stored features where ignored pixels are to leave the perceptual term: those pixels must have
    been left out when they were made."""
    target = resolve_target(teacher, net.in_channels, o, pred=pred, what="teacher")
    without = "labels != ignore_index" + ("" if mask is None else " and the mask")
    message = (
        "gpl_ignore=True: got teacher features that were not made without this batch's ignored "
        f"pixels, expected encode(teacher, mask=...) with {without}; or gpl_ignore='auto', where a "
        "teacher speaks for ignored pixels too"
    )
    return replace(target, seen=check_same_mask(counted, teacher.valid, message))


def _mean_cross_entropy(total: Tensor, norm: Tensor, reduction: str) -> Tensor:
    """Mean over valid pixels of the batch, or of each image and then their sum.

    0 where the counted weights sum to 0: with label smoothing `total`, whose smoothed part weighs
    every class, is none there.
    """
    if reduction == "mean":
        total, norm = total.sum(), norm.sum()
    nothing = norm == 0
    mean = (total / norm.masked_fill(nothing, 1)).masked_fill(nothing, 0)
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
        mask: as in `generic_perceptual_loss`, for `pred` and `target`.
        feature_layers: weight of ``‖φ' − φ‖² / (C H W)`` by layer.
        style_layers: weight of ``‖G' − G‖_F²`` by layer.
        tv_weight: of the mean squared neighbour difference of the activated prediction.
        return_parts: return ``{"loss_feature", "loss_style", "loss_tv"}``, weighted.
        **options: the fields of `Options`; ``activation`` is "none" by default here.

    Raises:
        TypeError, ValueError: bad input, with what was got, expected, and the way out.
        BackendUnavailable: ``backend="fast"`` where it cannot run.
    """
    o = Options.of("perceptual_loss", options, activation="none")
    o.check_channels(net.in_channels)
    features, styles, tv = as_layers(net, feature_layers, style_layers, tv_weight)
    parts = perceptual_parts(pred, target, style_target, mask, net, features, styles, tv, o)
    return parts if return_parts else sum_of_parts(parts)


def perceptual_parts(
    pred: Tensor,
    target: Tensor | Any,
    style_target: Tensor | Any,
    mask: Tensor | None,
    net: LossNet,
    feature_layers: Mapping[str, float],
    style_layers: Mapping[str, float],
    tv_weight: float,
    o: Options,
) -> dict[str, Tensor]:
    """The weighted terms of `perceptual_loss`, with options that are checked."""
    check_prediction(pred, net)
    resolved = resolve_target(target, net.in_channels, o, mask=mask, pred=pred)
    style = None if style_target is None else _resolve_style(style_target, net, pred, o)
    pred = reference.input_edge(pred)
    features = {k: w for k, w in feature_layers.items() if w}
    styles = {k: w for k, w in style_layers.items() if w}
    parts = _perceptual_terms(pred, resolved, style, net, features, styles, o)
    parts = {k: _reduce(v, o.reduction) for k, v in parts.items()}
    if tv_weight:
        tv = tv_weight * _reduce(total_variation(pred, resolved.valid, o), o.reduction)
    else:
        tv = torch.zeros_like(parts["feature"])
    return {"loss_feature": parts["feature"], "loss_style": parts["style"], "loss_tv": tv}


def total_variation(pred: Tensor, valid: Tensor | None, o: Options) -> Tensor:
    """Of the activated prediction, (N,)."""
    with _no_autocast(pred):
        wide = pred.to(_accumulation_dtype(pred.dtype))
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
        mask: (N, H, W) or (N, 1, H, W) bool, True = valid; a copy is kept with the features.
        **options: the fields of `Options`.

    Raises:
        TypeError, ValueError: bad input, with what was got, expected, and the way out.
    """
    return encode_target(target, mask, net, layers, Options.of("encode", options))


@torch.inference_mode(False)
@torch.no_grad()
def encode_target(
    target: Tensor | Any, mask: Tensor | None, net: LossNet, layers: Sequence[str], o: Options
) -> TargetFeatures:
    """`encode` with options that are checked."""
    o.check_channels(net.in_channels)
    resolved = resolve_target(target, net.in_channels, o, mask=mask)
    net.shapes(*resolved.size)
    dtype = o.dtype or _default_target_dtype(resolved)
    features = _target_features(resolved, net, tuple(layers), o, dtype)
    given = normalise_mask(mask, len(next(iter(features.values()))), resolved.size, _device(target))
    # Copies: the caller's mask may change, the features would not.
    kept = [None if m is None else m.clone() for m in (given, resolved.valid)]
    return TargetFeatures(features, feature_settings(net, o, resolved.size), *kept)


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
    seen = _seen(target, style)
    y_pred_dtype = torch.promote_types(acc, dtype)
    with _no_autocast(pred):
        e_target = _target_features(target, net, tuple(feature_weights), o, dtype)
        e_style = _target_features(style or target, net, tuple(style_weights), o, dtype)
        y = reference.prediction_map(
            pred.to(y_pred_dtype), o.activation, o.constant_temperature, target.valid
        )
        y = net.network_input(y, target.valid)
        parts = reference.perceptual_terms(
            y, net.features, e_target, e_style, feature_weights, style_weights, dtype
        )
    return {name: part.to(acc) + seen for name, part in parts.items()}


def _seen(*targets: Target | None) -> int | Tensor:
    """0 that keeps what looked at the targets in a compiled graph."""
    zeros = [t.seen for t in targets if t is not None and t.seen is not None]
    return zeros[0] if len(zeros) == 1 else zeros[0] + zeros[1] if zeros else 0


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
    tensors = autograd._target_tensors(target, styles, style_weights, dtype)
    if cross_entropy is not None:
        if tensors.get("labels") is not cross_entropy.labels:
            tensors["ce_labels"] = cross_entropy.labels
        if cross_entropy.class_weight is not None:
            tensors["class_weight"] = cross_entropy.class_weight.float()
    resized = target.dense is not None and tuple(target.dense.shape[2:]) != tuple(pred.shape[2:])
    workspace = o.constant_workspace
    call = operator.describe(
        net.identity,
        pred.device,
        features=tuple(feature_weights.items()),
        styles=tuple(style_weights.items()),
        kind=target.kind,
        activation=o.activation,
        target_activation=o.target,
        temperature=o.constant_temperature,
        dtype=dtype,
        workspace_mb=None if isinstance(workspace, str) else workspace,
        tensors=tuple(tensors),
        resized=resized,
        cross_entropy=cross_entropy is not None,
        label_smoothing=cross_entropy.label_smoothing if cross_entropy else 0.0,
    )
    terms = operator.perceptual_terms(pred, tensors, call, cross_entropy is not None)
    seen = _seen(target, style)
    return terms if isinstance(seen, int) else terms + seen


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
            tensors = {} if target.valid is None else {"valid": target.valid.contiguous()}
            workspace = o.constant_workspace
            call = operator.describe(
                net.identity,
                dense.device,
                features=tuple((name, 1.0) for name in dict.fromkeys(layers)),
                styles=(),
                kind="dense",
                activation=o.target,
                target_activation=o.target,
                temperature=o.target_temperature,
                dtype=dtype,
                workspace_mb=None if isinstance(workspace, str) else workspace,
                tensors=tuple(tensors),
                encode=True,
            )
            made = operator.encode(dense.detach(), tensors, call)
            return dict(zip(dict.fromkeys(layers), made, strict=True))
    with torch.no_grad():
        y = target.map(o.target, o.target_temperature, acc)
        with _no_autocast(y):
            return net.features(net.network_input(y, target.valid).to(dtype), layers)


def compute_dtype(pred: Tensor, target: Target, o: Options) -> torch.dtype:
    """What the network computes in: api.md's rule for dtypes."""
    if o.dtype is not None:
        return o.dtype
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


def feature_settings(net: LossNet, o: Options, size: tuple[int, int]) -> dict[str, Any]:
    """What stored features must agree in with the loss that uses them."""
    return {
        "fingerprint": net.fingerprint(),
        "activation": o.target,
        "temperature": o.target_temperature,
        "size": list(size),
    }


def check_features(f: TargetFeatures, net: LossNet, o: Options, layers: Sequence[str]) -> None:
    """Raises: ValueError naming the first setting in which stored features differ."""
    expected = feature_settings(net, o, (f.settings["size"][0], f.settings["size"][1]))
    for name in {**expected, **f.settings}:
        want = expected.get(name)
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
        resolved = resolve_target(style_target, net.in_channels, o, what="style_target")
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


def segmentation_labels(labels: object, logits: Tensor) -> Tensor:
    """Labels (N, H, W) of logits (N, C, h, w), for `check_labels`.

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
    multi_hot = "to GenericPerceptualLoss, beside a binary cross-entropy,"
    labels = label_plane(labels, logits.shape[1], multi_hot)
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
