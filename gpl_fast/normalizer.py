"""What a segmentation's two sums are divided by where the caller says so: counts of a whole batch
that goes through in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from gpl_fast.input_checks import Number, as_weight
from gpl_fast.targets import values

Count = Number | Tensor
NormalizerLike = Count | Sequence[Count | None]


class Normalizer(NamedTuple):
    """Each a float or a 0-dim tensor of any device."""

    pixels: float | Tensor
    images: float | Tensor | None


def as_normalizer(given: NormalizerLike, reduction: str) -> Normalizer:
    """A number of pixels, or of pixels and images: two of them, the second of which may be None, or
    a tensor or an array (2,).

    Raises:
        TypeError, ValueError: anything else, of a tensor on CUDA negative numbers and NaN only with
            ``GPL_FAST_CHECK=1``; a `reduction` that divides by counts of its own.
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
        counts: Sequence[Any] = (given,) if given.dim() == 0 else (given[0], given[1])
    elif type(given) not in (float, int) and getattr(given, "ndim", False):  # an array's numbers
        counts = cast(Any, given).tolist()
    else:
        counts = given if isinstance(given, Sequence) else (given,)
    if len(counts) == 2 and counts[1] is None:
        counts = counts[:1]
    if isinstance(given, str) or not 1 <= len(counts) <= 2:
        raise ValueError(f"normalizer: got {given!r}, expected {expected}")
    pixels, *images = map(_as_count, counts)
    return Normalizer(pixels, images[0] if images else None)


def _as_count(count: Count) -> float | Tensor:
    if not isinstance(count, Tensor):
        return as_weight("normalizer", count)
    if count.dim() or count.is_complex() or count.dtype == torch.bool:
        raise ValueError(
            f"normalizer: got {count.dtype} {tuple(count.shape)}, expected a 0-dim tensor that "
            "holds a number; use .sum()"
        )
    count = count.detach()
    seen: Tensor = torch.ops.gpl_fast.check_count(count)
    return count + seen if torch.compiler.is_compiling() else count


def _look(count: Tensor) -> Tensor:
    if values.may_look(count):
        as_weight("normalizer", count.item())
    return _fake(count)


def _fake(count: Tensor) -> Tensor:
    return count.new_zeros((), dtype=torch.float32)


values.define("check_count(Tensor count) -> Tensor", _look, _fake)


def divided(total: Tensor, count: float | Tensor) -> Tensor:
    """`total` / `count`, and 0 where nothing was counted."""
    if not isinstance(count, Tensor):
        return total / count if count else total * 0
    # Towards a device no copy waits; from one, the number has to be there.
    count = count.to(total.device, total.dtype, non_blocking=total.device.type != "cpu")
    nothing = count == 0
    return (total / count.masked_fill(nothing, 1)).masked_fill(nothing, 0)
