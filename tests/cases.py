"""What the tests share: shapes, each with its reason, and tolerances against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpl_fast import TopK, ops, plan

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


# How the CPU's convolutions are computed: "own", in the maps' dtype, as where a CPU multiplies its
# matrices; "mixed", bfloat16 so on small maps and by Winograd's algorithm on larger ones;
# "float32", by Winograd's algorithm where it pays; "winograd", wherever it can be.
ARITHMETIC = ("own", "mixed", "float32", "winograd")


def use_arithmetic(patch: pytest.MonkeyPatch, name: str) -> None:
    """One of `ARITHMETIC`, whatever CPU this is."""

    def arithmetic(dtype: torch.dtype) -> str:
        if name == "own" or (name == "mixed" and dtype == torch.bfloat16):
            return name
        return "float32"

    patch.setattr(ops, "cpu_arithmetic", arithmetic)
    patch.setattr(plan, "MIXED_TILES", 100)
    patch.setattr(plan, "MIXED_CHANNELS", 5)
    if name in ("mixed", "winograd"):
        patch.setattr(plan, "WINOGRAD_TILES", {2: 0, 4: 0})


def every_way(test):
    """Runs a test with each arithmetic of the convolutions, Winograd's wherever it can be."""
    ways = pytest.mark.parametrize("arithmetic", ["own", "mixed", "winograd"], indirect=True)
    return pytest.mark.usefixtures("arithmetic")(ways(test))


def error(got: Tensor, truth: Tensor) -> float:
    """Norm-wise error relative to the truth, in float64."""
    truth = truth.double()
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
