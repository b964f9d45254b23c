"""Who decides, told by a test: policies that are derived from the one in force."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import pytest
import torch

from gpl_fast.fast import chunks, policy
from gpl_fast.fast.call import Call
from gpl_fast.fast.geometry import Segments
from gpl_fast.fast.policy import MIB, Policy
from gpl_fast.net.steps import Step
from gpl_fast.tiles import Tile

# How the CPU's convolutions are computed: "own", in the maps' dtype, as where a CPU multiplies its
# matrices; "mixed", bfloat16 so on small maps and by Winograd's algorithm on larger ones;
# "float32", by Winograd's algorithm where it pays; "winograd", wherever it can be.
ARITHMETIC = ("own", "mixed", "float32", "winograd")
HALVES: tuple[Literal["forward", "backward"], ...] = ("forward", "backward")
STRIPS = 1 / MIB  # megabytes of a strip: as low as `strip_rows` allows


def told_chunks(
    monkeypatch: pytest.MonkeyPatch, images: tuple[int, ...], rows: int | None = None
) -> None:
    """In every plan from here on: chunks of so many images of each segment, from the first on, and
    of the last of them in all others; strips of `rows` in the first segment alone."""

    def told(plan: Segments) -> tuple[tuple[int, ...], tuple[int, ...]]:
        first, *others = (plan.sizes[segment[0]].h for segment in plan.segments)
        many = (images + images[-1:] * len(others))[: len(others) + 1]
        if rows is None or rows >= first or plan.steps[0].stride == 2:
            return many, (first, *others)
        return (1, *many[1:]), (rows, *others)

    monkeypatch.setattr(chunks, "chunks", told)


@dataclass(frozen=True)
class Told(Policy):
    """A policy whose words go before what follows from a machine.

    Attributes:
        convolutions: one of `ARITHMETIC`, whatever CPU this is.
        kernels: whether `conv_block_bwd` makes every data gradient that it can.
        tiles: of `conv_block_fwd`, by a layer's input and output channels.
    """

    convolutions: str | None = None
    kernels: bool | None = None
    tiles: Callable[[int, int], Tile] | None = None

    def arithmetic(self, dtype: torch.dtype) -> str:
        if self.convolutions is None or not self.on_cpu:
            return super().arithmetic(dtype)
        if self.convolutions == "own" or (self.convolutions, dtype) == ("mixed", torch.bfloat16):
            return self.convolutions
        return "float32"

    def by_kernel(self, call: Call, i: int, step: Step) -> bool:
        return super().by_kernel(call, i, step) if self.kernels is None else self.kernels

    def tile(self, call: Call, i: int, step: Step, c_in: int) -> Tile:
        if self.tiles is None:
            return super().tile(call, i, step, c_in)
        return self.tiles(c_in, step.out_channels)


def in_force(device: str = "cpu") -> Policy:
    """Who decides on `device` now."""
    return policy.named(policy.current(torch.device(device)))


@contextmanager
def decided(
    *,
    rows: int | None = None,
    arithmetic: str | None = None,
    stages: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Iterator[str]:
    """The policy in force, changed; yields its name. What it has decided is not for later.

    Args:
        rows: of every strip that the network allows; None leaves that to the policy.
        arithmetic: one of `ARITHMETIC`; None as `rows`.
        stages: who has them, by the words that `forward` and `backward` may be.
        changes: fields of `Told`.
    """
    name, now = policy.current(torch.device("cpu")), in_force()
    if rows is not None:
        changes = {"strip_mb": STRIPS, "strip_rows": rows} | changes
    if arithmetic is not None:
        few = {"mixed_tiles": 100, "mixed_channels": 5}
        least = {"winograd_tiles": 1} if arithmetic in ("mixed", "winograd") else {}
        changes = {"convolutions": arithmetic} | few | least | changes
    held = {getattr(now, half): policy.implementation(name, half) for half in HALVES}
    if not isinstance(now, Told):
        now = Told(**{f.name: getattr(now, f.name) for f in fields(Policy)})
    with policy.injected(replace(now, **changes), **{**held, **(stages or {})}) as name:
        yield name
