"""Transient memory: named buffers, whose sum is the bound.

The walks take their memory by these names (`chunk.Chunk.take`); one that asks for more than is
planned fails.
"""

from __future__ import annotations

import math

import torch

from gpl_fast.fast.geometry import Segments
from gpl_fast.fast.policy import Way
from gpl_fast.net.weights import padded_channels

# The weights for tiles of 4 x 4 take at most this part of the workspace.
WINOGRAD_SHARE = 8

Rows = tuple[int, ...]


def bytes_of(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Of a dense tensor."""
    return math.prod(shape) * dtype.itemsize


class Buffers(dict[str, int]):
    """Bytes by name. A name stands for one tensor at a time, the largest of its uses."""

    def need(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self[name] = max(self.get(name, 0), bytes_of(shape, dtype))


class Strip:
    """Shapes of a strip of segment i: of ``rows[i]`` rows, of `images` images."""

    def __init__(self, plan: Segments, i: int, images: int, rows: Rows) -> None:
        self.plan, self.i, self.n, self.rows = plan, i, images, rows[i]
        self.segment = plan.segments[i]
        self.first, self.last = plan.sizes[self.segment[0]], plan.sizes[self.segment[-1]]
        self.in_strips = self.rows < self.first.h
        self.halo = plan.halos[i] if self.in_strips else 0
        following = plan.segments[i + 1] if i + 1 < len(plan.segments) else None
        self.pad = 0
        if following and rows[i + 1] < plan.sizes[following[0]].h:
            self.pad = plan.halos[i + 1]
        self.ends = following is None

    def conv_rows(self, j: int) -> tuple[int, int]:
        """Rows of step j's input and of its convolution: a strip loses its halo on the way."""
        if not self.in_strips:
            return self.plan.sizes[j].h, self.plan.sizes[j].conv_h
        before = sum(self.plan.steps[k].kernel_size // 2 for k in self.segment if k < j)
        rows = self.rows + 2 * (self.halo - before)
        return rows, rows - 2 * (self.plan.steps[j].kernel_size // 2)


def forward(plan: Segments, i: int, images: int, rows: Rows) -> Buffers:
    """What the forward walk holds in segment i besides what it saves."""
    s, call, dtype, n = Strip(plan, i, images, rows), plan.call, plan.dtype, images
    both = 1 if call.plain else 2
    out = Buffers(weights=_weights(plan, i, backward=False))
    if i == 0:
        _first_maps(out, s)
    else:
        c_in = plan.steps[s.segment[0]].in_channels
        out.need("level.in", (both, n, s.first.h + 2 * s.halo, s.first.w, c_in), dtype)
    c_out = plan.steps[s.segment[-1]].out_channels
    if not s.ends:
        out.need("level.out", (both, n, s.last.out_h + 2 * s.pad, s.last.out_w, c_out), dtype)
    for j in s.segment:
        step, size, how = plan.steps[j], plan.sizes[j], plan.how[j]
        tall, conv = s.conv_rows(j)
        made = (both, n, conv, size.conv_w, step.out_channels)
        if how.block:
            if step.pool:
                made = (both, n, -(-conv // 2), size.out_w, step.out_channels)
            if j != s.segment[-1] or s.ends:
                out.need(f"z{j % 2}", made, dtype)
        else:
            wide = torch.float32 if how.prediction.tile else how.prediction.dtype
            out.need(f"z{j % 2}", made, wide)
            if not how.prediction.tile and how.prediction.dtype != dtype:  # a copy for ATen
                out.need("wide", (both, n, tall, size.w, _padded_in(plan, j)), torch.float32)
            if step.pool and s.ends:
                pooled = (2, n, -(-s.rows // 2), size.out_w, step.out_channels)
                out.need("pooled", pooled, dtype)
        for tap in {step.conv, step.relu, step.pool} & call.styled:
            _style(out, s, j, tap)
    return out


def _first_maps(out: Buffers, s: Strip) -> None:
    """What the network's input is made of."""
    plan, call, n = s.plan, s.plan.call, s.n
    c, w = call.chain.in_channels, s.first.w
    tall = s.rows + 2 * s.halo if s.in_strips else s.first.h
    dense = 2 if call.kind == "dense" and not call.encode else 1
    out.need("maps", (dense, n, tall, w, padded_channels(c)), plan.dtype)
    if call.looked_up:
        out.need("taken", (n, tall, w), torch.uint8)
    if call.resized:  # two rows of the source at a time, their mean, the weights of valid ones
        out.need("target", (4, n, c, tall, w), torch.float32)
    elif call.encode and call.kind != "dense":
        out.need("target", (2, n, c, tall, w), torch.float32)
    if call.front:
        inside = plan.steps[0].in_channels
        wide = torch.float32 if plan.how[0].prediction.dtype == torch.float32 else plan.dtype
        out.need("front", (2 * 2, n, tall, w, inside), wide)
        out.need("affine", (2, n, tall, w, inside), torch.float32)
        if wide != plan.dtype:
            out.need("wide", (2, n, tall, w, padded_channels(c)), torch.float32)


def _style(out: Buffers, s: Strip, j: int, tap: str) -> None:
    """φ', δ and their products, in float32."""
    step, size = s.plan.steps[j], s.plan.sizes[j]
    pooled = tap == step.pool
    rows = -(-s.rows // 2) if pooled else s.rows
    width = size.out_w if pooled else size.conv_w
    if not s.in_strips:
        rows = size.out_h if pooled else size.conv_h
    out.need("style", (4, s.n, rows, width, step.out_channels), torch.float32)


def backward(plan: Segments, i: int, images: int, rows: Rows) -> Buffers:
    """What the backward walk holds in segment i besides what was saved and the gradient."""
    s, call, dtype, n = Strip(plan, i, images, rows), plan.call, plan.dtype, images
    out = Buffers(weights=_weights(plan, i, backward=True))
    level = (n, s.last.out_h, s.last.out_w, plan.steps[s.segment[-1]].out_channels)
    out.need("level.out", level, dtype)
    if plan.ends[i] in call.taps and not (s.ends and len(plan.coefficients) == 1):
        out.need("seed", (2, *level), torch.float32)
    c_in = _padded_in(plan, s.segment[0])
    if i:
        out.need("level.in", (n, s.first.h, s.first.w, c_in), dtype)
    else:
        if call.cross_entropy:
            out.need("labels", (n, s.first.h, s.first.w), torch.int64)
        if call.front:
            inside = plan.steps[0].in_channels
            out.need("front", (2, n, s.rows, s.first.w, inside), torch.float32)
            c = padded_channels(call.chain.in_channels)
            out.need("d_front", (2, n, s.rows, s.first.w, c), torch.float32)
    if alone(plan, i):  # nothing is made between the two gradients
        return out
    for j in s.segment:
        step, size, how = plan.steps[j], plan.sizes[j], plan.how[j]
        dx_rows, dz_rows = s.conv_rows(j)
        # The way back is the way there mirrored: the last step's dz has the whole halo.
        if s.in_strips:
            after = sum(plan.steps[k].kernel_size // 2 for k in s.segment if k > j)
            dz_rows = s.rows + 2 * (s.halo - after)
            dx_rows = dz_rows - 2 * (step.kernel_size // 2)
        dz = (n, dz_rows, size.conv_w, step.out_channels)
        dx = (n, dx_rows, size.w, _padded_in(plan, j))
        out.need("dz", dz, dtype)
        if j != s.segment[0]:
            out.need("dy", dx, dtype)
        elif i == 0 or (s.in_strips and not how.gradient.tile):
            out.need("d_maps", dx, dtype)
        if not how.gradient.tile and how.gradient.dtype != dtype:
            out.need("wide dz", dz, torch.float32)
            out.need("wide dx", dx, torch.float32)
        if not step.pool:
            out.need("relu", dz, dtype)
        if ({step.conv, step.relu} - {plan.ends[i]}) & set(call.taps):
            out.need("tap", (3, *dz), torch.float32)
    return out


def alone(plan: Segments, i: int) -> bool:
    """Whether segment i's gradient is one kernel from end to end."""
    segment = plan.segments[i]
    return len(segment) == 1 and plan.how[segment[0]].block_bwd and not (i == 0 and plan.call.front)


def _padded_in(plan: Segments, j: int) -> int:
    """Channels of step j's input as it lies in memory."""
    c = plan.steps[j].in_channels
    return padded_channels(c) if j == 0 and not plan.call.front else c


def peak(plan: Segments, images: int, rows: Rows) -> int:
    """Bytes of a chunk: of the segment that needs most."""
    return max(segment_peak(plan, i, images, rows) for i in range(len(plan.segments)))


def segment_peak(plan: Segments, i: int, images: int, rows: Rows) -> int:
    """Bytes of segment i, of the walk that needs more."""
    return max(sum(walk(plan, i, images, rows).values()) for walk in (forward, backward))


def strip_peak(plan: Segments, i: int, rows: Rows) -> int:
    """Bytes of one image's strip alone, without what is of its whole height."""
    whole = ("weights", "level.in", "level.out", "seed", "labels")

    def of(buffers: Buffers) -> int:
        return sum(size for name, size in buffers.items() if name not in whole)

    return max(of(walk(plan, i, 1, rows)) for walk in (forward, backward))


# ------------------------------------------------------------------------------------------ weights


def large_weights_fit(plan: Segments, i: int) -> bool:
    """Whether the weights for step i's tiles of 4 x 4 leave the workspace to the maps."""
    small, large = (Way(tile, torch.float32) for tile in (2, 4))
    weight = max(_weight(plan, i, {small, large}, False), _weight(plan, i, {large}, True))
    return WINOGRAD_SHARE * weight <= plan.budget


def _weights(plan: Segments, i: int, backward: bool) -> int:
    """Of one of segment i's convolutions, one for each way it is computed."""

    def ways(j: int) -> set[Way]:
        how = plan.how[j]
        return {how.gradient} if backward else {how.prediction, how.difference}

    return max(_weight(plan, j, ways(j), backward) for j in plan.segments[i])


def _weight(plan: Segments, j: int, ways: set[Way], transposed: bool) -> int:
    k = plan.steps[j].kernel_size
    c_in, c_out = padded_channels(plan.steps[j].in_channels), plan.steps[j].out_channels
    if transposed:
        c_in, c_out = c_out, c_in
    return sum(way.dtype.itemsize * way.weight_elements(k, c_in, c_out) for way in ways)
