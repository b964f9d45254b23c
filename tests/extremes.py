"""Logits at the edges of float32, and temperatures that take them beyond."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min
TEMPERATURES = (1e-46, 1e-30, 1e-3, 0.3, 1 / 3, 1.0, 3.0, 7.0, 1e30, 1e38)
# A pixel's kind is its column's, modulo 4.
KINDS = ("ordinary", "some classes padded", "all classes padded", "large")


def logits_of_every_kind(n: int, c: int, h: int, w: int) -> Tensor:
    """(n, c, h, w): padded ones are the lowest number, large ones about 1e7. Where some classes are
    padded the first is not."""
    x = 3 * torch.randn(n, c, h, w)
    x[..., 1::4].masked_fill_(torch.rand(n, c, h, len(range(1, w, 4))) < 0.4, LOWEST)
    x[:, 0, :, 1::4] = 2.0
    x[..., 2::4] = LOWEST
    x[..., 3::4] *= 1e7
    return x


def by_kind(ours: Tensor, plain: Tensor, truth: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(ours, PyTorch's, float64's) of each kind of pixels, from such maps (N, C, H, W).

    Where PyTorch's is no number its error counts as 0, and where the truth is no float32, ours may
    be any number but NaN.
    """
    assert not ours.isnan().any()
    for first in range(len(KINDS)):
        o, p, t = (v[..., first :: len(KINDS)].double() for v in (ours, plain, truth))
        known = t.abs() < -LOWEST
        yield torch.where(known, o, 0), torch.where(known & p.isfinite(), p, t * known), t * known
