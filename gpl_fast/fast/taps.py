"""(2): what is compared at the tapped layers, and what is kept of it."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from gpl_fast.fast.chunk import Chunk
from gpl_fast.stages import CRITERIA, TritonStages


class TapsForward:
    """Collects the seed of each tap, ``diff``, and for style the prediction's features and
    ``G' − G``.

    Args:
        terms: (4, N) float64, whose first two rows are added to.
        keep: whether the backward will read what is saved.
        maps: of `Plan.values_shape`, to be filled with the distance of each pixel.
    """

    def __init__(
        self, chunk: Chunk[TritonStages], terms: Tensor, keep: bool, maps: Tensor | None = None
    ) -> None:
        self.chunk, self.terms, self.keep = chunk, terms, keep
        self.maps = {} if maps is None else chunk.plan.by_tap(maps)
        self.diff: dict[str, Tensor] = {}
        # Of each image, where it has been summed as the rows came.
        self.sums: dict[str, Tensor] = {}

    def begin(self, here: Collection[str]) -> None:
        """The taps of a segment."""
        chunk, call = self.chunk, self.chunk.plan.call
        self.sums, self.diff = {}, {}
        for tap, _ in call.features:
            if tap not in here:
                continue
            if self.keep:
                self.diff[tap] = chunk.saved[f"diff.{tap}"][chunk.images]
            elif tap not in call.normalized:
                shape = (len(chunk.x[chunk.images]), *chunk.plan.tap_shape(tap)[1:])
                self.diff[tap] = chunk.x.new_empty(shape, dtype=chunk.plan.dtype)
        for tap in call.styled.intersection(here):
            chunk.saved[f"gram.{tap}"][chunk.images].zero_()

    def add(self, tap: str, sums: Tensor) -> None:
        """What some rows of a tap sum to, (n,) float64."""
        before = self.sums.get(tap)
        self.sums[tap] = sums if before is None else before + sums

    def take(self, tap: str, y: Tensor | None, d: Tensor | None, a: int, b: int) -> None:
        """Rows [a, b) of a layer: of the carried branch and δ, or of the only branch."""
        chunk, call = self.chunk, self.chunk.plan.call
        diff = self.diff.get(tap)
        if tap in call.normalized:
            assert y is not None
            self._normalized(tap, y, a, b)
        elif diff is not None:
            if d is None:
                assert y is not None
                target = chunk.target.get(f"feature.{tap}")
                diff[:, a:b] = y if target is None else y - target[chunk.images, a:b]
            elif diff[:, a:b].data_ptr() != d.data_ptr():
                diff[:, a:b] = d
        if tap in call.styled:
            assert y is not None
            self._style(tap, y, d, a, b)

    def _normalized(self, tap: str, y: Tensor, a: int, b: int) -> None:
        chunk, distance = self.chunk, self.chunk.plan.call.distance
        diff, pixels = self.diff.get(tap), self.maps.get(tap)
        target = chunk.target[f"feature.{tap}"][chunk.images, a:b]
        if y.dtype != target.dtype:  # rounded alike: equal ones stay equal
            y = chunk.take("tap", tuple(y.shape), target.dtype).copy_(y)
        sums = chunk.stages.unit_diff_fwd(
            y,
            criterion=CRITERIA[distance.criterion],
            eps=distance.eps,
            eps_inside=distance.eps_inside,
            target=target,
            weight=chunk.target.get(f"weight.{tap}"),
            seed=None if diff is None else diff[:, a:b],
            distances=None if pixels is None else pixels[chunk.images, a:b],
        )
        self.add(tap, sums)

    def _style(self, tap: str, y: Tensor, d: Tensor | None, a: int, b: int) -> None:
        chunk = self.chunk
        phi = y.float().flatten(1, 2)
        if d is not None:
            delta = d.float().flatten(1, 2)
            phi = phi + delta * chunk.from_target.view(-1, 1, 1)
        gram = chunk.saved[f"gram.{tap}"][chunk.images]
        if f"gram.{tap}" in chunk.target:
            gram += phi.transpose(1, 2) @ phi
        else:
            # G' − G = δᵀφ' + φᵀδ: the difference form again, no cancellation.
            gram += delta.transpose(1, 2) @ phi + (phi - delta).transpose(1, 2) @ delta
        if self.keep:
            kept = chunk.saved[f"phi.{tap}"]
            kept[chunk.images, a:b] = phi.view(y.shape).to(kept.dtype)

    def reduce(self, here: Collection[str]) -> None:
        """Add the terms of the segment's taps."""
        chunk, call = self.chunk, self.chunk.plan.call
        if call.encode:  # nothing is compared
            return
        feature, style = self.terms[0, chunk.images], self.terms[1, chunk.images]
        for tap, _ in call.features:
            if tap in here:
                alpha = chunk.plan.coefficients[f"feature.{tap}"]
                feature.add_(self._sum(tap), alpha=alpha)
        for tap, weight in call.styles:
            if tap not in here:
                continue
            _, h, w, c = chunk.plan.tap_shape(tap)
            gram = chunk.saved[f"gram.{tap}"][chunk.images]
            gram /= c * h * w
            other = chunk.target.get(f"gram.{tap}")
            if other is not None:
                gram -= other if other.shape[0] == 1 else other[chunk.images]
            if call.distance.criterion == "l2":
                style.add_(gram.double().square().sum(dim=(1, 2)), alpha=weight)
            else:
                style.add_(gram.double().abs().mean(dim=(1, 2)), alpha=weight)
                gram.sign_()  # what the backward multiplies with

    def _sum(self, tap: str) -> Tensor:
        """Of a feature tap, (n,) float64; what is kept of it becomes the seed."""
        call, diff = self.chunk.plan.call, self.diff.get(tap)
        if tap in self.sums:
            return self.sums[tap]
        assert diff is not None
        if tap in call.squared:
            return self.chunk.stages.diff_reduce_fwd(diff)
        return self.chunk.stages.diff_reduce_fwd(
            diff,
            criterion=CRITERIA[call.distance.criterion],
            weight=self.chunk.target.get(f"weight.{tap}"),
            seed=diff if self.keep else None,
        )
