"""Chains of named layers: what may follow what, their shapes, and the weights that they ask for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """One step of the chain: ``kind`` is conv, relu, maxpool, avgpool or down (stride 2 + ReLU)."""

    name: str
    kind: str
    in_channels: int
    out_channels: int
    kernel_size: int = 1


class Part(NamedTuple):
    """A `Layer` before its place in a chain gives it a name and input channels.

    ``out_channels`` and ``kernel_size`` are a convolution's ("conv" or "down").
    """

    kind: str
    out_channels: int = 0
    kernel_size: int = 1


def named_chain(in_channels: int, parts: Iterable[Part]) -> list[Layer]:
    """Layers named by their place: ``conv{block}_{i}``, ``relu{block}_{i}``, ``pool{block}``,
    ``down{block}``; what follows the last pool is one more block.

    Raises:
        ValueError: a part that cannot stand where it does.
    """
    layers: list[Layer] = []
    block, i, c = 1, 0, in_channels
    for part in parts:
        before = layers[-1].kind if layers else ""
        if part.kind == "conv":
            i += 1
            layers.append(Layer(f"conv{block}_{i}", "conv", c, part.out_channels, part.kernel_size))
            c = part.out_channels
        elif part.kind == "relu" and before == "conv":
            layers.append(Layer(f"relu{block}_{i}", "relu", c, c))
        elif part.kind == "down" and before == "relu" and part.out_channels == c:
            layers.append(Layer(f"down{block}", "down", c, c, part.kernel_size))
            block, i = block + 1, 0
        elif part.kind in ("maxpool", "avgpool") and before:
            layers.append(Layer(f"pool{block}", part.kind, c, c))
            block, i = block + 1, 0
        else:
            raise ValueError(f"got {part.kind!r} after {before or 'the input'!r}")
    if not layers:
        raise ValueError("got an empty chain, expected at least one convolution")
    if {"down", "maxpool"} <= (kinds := {x.kind for x in layers}) or {"down", "avgpool"} <= kinds:
        raise ValueError("got pools beside convolutions of stride 2, expected one of the two")
    return layers


def stored_layers(stored: Any) -> list[Layer]:
    """The chain that a file holds: what JSON made of a list of `Layer`.

    Raises:
        TypeError: not of the form that a file has.
        ValueError: no chain that a `LossNet` could be.
    """
    if not isinstance(stored, list) or not all(isinstance(x, dict) for x in stored):
        raise TypeError(f"layers: got {type(stored).__name__}, expected a list of objects")
    given = [Layer(**x) for x in stored]
    for layer in given:
        for number in (layer.in_channels, layer.out_channels, layer.kernel_size):
            if type(number) is not int or number < 1:
                raise TypeError(f"got {layer}, expected integers >= 1")
        if layer.kernel_size % 2 == 0:
            raise ValueError(f"got {layer}, expected an odd kernel_size")
    parts = [Part(x.kind, x.out_channels, x.kernel_size) for x in given]
    layers = named_chain(given[0].in_channels if given else 1, parts)
    for got, expected in zip(given, layers, strict=True):
        if got != expected:
            raise ValueError(f"got {got}, expected {expected} in its place")
    return layers


def layer_shapes(
    layers: Sequence[Layer], height: int, width: int
) -> dict[str, tuple[int, int, int]]:
    """``(C_b, H_b, W_b)`` of each layer's output for an input of height x width.

    Raises:
        ValueError: the input is too small for the down-sampling.
    """
    sizes: dict[str, tuple[int, int, int]] = {}
    h, w = height, width
    for layer in layers:
        if layer.kind in ("maxpool", "avgpool"):
            h, w = h // 2, w // 2
        elif layer.kind == "down":
            h, w = (h + 1) // 2, (w + 1) // 2
        sizes[layer.name] = (layer.out_channels, h, w)
    if min(h, w) < 1:
        pools = sum(layer.kind in ("maxpool", "avgpool") for layer in layers)
        raise ValueError(
            f"input: got {height} x {width}, expected at least {2**pools} x {2**pools}: the "
            f"network halves it {pools} times; use larger inputs or a net with fewer blocks"
        )
    return sizes


def weight_shape(layer: Layer) -> tuple[int, int, int, int]:
    return (layer.out_channels, layer.in_channels, layer.kernel_size, layer.kernel_size)


def check_weights(layers: Sequence[Layer], tensors: Mapping[str, Tensor]) -> None:
    """Raises: ValueError if `tensors` are not what `layers`, with an adapter or not, ask for.

    Weights ``(C_out, C_in, K, K)`` by layer, ``{layer}.bias`` (C_out,), "adapter" (C, C', 1, 1).
    """
    expected: dict[str, tuple[int, ...]] = {}
    strided = any(x.kind == "down" for x in layers)
    for x in layers:
        if x.kind in ("conv", "down"):
            expected[x.name] = weight_shape(x)
            if not strided:
                expected[f"{x.name}.bias"] = (x.out_channels,)
    if "adapter" in tensors:
        t = tensors["adapter"]
        channels = t.shape[1] if t.dim() == 4 else 1
        expected["adapter"] = (layers[0].in_channels, max(channels, 1), 1, 1)
    for name, t in tensors.items():
        if name not in expected:
            raise ValueError(f"got a tensor {name!r} that no layer has")
        if tuple(t.shape) != expected[name] or t.dtype != torch.float32:
            raise ValueError(
                f"{name}: got {tuple(t.shape)} {t.dtype}, expected {expected[name]} torch.float32"
            )
        if not t.isfinite().all():
            raise ValueError(f"{name}: got weights that are not finite, expected numbers")
    missing = [name for name in expected if "." not in name and name not in tensors]
    if missing:
        raise ValueError(f"weights of {missing} are missing")
