"""(2): what is compared at the tapped layers, and the gradient that begins there."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from gpl_fast.fast.chunk import Chunk
from gpl_fast.fast.plan import Plan
from gpl_fast.stages import CRITERIA, TritonStages

# Where float16's seeds are larger than this, their image's chain is scaled down: the layers below
# have room to grow by as much again.
LARGE = 256.0


class TapsForward:
    """Collects the seed of each tap, ``diff``, and for style the prediction's features and
    ``G' − G``.

    Args:
        terms: (4, N) float64, whose first two rows are added to.
        keep: whether the backward will read what is saved.
    """

    def __init__(self, chunk: Chunk[TritonStages], terms: Tensor, keep: bool) -> None:
        self.chunk, self.terms, self.keep = chunk, terms, keep
        self.diff: dict[str, Tensor] = {}
        # Those that δ may be written to: of normalised features the seed alone is.
        self.place: dict[str, Tensor] = {}
        # Of each image, where it has been summed as the rows came.
        self.sums: dict[str, Tensor] = {}

    def begin(self, here: Collection[str]) -> None:
        """The taps of a segment."""
        chunk, call = self.chunk, self.chunk.plan.call
        self.sums, self.diff, self.place = {}, {}, {}
        for tap, _ in call.features:
            if tap not in here:
                continue
            if self.keep:
                self.diff[tap] = chunk.saved[f"diff.{tap}"][chunk.images]
            elif tap not in call.normalized:
                shape = (len(chunk.x[chunk.images]), *chunk.plan.tap_shape(tap)[1:])
                self.diff[tap] = chunk.x.new_empty(shape, dtype=chunk.plan.dtype)
            if tap not in call.normalized:
                self.place[tap] = self.diff[tap]
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
            self._normalized(tap, y, d, a, b)
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

    def _normalized(self, tap: str, y: Tensor, d: Tensor | None, a: int, b: int) -> None:
        chunk, distance = self.chunk, self.chunk.plan.call.distance
        diff, target = self.diff.get(tap), chunk.of(f"feature.{tap}")
        sums = chunk.stages.unit_diff_fwd(
            y,
            criterion=CRITERIA[distance.criterion],
            eps=distance.eps,
            eps_inside=distance.eps_inside,
            delta=d,
            from_target=None if d is None else chunk.from_target,
            target=None if d is not None or target is None else target[:, a:b],
            weight=chunk.target.get(f"weight.{tap}"),
            seed=None if diff is None else diff[:, a:b],
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


class Seeds:
    """``dE_b`` of each tap at unit scale; what it was divided by is applied at the chain's end.

    Args:
        g: (4, N) float32, the gradients of the forward's terms.

    Attributes:
        of: what each tap's is multiplied by: a number, or one for each image, (N,) float32.
        scale: (N,) float32, which the logits' gradient is multiplied by.
    """

    of: dict[str, float | Tensor]

    def __init__(self, plan: Plan, saved: dict[str, Tensor], g: Tensor) -> None:
        self.plan, self.saved = plan, saved
        unit, self.of = plan.unit, dict(plan.relative)
        if not plan.call.styles:
            self.scale = g[0] * unit
        else:
            g_n = g[:2].abs().amax(dim=0)
            share = torch.where(g_n == 0, 0, g[:2] / g_n)
            self.of = {
                name: share[0 if name.startswith("feature") else 1] * factor
                for name, factor in plan.relative.items()
            }
            self.scale = (unit * g_n).float()
        if plan.dtype == torch.float16 and plan.n:
            self._fit_float16()

    def _fit_float16(self) -> None:
        """Scale by powers of two what float16 would not hold; nothing else changes a bit."""
        largest = torch.stack([self._largest(name) for name in self.of]).amax(dim=0)
        power = torch.where(largest > LARGE, torch.exp2((largest / LARGE).log2().ceil()), 1.0)
        power = torch.where(power.isfinite(), power, 1.0)
        self.of = {name: g / power for name, g in self.of.items()}
        self.scale = self.scale * power

    def _largest(self, name: str) -> Tensor:
        """(N,) float32: no seed of this tap is larger; of a style by Cauchy and Schwarz."""
        kind, _, tap = name.partition(".")
        if kind == "feature":
            low, high = self.saved[f"diff.{tap}"].flatten(1).aminmax(dim=1)
            size = torch.maximum(-low, high).float()
        else:
            pixels, gram = self.saved[f"phi.{tap}"].flatten(1, 2), self.saved[f"gram.{tap}"]
            n, _, c = pixels.shape
            some = max(1, self.plan.transient // (8 * n * c))  # their copies in float32
            norms = [
                torch.linalg.vector_norm(part, dim=2, dtype=torch.float32).amax(dim=1)
                for part in torch.split(pixels, some, dim=1)
            ]
            size = torch.stack(norms).amax(dim=0) * torch.linalg.vector_norm(gram, dim=1).amax(1)
        factor = self.of[name]
        return size * (factor.abs() if isinstance(factor, Tensor) else abs(factor))

    def at(self, tap: str, images: slice, dy: Tensor | None, rows: slice = slice(None)) -> Tensor:
        """Rows of ``dE_b``, eq. (2) and Gram's, added to `dy`, which may be written to, in the
        compute dtype. Without `dy` it may be what was saved: nobody writes to it."""
        factor = self.of.get(f"feature.{tap}")
        if isinstance(factor, float) and f"style.{tap}" not in self.of:
            diff = self.saved[f"diff.{tap}"][images, rows]
            if dy is None:
                return diff if factor == 1.0 else diff * factor
            if factor == 1.0 or not self.plan.on_cpu:  # which rounds alpha to their dtype
                return dy.add_(diff, alpha=factor)
        total = None if dy is None else dy.float()
        for kind in ("feature", "style"):
            factor = self.of.get(f"{kind}.{tap}")
            if factor is None:
                continue
            if isinstance(factor, Tensor):
                factor = factor[images].float().view(-1, 1, 1, 1)
            seed = self._unscaled(kind, tap, images, rows) * factor
            total = seed if total is None else total + seed
        assert total is not None
        return total.to(self.plan.dtype)

    def _unscaled(self, kind: str, tap: str, images: slice, rows: slice) -> Tensor:
        if kind == "feature":
            return self.saved[f"diff.{tap}"][images, rows].float()
        phi = self.saved[f"phi.{tap}"][images, rows].float()
        return (phi.flatten(1, 2) @ self.saved[f"gram.{tap}"][images]).view_as(phi)
