"""Which classes a tile of pixels may leave out of the first layer.

A tile may leave out a block of classes that cannot be told from rounding. Forward, that is judged
by what enters the sum over classes, backward by what the block's rows of dy' do to dx.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# ---------------------------------------------------------------- 1. The passes over the weights


@dataclass(frozen=True)
class Pass:
    """What each class adds to the squared error of a pass that leaves it out.

    Forward, entries v are left out of the sum over classes: leaving out a set K costs sum_K v^2.
    Backward, rows dy'_c are taken for 0: with w = y' dy', dx is off by J dy' over K, whose squared
    norm is sum w^2 + (sum w)^2 |y'|^2 - 2 (sum w) (sum y' w), all sums over K.
    """

    parts: tuple[Tensor, ...]  # (C, H, W) each: v^2; or w^2, w and y' w
    norm: Tensor  # (H, W), square of what the error is measured against
    map_norm: Tensor | None = None  # (H, W), |y'|^2, where there are three parts
    halo: int = 0  # pixels around a tile that it reads


def forward_passes(y: Tensor, target: Tensor) -> list[Pass]:
    """What enters the first layer, eq. (6) and (7) of docs/derivation.md.

    Args:
        y: (C, H, W) float64, the prediction's map.
        target: (H, W) int64 labels or (C, H, W) float64.
    """
    dense = target.dim() == 3
    delta = y - (target if dense else one_hot(target, len(y)))
    y_norm, delta_norm = (t.square().sum(dim=0) for t in (y, delta))
    if dense:
        pairs = [(y, y_norm), (delta, delta_norm)]
    else:  # |u| <= |δ| and |u| <= sqrt(2) |y'|: the smaller one serves z' and δz.
        pairs = [(label_difference(y, target), torch.minimum(y_norm, delta_norm))]
    return [Pass((entries.square(),), norm, halo=1) for entries, norm in pairs]


def backward_pass(y: Tensor, dy: Tensor) -> Pass:
    """The data gradient, eq. (5), of the map y' (C, H, W) and its gradient."""
    w = y * dy
    dx = w - y * w.sum(dim=0)
    return Pass((w.square(), w, y * w), dx.square().sum(dim=0), y.square().sum(dim=0))


def foreseen_backward(y: Tensor) -> Pass:
    """The same as far as the forward can tell: its mean over independent dy' of equal spread."""
    error = y.square() * (1 + y.square().sum(dim=0) - 2 * y)
    return Pass((error,), error.sum(dim=0))


def one_hot(labels: Tensor, classes: int) -> Tensor:
    return F.one_hot(labels, classes).permute(2, 0, 1).double()


def label_difference(y: Tensor, labels: Tensor) -> Tensor:
    """u = y' - m onehot of eq. (7), (C, H, W)."""
    hot = one_hot(labels, len(y))
    return y - hot * ((y * hot).sum(dim=0) > 0.5)


# --------------------------------------------------------------------- 2. What may be left out


def blocks(x: Tensor, order: Tensor, size: int) -> Tensor:
    """Sums over blocks of `size` classes: (C, H, W) -> (ceil(C / size), H, W)."""
    if size == 1:
        return x
    x = F.pad(x[order], (0, 0, 0, 0, 0, -len(x) % size))
    return x.view(-1, size, *x.shape[1:]).sum(dim=1)


def windows(x: Tensor, tile: tuple[int, int], halo: int, step: int) -> Tensor:
    """(B, H, W) -> (B, P, T): the P pixels that every `step`-th tile reads, 0 off the image."""
    height, width = tile[0] + 2 * halo, tile[1] + 2 * halo
    corners = [
        (i, j) for i in range(0, x.shape[1], tile[0]) for j in range(0, x.shape[2], tile[1])
    ][::step]
    x = F.pad(x, (halo,) * 4)
    return torch.stack([x[:, i : i + height, j : j + width].flatten(1) for i, j in corners], -1)


@dataclass(frozen=True)
class Cut:
    """A pass over B blocks of classes, cut into T tiles of P pixels."""

    parts: tuple[Tensor, ...]  # (B, P, T) each
    norm: Tensor  # (P, T)
    map_norm: Tensor | None  # (P, T)

    @staticmethod
    def of(p: Pass, maps: Sequence[Tensor], tile: tuple[int, int], step: int = 1) -> Cut:
        """Of a pass whose parts, summed over blocks, are `maps` (B, H, W)."""

        def cut(x: Tensor) -> Tensor:
            return windows(x, tile, p.halo, step)

        map_norm = None if p.map_norm is None else cut(p.map_norm.unsqueeze(0))[0]
        return Cut(tuple(map(cut, maps)), cut(p.norm.unsqueeze(0))[0], map_norm)


@dataclass(frozen=True)
class Ranking:
    """The blocks of each tile, the least error first."""

    order: Tensor  # (B, T) block at each rank
    single: Tensor  # (B, T) squared error if the block of that rank alone is left out
    nested: Tensor  # (B, T) squared error if all up to that rank are
    budget: Tensor  # (T,) squared norm that it is measured against
    scope: str

    def left_out(self, tolerance: float) -> Tensor:
        """(T,) int64: the most blocks, least error first, that `tolerance` lets a tile leave out.

        The error's norm is at most `tolerance` of the norm in the scope: each pixel's, the tile's,
        or the image's, where one threshold on single errors serves all tiles.
        """
        ranks = torch.arange(1, len(self.nested) + 1).unsqueeze(1)
        if self.scope != "image":
            return (ranks * (self.nested <= tolerance**2 * self.budget)).amax(dim=0)
        thresholds = self.single.flatten().unique()
        nested = F.pad(self.nested, (0, 0, 1, 0))  # nothing left out: no error
        best = torch.zeros_like(self.order[0])
        low, high = 0, len(thresholds) - 1
        while low <= high:
            middle = (low + high) // 2
            count = (self.single <= thresholds[middle]).sum(dim=0)
            error = nested.gather(0, count.unsqueeze(0)).sum()
            if error <= tolerance**2 * self.budget.sum():
                low, best = middle + 1, count
            else:
                high = middle - 1
        return best

    def live(self, tolerance: float) -> Tensor:
        """(B, T) bool: the blocks that stay."""
        stays = torch.arange(len(self.order)).unsqueeze(1) >= self.left_out(tolerance)
        return torch.empty_like(stays).scatter_(0, self.order, stays)


def rank(cut: Cut, scope: str) -> Ranking:
    """By the error in a scope: "image", "tile", or "pixel", where a tile's worst pixel counts."""

    def by_tile(sums: Sequence[Tensor]) -> Tensor:
        error = sums[0]
        if cut.map_norm is not None:
            error = error + sums[1].square() * cut.map_norm - 2 * sums[1] * sums[2]
            error = error.clamp(min=0)
        if scope != "pixel":
            return error.sum(dim=1)
        return torch.where(error > 0, error / cut.norm, 0).amax(dim=1)  # 0 of 0 is no error

    single, order = by_tile(cut.parts).sort(dim=0)
    nested = by_tile(
        [p.gather(0, order.unsqueeze(1).expand_as(p)).cumsum(dim=0) for p in cut.parts]
    )
    budget = torch.ones_like(cut.norm[0]) if scope == "pixel" else cut.norm.sum(dim=0)
    return Ranking(order, single, nested, budget, scope)


def cluster(live: Tensor, size: int) -> Tensor:
    """(C,) an order in which classes that matter in the same tiles share a block of `size`.

    Args:
        live: (C, T) bool, whether a class matters in a tile.
    """
    together = live.double() @ live.double().T
    often = together.diagonal().clone()
    together /= (often.unsqueeze(1) * often).sqrt().clamp(min=1)
    near, order = torch.zeros_like(often), []
    for i in range(len(live)):
        if i % size == 0:
            near = often.clone()
        chosen = int(near.argmax())
        order.append(chosen)
        near = together[chosen] + (0 if i % size == 0 else near)
        often[chosen] = -1.0
        near[often < 0] = -1.0
    return torch.tensor(order)
