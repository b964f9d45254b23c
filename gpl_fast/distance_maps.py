"""Where prediction and target differ: maps (N, 1, H, W)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gpl_fast import engine, parts, reference
from gpl_fast.input_checks import check_prediction
from gpl_fast.layer_weights import check_channels
from gpl_fast.net.lossnet import LossNet
from gpl_fast.options import Options
from gpl_fast.precision import accumulation_dtype, no_autocast
from gpl_fast.sharded import local
from gpl_fast.target_features import target_features
from gpl_fast.targets import Target, TargetLike, resolve_target
from gpl_fast.terms import Segmentation, Weights


def spatial_value(
    pred: Tensor,
    target: TargetLike,
    mask: Tensor | None,
    net: LossNet,
    weights: Weights,
    o: Options,
) -> Tensor:
    """The weighted distances of all layers at each pixel, of normalised features, resized
    bilinearly and added.

    Raises:
        TypeError, ValueError: bad input.
        BackendUnavailable: ``backend="fast"``.
    """
    pred, target, mask = local(pred, target, mask)
    check_prediction(pred, net)
    resolved = resolve_target(target, net.in_channels, o, mask=mask, pred=pred)
    pred, dtype = reference.input_edge(pred), engine.compute_dtype(pred, resolved, o)
    if engine.choose_backend(pred, dtype, net, o).name == "fast":
        fitted = resolved.fitted(dtype) if dtype == torch.float16 else resolved
        maps = engine.fast_maps(pred, fitted, net, o, weights, dtype)
        found = _sum_of(maps, net, weights, pred)
        return found + (0 if resolved.seen is None else resolved.seen)
    return _map_of(pred, resolved, net, weights, o)


@torch.no_grad()
def distance_map(
    pred: Tensor,
    target: TargetLike,
    mask: Tensor | None,
    net: LossNet,
    weights: Weights,
    o: Options,
) -> Tensor:
    """`spatial_value` without gradient, by the reference whatever the backend.

    Raises:
        TypeError, ValueError: bad input.
    """
    return spatial_value(pred, target, mask, net, weights, replace(o, backend="reference"))


@torch.no_grad()
def segmentation_map(
    logits: Tensor,
    labels: Tensor,
    net: LossNet,
    weights: Weights,
    o: Options,
    s: Segmentation,
    *,
    teacher: TargetLike | None,
    mask: Tensor | None,
) -> Tensor:
    """`distance_map` of a segmentation's perceptual term, without its weight.

    Raises:
        TypeError, ValueError: bad input.
    """
    logits, labels, teacher, mask = local(logits, labels, teacher, mask)
    resolve, compared = parts.segmentation_resolvers(s)
    checked, given = resolve(labels, mask, logits, net, o)
    with no_autocast(logits):
        logits = reference.resize(logits, checked.shape[-2:])
    target = compared(teacher, checked, given, logits, o, s.gpl_ignore)
    return _map_of(logits, target, net, weights, o)


def last_layer(weights: Weights, net: LossNet) -> Weights:
    """The weights of features at the layer that comes last in the network, alone.

    Raises:
        ValueError: there are weights of styles alone.
    """
    compared = [name for name in net.layer_names if weights.features.get(name)]
    if not compared:
        raise ValueError(
            "distance_map: got no feature layer, expected one in feature_layers: the Gram matrices "
            "of styles have no places in the image"
        )
    last = compared[-1]
    channels = {name: c for name, c in weights.channels.items() if name == last}
    return Weights({last: weights.features[last]}, {}, weights.distance, channels)


def _sum_of(maps: Tensor, net: LossNet, weights: Weights, pred: Tensor) -> Tensor:
    """`engine.fast_maps`, weighted, resized and added: (N, 1, H, W) float32."""
    n, _, *size = pred.shape
    shapes = net.shapes(*size)
    of_layers = [shapes[name] for name in weights.features]
    parts = torch.split(maps, [h * w for _, h, w in of_layers], dim=1)
    total = maps.new_zeros(n, 1, *size)
    with no_autocast(pred):
        for part, (c, h, w), weight in zip(
            parts, of_layers, weights.features.values(), strict=True
        ):
            total = total + weight / c * reference.resize(part.view(n, 1, h, w), size)
    return total


def _map_of(pred: Tensor, target: Target, net: LossNet, weights: Weights, o: Options) -> Tensor:
    """(N, 1, H, W) float32, float64 for a float64 prediction."""
    o = replace(o, backend="reference")  # of the target's features too
    dtype, acc = engine.compute_dtype(pred, target, o), accumulation_dtype(pred.dtype)
    with no_autocast(pred):
        e_target = target_features(target, net, tuple(weights.features), o, dtype)
        y = engine.reference_input(pred, target, net, o, dtype)
        check_channels(weights, e_target)
        found = reference.distance_map(
            y, net.features, e_target, weights.features, dtype,
            distance=weights.distance, channels=weights.channels,
        )  # fmt: skip
    return found.to(acc) + (0 if target.seen is None else target.seen)
