"""Shapes of a call's maps and of what its forward saves, of numbers or of symbols."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpl_fast.fast.call import Call
from gpl_fast.fast.policy import How, Policy
from gpl_fast.net.steps import Step

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Size:
    """Grids of one step: of its input, its convolution's output, and what it puts out."""

    h: int
    w: int
    conv_h: int
    conv_w: int
    out_h: int
    out_w: int


@functools.lru_cache(maxsize=256)
def steps_of(call: Call) -> tuple[Step, ...]:
    """The network's steps up to the last tap."""
    taps = set(call.taps)
    steps = call.chain.steps
    last = max(i for i, s in enumerate(steps) if {s.conv, s.relu, s.pool} & taps)
    end = steps[last]
    if end.pool not in taps:
        end = replace(end, pool="", pool_kind="")
        if end.relu not in taps:
            end = replace(end, relu="")
    return (*steps[:last], end)


class Geometry:
    """A call at a prediction's N, H, W, which may be symbols: shapes of maps and saved tensors."""

    def __init__(self, call: Call, n: int, h: int, w: int) -> None:
        self.call, self.n, self.h, self.w = call, n, h, w
        self.dtype = call.dtype
        self.steps = steps_of(call)
        self.sizes = self._grid_sizes()

    def _grid_sizes(self) -> tuple[Size, ...]:
        sizes, h, w = [], self.h, self.w
        for step in self.steps:
            conv_h, conv_w = (h, w) if step.stride == 1 else ((h + 1) // 2, (w + 1) // 2)
            out_h, out_w = (conv_h // 2, conv_w // 2) if step.pool else (conv_h, conv_w)
            sizes.append(Size(h, w, conv_h, conv_w, out_h, out_w))
            h, w = out_h, out_w
        return tuple(sizes)

    def tap_shape(self, tap: str) -> tuple[int, int, int, int]:
        """(N, H_b, W_b, C_b) of a tapped layer."""
        for step, size in zip(self.steps, self.sizes, strict=True):
            if tap in (step.conv, step.relu):
                return self.n, size.conv_h, size.conv_w, step.out_channels
            if tap == step.pool:
                return self.n, size.out_h, size.out_w, step.out_channels
        raise KeyError(tap)

    def values_shape(self) -> tuple[int, int]:
        """Of what the forward gives: four terms by image, or `Call.spatial`, all taps' maps."""
        if not self.call.spatial:
            return 4, self.n
        areas = (h * w for _, h, w, _ in map(self.tap_shape, self.call.taps))
        return self.n, sum(areas)

    def by_tap(self, maps: Tensor) -> dict[str, Tensor]:
        """Views (N, H_b, W_b) of `values_shape`'s maps, or of their gradient."""
        shapes = [self.tap_shape(tap)[1:3] for tap in self.call.taps]
        parts = torch.split(maps, [h * w for h, w in shapes], dim=1)
        views = (
            part.view(part.shape[0], *shape) for part, shape in zip(parts, shapes, strict=True)
        )
        return dict(zip(self.call.taps, views, strict=True))

    def needs_mask(self, step: Step) -> bool:
        """Whether the ReLU's full-resolution sign is needed: 1 bit an element."""
        return bool(step.relu) and (step.pool_kind != "max" or step.relu in self.call.taps)

    def saved(self) -> Shapes:
        """Name -> shape and dtype of what the forward leaves for the backward, in order.

        The contract of docs/math.md, section 4: `lse`, a code for each pool, a mask for each ReLU
        whose full-resolution output is used, `diff` for each tap, the seed of eq. (2), and for
        style taps the prediction's features and ``G' - G``, or its sign.
        """
        call, n, u8 = self.call, self.n, torch.uint8
        out: Shapes = {}
        if call.encode:  # no backward: the features themselves
            return {f"diff.{tap}": (self.tap_shape(tap), self.dtype) for tap in call.taps}
        if call.activation == "softmax":
            out["lse"] = ((n, self.h, self.w), torch.float32)
        if call.own_ce_lse:
            out["ce_lse"] = ((n, self.h, self.w), torch.float32)
        for step, size in zip(self.steps, self.sizes, strict=True):
            c = step.out_channels
            if step.pool_kind == "max":
                out[f"code.{step.pool}"] = ((n, size.out_h, size.out_w, -(-c // 2)), u8)
            if self.needs_mask(step):
                out[f"mask.{step.relu}"] = ((n, size.conv_h, size.conv_w, -(-c // 8)), u8)
        for tap, _ in call.features:
            # A seed of normalised features grows as one over their norm.
            wide = tap in call.normalized and self.dtype == torch.float16
            out[f"diff.{tap}"] = (self.tap_shape(tap), torch.float32 if wide else self.dtype)
        for tap, _ in call.styles:
            shape = self.tap_shape(tap)
            out[f"phi.{tap}"] = (shape, self.dtype)
            out[f"gram.{tap}"] = ((n, shape[3], shape[3]), torch.float32)
        return out


class Segments(Geometry):
    """Of numbers, cut into segments; `Plan` fills in who computes, and with how much memory.

    Attributes:
        segments: ranges of steps.
        halos: rows that each segment's strips need beyond their own on each side.
        last: the steps that end segments; ends: the layers that these put out.
        coefficients: ``w_b / (C_b H_b W_b)`` of each feature tap, twice that of each style tap, of
            absolute values over C_b².
    """

    policy: Policy
    how: tuple[How, ...]
    budget: int

    def __init__(self, call: Call, n: int, h: int, w: int) -> None:
        super().__init__(call, n, h, w)
        self.segments = self._segments()
        self.halos = tuple(self._halo(segment) for segment in self.segments)
        self.last = frozenset(segment[-1] for segment in self.segments)
        self.ends = tuple(_output(self.steps[segment[-1]]) for segment in self.segments)
        self.coefficients = self._coefficients()

    def _segments(self) -> tuple[range, ...]:
        ends = [
            i + 1
            for i, step in enumerate(self.steps)
            if step.pool or step.stride == 2 or i + 1 == len(self.steps)
            or self.steps[i + 1].stride == 2
        ]  # fmt: skip
        return tuple(range(a, b) for a, b in zip([0, *ends], ends, strict=False))

    def _halo(self, segment: range) -> int:
        return sum(self.steps[i].kernel_size // 2 for i in segment)

    def _coefficients(self) -> dict[str, float]:
        out = {}
        for prefix, weights, factor in (
            ("feature", self.call.features, 1.0),
            ("style", self.call.styles, 2.0),
        ):
            for tap, weight in weights:
                _, h, w, c = self.tap_shape(tap)
                mean = c**2 if prefix == "style" and self.call.distance.criterion == "l1" else 1
                out[f"{prefix}.{tap}"] = factor * weight / (c * h * w) / mean
        return out


def _output(step: Step) -> str:
    """The layer whose output is the step's."""
    return step.pool or step.relu or step.conv
