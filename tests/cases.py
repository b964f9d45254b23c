"""What the tests share: shapes, each with its reason, and tolerances against float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from gpl_fast import LossNet, TopK
from gpl_fast.fast import policy
from gpl_fast.fast.call import Call

# (N, C, H, W)
SHAPES = {
    "odd": (2, 5, 37, 45),  # every pooling floors somewhere
    "smallest": (1, 3, 32, 32),  # one window at the last of five levels
    "wide": (1, 4, 33, 65),
    "many classes": (1, 150, 32, 33),
    "one channel": (2, 1, 34, 40),  # depth, masks
}

# What a test of the public interface runs on, where all of them can do it.
BACKENDS = ("reference", "fast")

# Added to twice PyTorch's own error in the same dtype, relative to the result's scale.
ATOL = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 5e-4}

# The reference itself against float64: (value, gradient), relative. Two to four times the worst
# of a dozen seeds: where rounding swaps a pooling's winner or a ReLU's sign, a gradient moves.
HALF_BOUND = {torch.bfloat16: (0.05, 0.45), torch.float16: (0.006, 0.2)}

# Small nets: odd widths pad in packed arrays; the last level still has several channels.
NARROW = (5, 8, 7, 6, 9)


def every_way(test):
    """Runs a test with each arithmetic of the convolutions, Winograd's wherever it can be."""
    ways = pytest.mark.parametrize("arithmetic", ["own", "mixed", "winograd"], indirect=True)
    return pytest.mark.usefixtures("arithmetic")(ways(test))


def error(got: Tensor, truth: Tensor) -> float:
    """Norm-wise error relative to the truth, in float64."""
    got, truth = got.detach(), truth.detach().double()
    return float((got.double() - truth).norm() / truth.norm().clamp(min=1e-300))


def value_and_grad(loss, pred: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
    """The loss and d(sum of it)/d(pred), from a leaf of the same values and strides."""
    x = pred.detach().requires_grad_()
    value = loss(x, *args, **kwargs)
    (grad,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), grad


def agree(got, want, tolerance: float = 1e-5) -> None:
    """Value and gradient are those wanted, relative to the largest element of each."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


def make_target(kind: str, shape: tuple[int, int, int, int], loss=None) -> Tensor | TopK:
    """A float32 target of a kind for predictions of `shape`; "features" are encoded by `loss`."""
    n, c, h, w = shape
    if kind == "labels":
        return torch.randint(c, (n, h, w))
    dense = 2 * torch.randn(shape)
    if kind == "topk":
        return TopK(*torch.softmax(dense, dim=1).topk(2, dim=1))
    return loss.encode(dense) if kind == "features" else dense


def call_of(net: LossNet, features: Mapping[str, float] | None = None, **fields: Any) -> Call:
    """The fast path's call of a network on float32 maps and a dense target, both softmax, by who
    decides on the CPU now; up to the last layer.

    Args:
        features: weights of the tapped layers.
        fields: of `Call`, in place of those.
    """
    features = {net.layers[-1].name: 1.0} if features is None else features
    usual: dict[str, Any] = {
        "policy": policy.current(torch.device("cpu")),
        "styles": (),
        "kind": "dense",
        "activation": "softmax",
        "target_activation": fields.get("activation", "softmax"),
        "temperature": 1.0,
        "dtype": torch.float32,
        "workspace_mb": None,
    }
    return Call(
        network=net.identity, chain=net.chain, features=tuple(features.items()), **usual | fields
    )
