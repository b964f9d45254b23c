"""Chains of named layers: the paper's VGG-like structures, and what may follow what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, SupportsFloat, SupportsIndex

import torch
from torch import Tensor

from gpl_fast.input_checks import as_float, as_int

# Convolutions per block of the paper's networks (its Section 4.1).
STRUCTURES: Mapping[str, tuple[int, ...]] = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
WIDTHS = (64, 128, 256, 512, 512)
KERNEL_SIZES = (1, 3, 5, 7)
POOLS = ("max", "avg", "stride")

Normalisation = SupportsFloat | Iterable[SupportsFloat]


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


def parse_blocks(net: str | Iterable[SupportsIndex]) -> tuple[int, ...]:
    """``"vgg19"``, ``"2,2,4,4,4"`` or ``[2, 2, 4, 4, 4]`` -> convolutions per block.

    Raises:
        ValueError: neither a known name nor a list of positive integers.
    """
    if isinstance(net, str) and net in STRUCTURES:
        return STRUCTURES[net]
    try:
        parts = [int(part) for part in net.split(",")] if isinstance(net, str) else net
        blocks = tuple(as_int("net", n) for n in parts)
    except (TypeError, ValueError):
        blocks = ()
    if not blocks or min(blocks) < 1:
        known = ", ".join(repr(name) for name in STRUCTURES)
        raise ValueError(
            f"net: got {net!r}, expected one of {known}, or convolutions per block such as "
            "'1,1,1,1,1', or a LossNet (LossNet.vgg, .from_sequential, .from_module, .load)"
        )
    return blocks


class Structure(NamedTuple):
    """The arguments of `LossNet.vgg` that give its chain."""

    in_channels: int
    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    kernel_size: int
    pool: str

    @classmethod
    def checked(
        cls,
        in_channels: SupportsIndex,
        blocks: Iterable[SupportsIndex],
        widths: Iterable[SupportsIndex],
        kernel_size: SupportsIndex,
        pool: str,
    ) -> Structure:
        """Raises: ValueError, as `LossNet.vgg`."""
        c = check_channels(in_channels)
        counts, wide = _positive("blocks", blocks), _positive("widths", widths)
        if not counts:
            raise ValueError("blocks: got none, expected integers >= 1, one for each block")
        if len(wide) < len(counts):
            raise ValueError(
                f"widths: got {wide}, expected {len(counts)} integers >= 1, one for each block"
            )
        k = as_int("kernel_size", kernel_size, f"one of {KERNEL_SIZES}")
        if k not in KERNEL_SIZES:
            raise ValueError(f"kernel_size: got {kernel_size!r}, expected one of {KERNEL_SIZES}")
        if pool not in POOLS:
            raise ValueError(f"pool: got {pool!r}, expected one of {POOLS}")
        return cls(c, counts, wide[: len(counts)], k, pool)

    def layers(self) -> list[Layer]:
        """A block is convolutions with their ReLUs and a down-sampling by 2."""
        parts: list[Part] = []
        for count, width in zip(self.blocks, self.widths, strict=True):
            parts += [Part("conv", width, self.kernel_size), Part("relu")] * count
            down = Part("down", width, self.kernel_size)
            parts.append(down if self.pool == "stride" else Part(f"{self.pool}pool"))
        return named_chain(self.in_channels, parts)


def check_channels(in_channels: SupportsIndex) -> int:
    """Raises: ValueError if `in_channels` is not an integer >= 1."""
    c = as_int("in_channels", in_channels, "an integer >= 1")
    if c < 1:
        raise ValueError(f"in_channels: got {in_channels!r}, expected an integer >= 1")
    return c


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


def check_normalisation(
    mean: Normalisation | None, std: Normalisation | None, channels: int
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """`mean` and `std` as tuples of 1 or `channels` numbers: a number is one for all channels.

    Raises:
        ValueError: only one of them, other lengths, not finite numbers, or a std that is not > 0.
    """
    if mean is None and std is None:
        return None, None
    if mean is None or std is None:
        raise ValueError(f"mean, std: got {mean} and {std}, expected both or neither")
    means, stds = _numbers(mean), _numbers(std)
    for got in (means, stds):
        if len(got) not in (1, channels):
            raise ValueError(
                f"mean, std: got {len(got)} values, expected {channels}, one for each channel that "
                "enters the network, or one number for all"
            )
    if not all(s > 0 for s in stds):
        raise ValueError(f"mean, std: got {mean} and {std}, expected std > 0")
    count = max(len(means), len(stds))
    return means * (count // len(means)), stds * (count // len(stds))


def _numbers(given: Normalisation) -> tuple[float, ...]:
    if isinstance(given, str | bytes | Mapping):
        raise ValueError(f"mean, std: got {given!r}, expected numbers, one for each channel")
    try:
        values = list(iter(given))  # type: ignore[arg-type]
    except TypeError:  # a number, or an array or a tensor of no dimension
        values = [given]  # type: ignore[list-item]
    return tuple(as_float("mean, std", v, "finite numbers, one for each channel") for v in values)


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


def _positive(what: str, numbers: Iterable[SupportsIndex]) -> tuple[int, ...]:
    expected = "a list of integers >= 1, one for each block"
    if isinstance(numbers, str) or not isinstance(numbers, Iterable):
        raise ValueError(f"{what}: got {numbers!r}, expected {expected}")
    given = tuple(numbers)
    out = tuple(as_int(what, n, expected) for n in given)
    if any(n < 1 for n in out):
        raise ValueError(f"{what}: got {given}, expected {expected}")
    return out
