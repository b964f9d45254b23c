"""Random weights of the frozen network: the paper's Section 3.2 and what it compares with."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gpl_fast.input_checks import Integer, as_float, as_int
from gpl_fast.real_tensors import real_tensors

Init = str | tuple[str, float]

NAMED = ("he", "xavier_normal")
WITH_NUMBER = ("normal", "uniform")
# Beyond these float32 weights would be 0 or infinite.
SMALLEST, LARGEST = 1e-30, 1e30


def check_init(init: Init | Sequence[str | float]) -> Init:
    """`init` as `draw_weight` takes it: ``["normal", 0.01]`` becomes a tuple.

    Raises:
        ValueError: unknown, or its number is not positive, not finite, or out of float32's range.
    """
    if isinstance(init, str) and init in NAMED:
        return str(init)
    if isinstance(init, list | tuple) and len(init) == 2 and init[0] in WITH_NUMBER:
        with contextlib.suppress(ValueError):
            number = as_float("init", init[1])
            if SMALLEST <= number <= LARGEST:
                return str(init[0]), number
    raise ValueError(
        f"init: got {init!r}, expected 'he', 'xavier_normal', ('normal', std) or ('uniform', a), "
        f"the number positive, in [{SMALLEST:g}, {LARGEST:g}]"
    )


@real_tensors()
def draw_weight(shape: Sequence[int], init: Init, generator: torch.Generator) -> Tensor:
    """A ``(C_out, C_in, K, K)`` float32 weight on the CPU, drawn in float64 and cast.

    float32 draws differ between CPU generations (vectorised and plain code round differently).

    - ``"he"``: N(0, 2 / fan_in), the paper's Section 3.2. There 2 / fan_in is the *variance*.
    - ``"xavier_normal"``: variance 2 / (fan_in + fan_out).
    - ``("normal", std)``: N(0, std²). The number is the *standard deviation*: "he" on a layer is
      ``("normal", sqrt(2 / fan_in))``.
    - ``("uniform", a)``: U[-a, a].

    Raises:
        ValueError: as `check_init`.
    """
    init = check_init(init)
    fan_in, fan_out = math.prod(shape[1:]), shape[0] * math.prod(shape[2:])
    kind, number = (init, 1.0) if isinstance(init, str) else init
    device = torch.device("cpu")  # whatever the default one is
    if kind == "uniform":
        draw = torch.rand(*shape, generator=generator, dtype=torch.float64, device=device)
        return ((2 * draw - 1) * number).float()
    std = {
        "he": math.sqrt(2 / fan_in),
        "xavier_normal": math.sqrt(2 / (fan_in + fan_out)),
        "normal": number,
    }[kind]
    draw = torch.randn(*shape, generator=generator, dtype=torch.float64, device=device)
    return (draw * std).float()


def own_generator(seed: Integer) -> torch.Generator:
    """A CPU generator of its own.

    Raises:
        ValueError: `seed` is not a 64-bit integer.
    """
    number = as_int("seed", seed, "a 64-bit integer")
    try:
        return torch.Generator(device="cpu").manual_seed(number)
    except (RuntimeError, ValueError, OverflowError):
        raise ValueError(f"seed: got {seed!r}, expected a 64-bit integer") from None
