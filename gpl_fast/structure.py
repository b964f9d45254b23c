"""Chains of named layers: the paper's VGG-like structures, and what an nn.Sequential holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

# Convolutions per block of the paper's networks (its Section 4.2).
STRUCTURES: Mapping[str, tuple[int, ...]] = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
WIDTHS = (64, 128, 256, 512, 512)
KERNEL_SIZES = (1, 3, 5, 7)
POOLS = ("max", "avg", "stride")
KINDS = ("conv", "relu", "maxpool", "avgpool", "down")


@dataclass(frozen=True)
class Layer:
    """One step of the chain: ``kind`` is conv, relu, maxpool, avgpool or down (stride 2 + ReLU)."""

    name: str
    kind: str
    in_channels: int
    out_channels: int
    kernel_size: int = 1


def parse_blocks(net: str) -> tuple[int, ...]:
    """``"vgg19"`` or ``"2,2,4,4,4"`` -> convolutions per block.

    Raises:
        ValueError: the text is neither a known name nor a list of positive integers.
    """
    if net in STRUCTURES:
        return STRUCTURES[net]
    try:
        blocks = tuple(int(part) for part in net.split(","))
    except ValueError:
        blocks = ()
    if not blocks or min(blocks) < 1:
        known = ", ".join(repr(name) for name in STRUCTURES)
        raise ValueError(
            f"net: got {net!r}, expected one of {known}, or convolutions per block such as "
            "'1,1,1,1,1', or a LossNet (LossNet.vgg, .from_sequential, .from_module, .load)"
        )
    return blocks


def sequential_chain(sequential: nn.Sequential) -> tuple[list[Layer], dict[str, Tensor]]:
    """Layers, and copies of weights and biases, of ``LossNet.from_sequential``.

    Raises:
        TypeError, ValueError: as `LossNet.from_sequential`.
    """
    if not isinstance(sequential, nn.Sequential):
        raise TypeError(
            f"from_sequential: got {type(sequential).__name__}, expected torch.nn.Sequential "
            "(of torchvision's VGG its .features); any other module: LossNet.from_module"
        )
    layers: list[Layer] = []
    weights: dict[str, Tensor] = {}
    block, i, c = 1, 0, 0
    for position, m in enumerate(_flatten(sequential)):
        after_conv = bool(layers) and layers[-1].kind == "conv"
        if isinstance(m, nn.Conv2d) and _is_same_convolution(m) and c in (0, m.in_channels):
            i, c = i + 1, m.out_channels
            name = f"conv{block}_{i}"
            layers.append(Layer(name, "conv", m.in_channels, c, int(m.kernel_size[0])))
            weights[name] = m.weight.detach().float().cpu().clone()
            if m.bias is not None:
                weights[f"{name}.bias"] = m.bias.detach().float().cpu().clone()
        elif isinstance(m, nn.ReLU) and after_conv:
            layers.append(Layer(f"relu{block}_{i}", "relu", c, c))
        elif isinstance(m, nn.MaxPool2d | nn.AvgPool2d) and _halves(m) and layers:
            kind = "maxpool" if isinstance(m, nn.MaxPool2d) else "avgpool"
            layers.append(Layer(f"pool{block}", kind, c, c))
            block, i = block + 1, 0
        else:
            raise ValueError(
                f"from_sequential: got {m} at position {position}, expected a chain of "
                "Conv2d (odd kernel, stride 1, padding kernel_size // 2, zeros), each followed "
                "by at most one ReLU, and MaxPool2d(2) or AvgPool2d(2); for anything else use "
                "LossNet.from_module"
            )
    if not layers:
        raise ValueError("from_sequential: got an empty chain, expected at least one Conv2d")
    return layers, weights


def check_chain(layers: Sequence[Layer]) -> None:
    """Raises: TypeError for an unknown kind, or channels that do not fit the layer before."""
    for before, layer in zip((None, *layers), layers, strict=False):
        if layer.kind not in KINDS or (before and layer.in_channels != before.out_channels):
            raise TypeError(f"got {layer} after {before}")


def weight_shape(layer: Layer) -> tuple[int, int, int, int]:
    return (layer.out_channels, layer.in_channels, layer.kernel_size, layer.kernel_size)


def _flatten(sequential: nn.Sequential) -> list[nn.Module]:
    flat: list[nn.Module] = []
    for m in sequential:
        flat.extend(_flatten(m) if isinstance(m, nn.Sequential) else [m])
    return flat


def _is_same_convolution(m: nn.Conv2d) -> bool:
    k = m.kernel_size[0]
    return (
        m.kernel_size == (k, k)
        and k % 2 == 1
        and m.stride == (1, 1)
        and m.padding in ((k // 2, k // 2), "same")
        and m.dilation == (1, 1)
        and m.groups == 1
        and m.padding_mode == "zeros"
    )


def _halves(m: nn.MaxPool2d | nn.AvgPool2d) -> bool:
    pair = (2, (2, 2))
    if isinstance(m, nn.MaxPool2d) and (m.dilation not in (1, (1, 1)) or m.return_indices):
        return False
    if isinstance(m, nn.AvgPool2d) and m.divisor_override is not None:
        return False
    no_padding = m.padding in (0, (0, 0)) and not m.ceil_mode
    return m.kernel_size in pair and m.stride in pair and no_padding
