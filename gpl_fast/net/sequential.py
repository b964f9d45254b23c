"""What an nn.Sequential holds as a chain of layers, for `LossNet.from_sequential`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from gpl_fast.net.layers import Layer, Part, named_chain
from gpl_fast.real_tensors import holds_values, real_tensors

PLAIN = (nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d)
# Where a subclass or an instance may compute something else than its base.
COMPUTES = ("forward", "__call__", "_call_impl", "_conv_forward", "__iter__")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@real_tensors()
def sequential_chain(sequential: nn.Sequential) -> tuple[list[Layer], dict[str, Tensor]]:
    """Layers, and float32 copies of weights and biases on the CPU.

    Raises:
        TypeError, ValueError: as `LossNet.from_sequential`.
    """
    if not isinstance(sequential, nn.Sequential):
        raise TypeError(
            f"from_sequential: got {type(sequential).__name__}, expected torch.nn.Sequential "
            "(of torchvision's VGG its .features); any other module: LossNet.from_module"
        )
    if why := altered(sequential):
        raise ValueError(f"from_sequential: got a {type(sequential).__name__} with {why}")
    layers: list[Layer] = []
    parts: list[Part] = []
    weights: dict[str, Tensor] = {}  # float64 while they are folded
    before: nn.Module | None = None
    for position, m in _flatten(sequential):
        if why := altered(m):
            raise ValueError(f"from_sequential: got {m} at position {position} with {why}")
        if isinstance(m, nn.BatchNorm2d) and isinstance(before, nn.Conv2d):
            _fold(m, position, weights, layers[-1].name)
            continue
        before, part = m, _part(m)
        try:
            if part is None or (isinstance(m, nn.Conv2d) and layers
                                and m.in_channels != layers[-1].out_channels):  # fmt: skip
                raise ValueError
            first = layers[0].in_channels if layers else getattr(m, "in_channels", 0)
            layers = named_chain(first, [*parts, part])
        except ValueError:
            raise ValueError(
                f"from_sequential: got {m} at position {position}, expected a chain of "
                "Conv2d (odd kernel, stride 1, padding kernel_size // 2, zeros), each followed "
                "by BatchNorm2d or not and at most one ReLU, and MaxPool2d(2) or AvgPool2d(2); for "
                "anything else (strided stems, pools of 3 x 3, another normalisation) use "
                "LossNet.from_module"
            ) from None
        parts.append(part)
        if isinstance(m, nn.Conv2d):
            name = layers[-1].name
            weights[name] = _copy(m.weight, position)
            if m.bias is not None:
                weights[f"{name}.bias"] = _copy(m.bias, position)
    if not layers:
        raise ValueError("from_sequential: got an empty chain, expected at least one Conv2d")
    return layers, {name: weight.to(torch.float32) for name, weight in weights.items()}


def altered(m: nn.Module) -> str | None:
    """Why `m` computes something else than the torch module that it is or derives from, or may do
    so later, with the way out; None if it does not, or derives from none that a chain holds."""
    base = next((b for b in PLAIN if isinstance(m, b)), None)
    if base is None:
        return None
    for name in COMPUTES:
        if name in vars(m) or getattr(type(m), name, None) is not getattr(base, name, None):
            return (
                f"a {name} of its own, expected {base.__name__}'s; LossNet.from_module takes any "
                "module"
            )
    if any(is_lazy(p) for p in m.parameters(recurse=False)):
        return "weights that do not exist yet; run the module once on an input of the right size"
    if parametrize.is_parametrized(m):
        return (
            "a parametrization of its weights; torch.nn.utils.parametrize.remove_parametrizations "
            "makes them plain, or use LossNet.from_module"
        )
    if any(getattr(m, hooks, None) for hooks in HOOKS):
        return (
            "hooks, which may change what it computes; remove those that only watch, and move what "
            "others compute into a forward, for LossNet.from_module (which itself keeps hooks that "
            "torch.nn.utils makes a weight with, as weight_norm's, and methods of the module's own "
            "parts)"
        )
    return None


def _flatten(sequential: nn.Sequential, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules by position, "4" or inside of a nested chain "4.0"."""
    for name, m in sequential._modules.items():
        if isinstance(m, nn.Sequential) and not altered(m):
            yield from _flatten(m, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", m


def _part(m: nn.Module) -> Part | None:
    if isinstance(m, nn.Conv2d) and _is_same_convolution(m):
        return Part("conv", m.out_channels, int(m.kernel_size[0]))
    if isinstance(m, nn.ReLU):
        return Part("relu")
    if isinstance(m, nn.MaxPool2d | nn.AvgPool2d) and _halves(m):
        return Part("maxpool" if isinstance(m, nn.MaxPool2d) else "avgpool")
    return None


def _fold(norm: nn.BatchNorm2d, position: str, weights: dict[str, Tensor], conv: str) -> None:
    """Put a batch normalisation by its running statistics into the convolution before it:
    ``γ (W x + b − μ) / sqrt(σ² + ε) + β``, in float64."""
    weight = weights[conv]
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(
            f"from_sequential: got {norm} at position {position} without running statistics, "
            "expected those that it was trained with: what it computes depends on the batch; run "
            "it with track_running_stats=True, or use LossNet.from_module"
        )
    if norm.num_features != weight.shape[0]:
        raise ValueError(
            f"from_sequential: got {norm} at position {position}, expected num_features="
            f"{weight.shape[0]}, the convolution's channels"
        )
    mean, scale = (_copy(t, position) for t in (norm.running_mean, norm.running_var))
    scale.add_(norm.eps).rsqrt_()
    if norm.weight is not None:
        scale *= _copy(norm.weight, position)
    bias = (weights.get(f"{conv}.bias", 0) - mean) * scale
    weights[conv] = weight * scale[:, None, None, None]
    weights[f"{conv}.bias"] = bias if norm.bias is None else bias + _copy(norm.bias, position)


def _copy(w: Tensor, position: str) -> Tensor:
    if not holds_values(w) or not w.is_floating_point():
        raise ValueError(
            f"from_sequential: got {w.dtype} weights on {w.device} at position {position}, "
            "expected floating ones that hold values; load them first"
        )
    return w.detach().to(device="cpu", dtype=torch.float64, copy=True)


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
