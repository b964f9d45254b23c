"""The images that go through together, and the rows of what belongs to them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from gpl_fast.fast.plan import Plan
from gpl_fast.stages import BackwardStages

# What the half of the step calls at most: `Plan.how` says which of them.
S = TypeVar("S", bound=BackwardStages)


class Maps(NamedTuple):
    """Maps (n, rows, W, C) of a strip: the carried branch and δ, prediction less target.

    Without `delta` there is one branch, the plain form. Without `carried`, `delta` is u alone, to
    which `look_up` adds the target. `stack` is both, where they are one tensor (2, n, rows, W, C).
    """

    carried: Tensor | None
    delta: Tensor | None
    stack: Tensor | None = None

    @classmethod
    def of(cls, stack: Tensor) -> Maps:
        """One or both branches, stacked."""
        return cls(stack[0], stack[1] if len(stack) == 2 else None, stack)


class Rows(NamedTuple):
    """Which rows of a step a strip has: those of its convolution, and its own of these."""

    lo: int
    hi: int
    a: int
    b: int
    strips: bool

    def inside(self, height: int) -> tuple[slice, slice]:
        """The rows inside the image: of the strip, and of the image."""
        a, b = max(self.lo, 0), min(self.hi, height)
        return slice(a - self.lo, b - self.lo), slice(a, b)


class Chunk(Generic[S]):
    """Images of one call.

    Args:
        plan: of the call.
        x: (N, C, H, W) prediction, any strides.
        target: by name, as there are: dense (N, C, h, w), labels (N, H, W) int64, topk_values,
            topk_indices (N, k, H, W), topk_rest (N, H, W), valid (N, H, W) bool or float32,
            ce_labels (N, H, W) int64, class_weight (C,), pos_weight (C,), multi_hot (N, C, H, W)
            uint8 labels of elements (also as dense, and as elements), ce_mask (N, H, W), and for
            tap t ``feature.t`` (N, H_b, W_b, C_b) stored target features, ``gram.t``
            (1 or N, C_b, C_b) of another style target, ``weight.t`` (C_b,) float32 of its channels.
        packs: the weights; `gpl_fast.net.weights.pack_weights`.
        saved: `Plan.saved`, of all images.
        stages: what `gpl_fast.stages` lists.
    """

    images = slice(0, 0)  # of the call, that go through now
    from_target: Tensor  # (n,) bool, those of them whose target is carried

    def __init__(
        self,
        plan: Plan,
        x: Tensor,
        *,
        target: Mapping[str, Tensor],
        packs: Mapping[str, Tensor],
        saved: dict[str, Tensor],
        stages: S,
    ) -> None:
        self.plan, self.x, self.target, self.packs = plan, x, target, packs
        self.saved, self.stages = saved, stages
        self.branch: Tensor | None = None  # (N,) bool, the same of all images
        # Of the segment: bytes by name, what is there, and transformed weights.
        self.room: Mapping[str, int] = {}
        self.held: dict[str, Tensor] = {}
        self.weights: dict[Any, Tensor] = {}

    def begin(self, images: slice, room: Mapping[str, int]) -> None:
        """A segment, for these images: what the one before held is gone."""
        self.room, self.held, self.weights = room, {}, {}
        if images != self.images:
            self.images = images
            if self.branch is not None:
                self.from_target = self.branch[images]

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised memory, by default of the maps' dtype; what the name stood for is gone.

        The same for every strip, since an allocator that maps so much anew takes as long for it as
        the softmax.
        """
        dtype = dtype or self.plan.dtype
        count, held = math.prod(shape), self.held.get(name)
        if held is None or held.dtype != dtype or held.numel() < count:
            planned = self.room.get(name, 0)
            assert count * dtype.itemsize <= planned, (name, shape, dtype, planned)
            del held  # it goes before what replaces it is made
            self.held.pop(name, None)
            held = self.held[name] = self.x.new_empty(shape, dtype=dtype)
        return held if held.shape == shape else held.view(-1)[:count].view(shape)

    def of(self, name: str) -> Tensor | None:
        """A tensor of the target, of these images."""
        t = self.target.get(name)
        return None if t is None else t[self.images]

    def rows(self, name: str, a: int, b: int) -> Tensor | None:
        """Rows [a, b) of a tensor of the target, (n, H, W) or (n, k, H, W)."""
        t = self.target.get(name)
        return None if t is None else t[self.images][..., a:b, :]

    def rows_of(self, names: Sequence[str], a: int, b: int) -> dict[str, Tensor]:
        """Those of `names` that there are, as `rows`."""
        here, target = self.images, self.target
        return {name: target[name][here][..., a:b, :] for name in names if name in target}

    def saved_rows(self, name: str, a: int = 0, b: int | None = None) -> Tensor | None:
        """Rows [a, b) of a saved tensor."""
        t = self.saved.get(name)
        return None if t is None else t[self.images, a:b]


def zero_outside(z: Tensor, lo: int, height: int) -> None:
    """Rows of `z`, whose first is row `lo` of an image of `height` rows, that lie outside of it."""
    if lo < 0:
        z[:, :-lo] = 0
    if lo + z.shape[1] > height:
        z[:, height - lo :] = 0
