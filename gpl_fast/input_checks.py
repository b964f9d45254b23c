"""What the checks of arguments share: kinds of tensors and numbers, words for what was got."""

from __future__ import annotations

import math
import operator
from typing import SupportsFloat, SupportsIndex

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_integer(t: Tensor) -> bool:
    """Whether `t` holds integers: bool is none."""
    return not t.is_floating_point() and not t.is_complex() and t.dtype != torch.bool


def describe(x: object) -> str:
    """Dtype and shape of a tensor, the type of anything else: what an error says was got."""
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def as_float(what: str, x: SupportsFloat, expected: str = "a number") -> float:
    """`x` as a float: Python's, numpy's and 0-dim tensors' numbers; not bool, not text.

    Raises:
        ValueError: anything else, or not finite.
    """
    try:
        if isinstance(x, bool | str | bytes):
            raise TypeError
        number = float(x)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{what}: got {x!r}, expected {expected}") from None
    if not math.isfinite(number):
        raise ValueError(f"{what}: got {x!r}, expected {expected}")
    return number


def as_int(what: str, x: SupportsIndex, expected: str = "an integer") -> int:
    """`x` as an int: Python's, numpy's and 0-dim tensors' integers; not bool, not 2.0.

    Raises:
        ValueError: anything else.
    """
    kind = getattr(x, "dtype", None)
    if not isinstance(x, bool) and kind is not torch.bool and str(kind) != "bool":
        try:
            return operator.index(x)
        except (TypeError, ValueError, RuntimeError):
            pass
    raise ValueError(f"{what}: got {x!r}, expected {expected}")
