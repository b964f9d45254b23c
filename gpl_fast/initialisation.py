"""Random weights of the frozen network: the paper's Section 3.2 and what it compares with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Init = str | tuple[str, float]


def draw_weight(shape: Sequence[int], init: Init, generator: torch.Generator) -> Tensor:
    """A ``(C_out, C_in, K, K)`` float32 weight, drawn in float64 and cast.

    float32 draws differ between CPU generations (vectorised and plain code round differently).
    ``"he"``: N(0, 2 / fan_in), the paper's Section 3.2.

    Raises:
        ValueError: `init` is unknown or its number is not positive and finite.
    """
    fan_in, fan_out = math.prod(shape[1:]), shape[0] * math.prod(shape[2:])
    named = isinstance(init, str)
    try:
        kind, number = (init, 1.0) if isinstance(init, str) else (init[0], float(init[1]))
    except (TypeError, ValueError, IndexError):
        kind, number = "malformed", 1.0
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"init: got {init!r}, expected a positive number, as in ('normal', 0.01)")
    if kind == "uniform" and not named:
        draw = torch.rand(*shape, generator=generator, dtype=torch.float64)
        return ((2 * draw - 1) * number).float()
    if kind == "he" and named:
        std = math.sqrt(2 / fan_in)
    elif kind == "xavier_normal" and named:
        std = math.sqrt(2 / (fan_in + fan_out))
    elif kind == "normal" and not named:
        std = number
    else:
        raise ValueError(
            f"init: got {init!r}, expected 'he', 'xavier_normal', ('normal', std) or ('uniform', a)"
        )
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).float()


def own_generator(seed: int) -> torch.Generator:
    try:
        return torch.Generator().manual_seed(seed)
    except (TypeError, RuntimeError, ValueError):
        raise ValueError(f"seed: got {seed!r}, expected a 64-bit integer") from None
