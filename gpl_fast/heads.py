"""Heads: what weighs the channels of each layer that LPIPS compares."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from gpl_fast.distance import Distance
from gpl_fast.input_checks import Number, as_float
from gpl_fast.net.lossnet import LossNet
from gpl_fast.terms import Weights

# (C_b,) numbers by layer; None = each channel counts 1.
Heads = Mapping[str, Tensor | Iterable[Number] | None]


def as_heads(net: LossNet, heads: Heads | None) -> dict[str, Tensor]:
    """(C_b,) float64 on the CPU by layer, copies.

    Args:
        heads: None = `usual_layers`, every channel 1.

    Raises:
        TypeError, ValueError: no layers, unknown ones, not one finite number a channel, or all 0.
    """
    if heads is None:
        heads = dict.fromkeys(usual_layers(net))
    if not isinstance(heads, Mapping) or not all(isinstance(layer, str) for layer in heads):
        raise TypeError(
            f"heads: got {type(heads).__name__}, expected a dict of (C_b,) numbers by layer, or "
            "None = the sum over channels"
        )
    unknown = [layer for layer in heads if layer not in net.layer_names]
    if unknown or not heads:
        raise ValueError(
            f"heads: got {unknown or 'no layer'}, expected names of {list(net.layer_names)}"
        )
    channels = layer_channels(net, [*heads])
    checked = {layer: _as_head(layer, h, channels.get(layer)) for layer, h in heads.items()}
    if not any(head.any() for head in checked.values()):
        raise ValueError("heads: got zeros alone, expected some number that is not 0")
    return checked


def usual_layers(net: LossNet) -> tuple[str, ...]:
    """What is compared without a choice: the last ReLU of each block, of VGG-16 relu1_2 to
    relu5_3; of a `LossNet.from_module` its taps."""
    if not net.is_chain:
        return net.layer_names
    last: dict[str, str] = {}  # by block, which a name begins with
    for layer in net.layers:
        if layer.kind == "relu":
            last[layer.name.partition("_")[0]] = layer.name
    if not last:
        raise ValueError(
            f"heads: got None with a network without ReLU, expected some of {list(net.layer_names)}"
        )
    return tuple(last.values())


def layer_channels(net: LossNet, layers: list[str]) -> dict[str, int]:
    """C_b by layer, without those that nothing but a call can tell."""
    if net.is_chain:
        return {layer.name: layer.out_channels for layer in net.layers}
    # The size that networks for images are made for; nothing is computed on "meta".
    y = torch.empty(1, net.in_channels, 224, 224, device="meta")
    try:
        with torch.no_grad():
            return {layer: e.shape[1] for layer, e in net.features(y, layers).items()}
    except Exception:  # of any module
        return {}


def tap_weights(heads: Mapping[str, Tensor], distance: Distance) -> Weights:
    """Heads h as weights C_b·h inside the mean over C_b H_b W_b of (1): a number by layer, and
    (C_b,) of at most 1 in magnitude where not all channels have the same. A layer of zeros is not
    compared. A power of two is what is taken out of h, so that nothing is rounded."""
    numbers, channels = {}, {}
    for layer, head in heads.items():
        largest = float(head.abs().max())
        if largest == 0:
            continue
        if bool((head == largest).all()):
            numbers[layer] = len(head) * largest
            continue
        power = 2.0 ** math.frexp(largest)[1]
        numbers[layer], channels[layer] = len(head) * power, head / power
    return Weights(numbers, {}, distance, channels)


def _as_head(layer: str, head: Any, channels: int | None) -> Tensor:
    if head is None:
        if channels is None:
            raise ValueError(
                f"heads: {layer}: got None, and the channels of this module show at a call alone; "
                "expected one number for each"
            )
        return torch.ones(channels, dtype=torch.float64, device="cpu")
    expected = f"({'C_b' if channels is None else channels},) finite numbers, one a channel"
    if isinstance(head, Tensor) and head.is_meta:
        raise ValueError(f"heads: {layer}: got a tensor on 'meta', expected {expected}")
    try:
        if not isinstance(head, Tensor):
            numbers = [as_float("heads", x) for x in head]
            head = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        with torch.inference_mode(False):
            copied: Tensor = head.detach().to(device="cpu", dtype=torch.float64, copy=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"heads: {layer}: got {type(head).__name__}, expected {expected}"
        ) from error
    if copied.dim() != 1 or copied.numel() != (channels or copied.numel()) or not copied.numel():
        raise ValueError(
            f"heads: {layer}: got shape {tuple(copied.shape)}, expected {expected}; of a 1 x 1 "
            "convolution to one channel .weight.flatten()"
        )
    if not copied.isfinite().all():
        raise ValueError(f"heads: {layer}: got numbers that are not finite, expected {expected}")
    return copied
