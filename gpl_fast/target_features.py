"""φ(target): on the fast path its walk in the plain form, else by definition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gpl_fast import backend as backends
from gpl_fast import reference
from gpl_fast.description import describe
from gpl_fast.fast import operator
from gpl_fast.net.lossnet import LossNet
from gpl_fast.options import Options
from gpl_fast.precision import no_autocast
from gpl_fast.targets import DenseTarget, EncodedTarget, Target
from gpl_fast.terms import Weights


def target_features(
    target: Target, net: LossNet, layers: Sequence[str], o: Options, dtype: torch.dtype
) -> dict[str, Tensor]:
    """φ(target) at `layers`, (N, C_b, H_b, W_b) in `dtype`, without gradient.

    Raises:
        ValueError: stored features of other settings.
        BackendUnavailable: ``backend="fast"`` where it cannot run.
    """
    if not layers:
        return {}
    if target.stored is not None:
        target.check(net, o, layers)
        return {k: target.stored[k].detach().to(dtype) for k in layers}
    if dtype == torch.float16:
        target = target.fitted(dtype)
    wide = torch.float64 in (dtype, target.data.dtype)
    choice = backends.choose(o.backend, target.data.device, torch.float64 if wide else dtype, net)
    if choice.name == "fast":
        return _fast(target, net, layers, o, dtype)
    with torch.no_grad():
        y = _map(target, o, torch.float64 if wide else torch.float32)
        with no_autocast(y):
            return net.features(net.network_input(y, target.valid).to(dtype), layers)


def encoded(
    target: Target, net: LossNet, o: Options, weights: Weights, dtype: torch.dtype
) -> Target:
    """The features of a target in place of it, where the fast path normalises them: a branch that
    is the other one less δ knows small features no better than large ones beside them.

    Raises:
        ValueError: weights of pixels that float16 does not hold.
    """
    if not weights.normalized or target.stored is not None:
        return target
    if dtype == torch.float16:
        target = target.fitted(dtype)
    stored = _fast(target, net, weights.layers, o, dtype)
    return EncodedTarget(
        target.size, target.valid, stored=stored, seen=target.seen, elements=target.elements
    )


def _fast(
    target: Target, net: LossNet, layers: Sequence[str], o: Options, dtype: torch.dtype
) -> dict[str, Tensor]:
    wide = target.data.dtype == torch.float64
    if not target.encodable or wide:
        with torch.no_grad():
            y = _map(target, o, torch.float64 if wide else torch.float32).float()
        target = DenseTarget(target.size, target.valid, y, None)
        o = replace(o, activation="none", target_activation="none", temperature=1.0)
    tensors, data = target.tensors(dtype), target.data.detach()
    dense = tensors.pop("dense", None)
    if dense is None:  # of a list of classes there is no map: a tensor of its shape, without memory
        shape = (data.shape[0], net.in_channels, *target.size)
        dense = torch.empty((), device=data.device).expand(shape)
    weights = Weights(dict.fromkeys(layers, 1.0), {})
    call = describe(net, o, target, weights, data.device, dtype, tuple(tensors), encode=True)
    return dict(zip(weights.features, operator.encode(dense, tensors, call), strict=True))


def _map(target: Target, o: Options, dtype: torch.dtype) -> Tensor:
    """By definition, (N, C, H, W), activated."""
    y = target.map(o.target, o.target_temperature, dtype)
    return reference.zero_ignored(y, target.elements)
