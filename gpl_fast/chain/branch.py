"""Which branch the walk carries beside the difference."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gpl_fast import reference
from gpl_fast.plan import Spec

# Pixels of an image that are looked at: rows, columns.
GRID = (16, 64)
# |δ|² / |y|² up to which prediction and target count as near.
NEAR = 1 / 32


def carry_target(
    spec: Spec, x: Tensor, target: Mapping[str, Tensor], images: slice, dtype: torch.dtype
) -> Tensor:
    """(n,) bool: True = the walk carries (y, δ), False = (y', δ), with δ = y' − y.

    Both say the same but for rounding, which is relative to what is carried: winners and signs of
    the prediction are surest where it is carried itself. But where it is near a target that is
    constant in regions, the target's ties decide what δ becomes in a pool, and rounding y' would
    break them (docs/numerics.md). That is looked for on a grid of each
    image; float32 has bits enough for either.

    Args:
        x: (N, C, H, W) prediction.
        target: as `Forward`.
        images: of `x`.
    """
    x = x[images]
    n, c, h, w = x.shape
    if dtype == torch.float32 or x.numel() == 0:
        return torch.zeros(n, dtype=torch.bool, device=x.device)
    rows, columns = (
        torch.arange(0, size, -(-size // most), device=x.device)
        for size, most in zip((h, w), GRID, strict=True)
    )

    def grid(name: str, right: int = 0) -> Tensor | None:
        t = target.get(name)
        if t is None:
            return None
        # Nearest pixels of a dense target of another size.
        i = ((rows + 0.5) * (t.shape[-2] / h)).long()
        j = ((columns + 0.5) * (t.shape[-1] / w)).long() + right
        return t[images][..., i.unsqueeze(1), j.clamp(max=t.shape[-1] - 1)]

    valid, labels, values = grid("valid"), grid("labels"), grid("topk_values")
    y_pred = reference.prediction_map(
        x[..., rows.unsqueeze(1), columns].float(), spec.activation, spec.temperature, valid
    )
    if labels is not None:
        classes = torch.arange(c, device=x.device).view(1, -1, 1, 1)
        y = (labels.unsqueeze(1) == classes).to(y_pred.dtype)
    elif values is not None:
        indices, rest = grid("topk_indices"), grid("topk_rest")
        assert indices is not None
        known = (indices >= 0) & (indices < c)
        indices = indices.clamp(0, c - 1)
        y = torch.zeros_like(y_pred).scatter_add_(1, indices, values * known)
        if rest is not None:
            listed = torch.zeros_like(y).scatter_add_(1, indices, known.to(y.dtype))
            y = torch.where(listed > 0, y, rest.unsqueeze(1))
    else:
        dense = grid("dense")
        assert dense is not None
        # A target that alone is taken as it is has no temperature.
        as_it_is = spec.target_activation == "none" != spec.activation
        temperature = 1.0 if as_it_is else spec.temperature
        y = reference.activate(dense.float(), spec.target_activation, temperature)
    y = reference.zero_invalid(y, valid)
    difference, size = ((t.square().sum(dim=(1, 2, 3))) for t in (y_pred - y, y))
    equal = torch.ones_like(rows.unsqueeze(1) * columns, dtype=torch.bool).expand(n, -1, -1)
    for name in ("labels", "topk_values", "topk_indices", "dense"):
        here, beside = grid(name), grid(name, right=1)
        if here is not None and beside is not None:
            same = here == beside
            equal = equal & (same if name == "labels" else same.all(dim=1))
    constant = equal.float().mean(dim=(1, 2)) > 0.5
    return constant & (difference < NEAR * size)
