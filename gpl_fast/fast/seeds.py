"""The gradient that begins at the tapped layers, eq. (2)."""

from __future__ import annotations

import torch
from torch import Tensor

from gpl_fast.fast.plan import Plan

# Where float16's seeds are larger than this, their image's chain is scaled down: the layers below
# have room to grow by as much again.
LARGE = 256.0


class Seeds:
    """``dE_b`` of each tap at unit scale; what it was divided by is applied at the chain's end.

    Args:
        g: the gradients of the forward's terms, (4, N) float32, or of its maps.

    Attributes:
        of: what each tap's is multiplied by: a number, or float32 one for each image, (N,), or for
            each pixel, (N, H_b, W_b).
        scale: (N,) float32, which the logits' gradient is multiplied by.
    """

    of: dict[str, float | Tensor]

    def __init__(self, plan: Plan, saved: dict[str, Tensor], g: Tensor) -> None:
        self.plan, self.saved = plan, saved
        unit, self.of = plan.unit, dict(plan.relative)
        if plan.call.spatial:
            self._of_maps(g)
        elif not plan.call.styles:
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

    def _of_maps(self, g: Tensor) -> None:
        """The gradient of each pixel's distance over the image's largest."""
        maps = self.plan.by_tap(g.float())
        largest = torch.stack([_size(m.flatten(1)) for m in maps.values()]).amax(dim=0)
        over = torch.where(largest == 0, 1, largest).view(-1, 1, 1)
        self.of = {f"feature.{tap}": m / over for tap, m in maps.items()}
        self.scale = self.plan.call.distance.slope * largest

    def _fit_float16(self) -> None:
        """Scale by powers of two what float16 would not hold; nothing else changes a bit."""
        largest = torch.stack([self._largest(name) for name in self.of]).amax(dim=0)
        power = torch.where(largest > LARGE, torch.exp2((largest / LARGE).log2().ceil()), 1.0)
        power = torch.where(power.isfinite(), power, 1.0)
        over = power.view(-1, 1, 1) if self.plan.call.spatial else power
        self.of = {name: g / over for name, g in self.of.items()}
        self.scale = self.scale * power

    def _largest(self, name: str) -> Tensor:
        """(N,) float32: no seed of this tap is larger; of a style by Cauchy and Schwarz."""
        kind, _, tap = name.partition(".")
        if kind == "feature":
            seed = self.saved[f"diff.{tap}"]
            if self.plan.call.spatial:
                return _size((_size(seed) * self.of[name]).flatten(1))
            size = _size(seed.flatten(1))
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
                factor = _of_rows(factor.float(), images, rows)
            seed = self._unscaled(kind, tap, images, rows) * factor
            total = seed if total is None else total + seed
        assert total is not None
        return total.to(self.plan.dtype)

    def _unscaled(self, kind: str, tap: str, images: slice, rows: slice) -> Tensor:
        if kind == "feature":
            return self.saved[f"diff.{tap}"][images, rows].float()
        phi = self.saved[f"phi.{tap}"][images, rows].float()
        return (phi.flatten(1, 2) @ self.saved[f"gram.{tap}"][images]).view_as(phi)


def _of_rows(factor: Tensor, images: slice, rows: slice) -> Tensor:
    """One for each image or each pixel, against seeds (n, rows, W, C)."""
    if factor.dim() == 1:
        return factor[images].view(-1, 1, 1, 1)
    return factor[images, rows].unsqueeze(-1)


def _size(t: Tensor) -> Tensor:
    """The largest absolute value over the last dimension, float32."""
    low, high = t.aminmax(dim=-1)
    return torch.maximum(-low, high).float()
