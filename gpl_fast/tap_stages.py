"""The stages at a tap: what the difference of two branches costs, and the gradient that begins
there. Part of `gpl_fast.stages`."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class TapStages(Protocol):
    """What a CPU and Triton offer. Sums are of each image, (N,) float64, in a fixed order.

    A seed is the gradient by the prediction's features up to a factor: weight times d for a square,
    which leaves its 2 to the factor, weight times sign d for |d|.
    """

    def diff_reduce_fwd(
        self,
        delta: Tensor,  # (N, …, C) contiguous
        *,
        criterion: int = 0,  # of `CRITERIA`
        weight: Tensor | None = None,  # (C,) float32, None = 1
        seed: Tensor | None = None,  # as delta, which it may be
    ) -> Tensor:
        """Σ weight δ², or Σ weight |δ|."""

    def unit_diff_fwd(
        self,
        y: Tensor,  # (N, H, W, C): the prediction's
        *,
        target: Tensor,  # (N, H, W, C) of any of the three dtypes
        criterion: int, eps: float,
        eps_inside: bool,  # the norm is sqrt(Σ φ² + eps), else sqrt(Σ φ²) + eps
        weight: Tensor | None = None,  # as above
        seed: Tensor | None = None,  # (N, H, W, C) of any of the three dtypes
        distances: Tensor | None = None,  # (N, H, W) float32
    ) -> Tensor:  # fmt: skip
        """The same of u, the difference of both branches' features over their norms; the seed is
        the gradient by the prediction's features themselves, 0 where their norm is.
        ``distances`` are the sums over the channels of each pixel alone."""
