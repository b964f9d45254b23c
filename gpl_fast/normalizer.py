"""What a segmentation's two sums are divided by where the caller says so: counts of a whole batch
that goes through in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, SupportsFloat

from torch import Tensor

from gpl_fast.input_checks import as_weight

Count = SupportsFloat | Tensor
NormalizerLike = Count | Sequence[Count]


class Normalizer(NamedTuple):
    """Each a float or a 0-dim tensor of any device, which is not looked at."""

    pixels: float | Tensor
    images: float | Tensor | None


def as_normalizer(given: NormalizerLike, reduction: str) -> Normalizer:
    """A number of pixels, or of pixels and images: two of them, or a tensor (2,).

    Raises:
        TypeError, ValueError: anything else; a `reduction` that divides by counts of its own.
    """
    if reduction != "mean":
        raise ValueError(
            f"normalizer: got one with reduction={reduction!r}, expected reduction='mean', whose "
            "divisors it gives; divide what 'sum' or 'none' returns yourself"
        )
    expected = "a number of pixels or (pixels, images), each a number >= 0 or a 0-dim tensor"
    if isinstance(given, Tensor):
        if tuple(given.shape) not in ((), (2,)):
            raise ValueError(f"normalizer: got shape {tuple(given.shape)}, expected {expected}")
        counts: Sequence[Count] = (given,) if given.dim() == 0 else (given[0], given[1])
    else:
        counts = given if isinstance(given, Sequence) else (given,)
    if isinstance(given, str) or not 1 <= len(counts) <= 2:
        raise ValueError(f"normalizer: got {given!r}, expected {expected}")
    pixels, *images = map(_as_count, counts)
    return Normalizer(pixels, images[0] if images else None)


def _as_count(count: Count) -> float | Tensor:
    if not isinstance(count, Tensor):
        return as_weight("normalizer", count)
    if count.dim() or count.is_complex():
        raise ValueError(
            f"normalizer: got {count.dtype} {tuple(count.shape)}, expected a 0-dim tensor that "
            "holds a number; use .sum()"
        )
    return count.detach()


def divided(total: Tensor, count: float | Tensor) -> Tensor:
    """`total` / `count`, and 0 where nothing was counted."""
    if not isinstance(count, Tensor):
        return total / count if count else total * 0
    # Towards a device no copy waits; from one, the number has to be there.
    count = count.to(total.device, total.dtype, non_blocking=total.device.type != "cpu")
    nothing = count == 0
    return (total / count.masked_fill(nothing, 1)).masked_fill(nothing, 0)
