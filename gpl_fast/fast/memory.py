"""Transient memory: named buffers, whose sum is the bound.

The walks take their memory by these names (`chunk.Chunk.take`); one that asks for more than is
planned fails. The other names stand for what ATen's operators make on the way.
"""

from __future__ import annotations

import math

import torch

from gpl_fast.fast.convolution_memory import transposed_windows, weight_bytes, windows
from gpl_fast.fast.geometry import Segments
from gpl_fast.fast.grid import grid_bytes
from gpl_fast.fast.policy import Way
from gpl_fast.fast.strip import Shape, Strip, channels_in
from gpl_fast.net.weights import padded_channels

# The weights for tiles of 4 x 4 take at most this part of the workspace.
WINOGRAD_SHARE = 8

Images = Shape  # of a chunk of each segment
Rows = Shape  # of a strip of each segment


def bytes_of(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Of a dense tensor."""
    return math.prod(shape) * dtype.itemsize


class Buffers(dict[str, int]):
    """Bytes by name. A name stands for one tensor at a time, the largest of its uses."""

    def need(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self[name] = max(self.get(name, 0), bytes_of(shape, dtype))


def forward(plan: Segments, i: int, images: Images, rows: Rows) -> Buffers:
    """What the forward walk holds in segment i besides what it saves."""
    s, call, dtype, n = Strip(plan, i, images, rows), plan.call, plan.dtype, images[i]
    both = 1 if call.plain else 2
    out = Buffers(weights=_weights(plan, i, backward=False))
    out["levels"] = sum(
        bytes_of((both, *deeper.level_out(deeper.pad)), dtype)
        for deeper in _unfinished(plan, i, images, rows)
    )
    if call.cross_entropy:
        out.need("ce", (plan.n, plan.h, 2), torch.float64)
        # Labels as integers, and pixels that count: made before the operator.
        out.need("checked", (9, n, plan.h, plan.w), torch.uint8)
    if call.binary:
        out.need("checked", (call.chain.in_channels, n, plan.h, plan.w), torch.uint8)
    if call.looked_up and not call.front and plan.policy.weight_dtype(dtype) != torch.float32:
        step = plan.steps[0]
        table = (step.kernel_size**2, call.chain.in_channels, step.out_channels)
        out.need("table", table, torch.float32)
    if i == 0:
        _first_maps(out, s)
    else:
        out.need("level.in", (both, *s.level_in(s.halo)), dtype)
    if not s.ends:
        out.need("level.out", (both, *s.level_out(s.pad)), dtype)
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
            way, taken = how.prediction, (both, n, tall, size.w, channels_in(plan, j))
            out.need(f"z{j % 2}", made, torch.float32 if way.tile else way.dtype)
            if j == s.segment[0] and not way.tile and way.dtype != dtype:
                out.need("wide", taken, torch.float32)
            out.need("windows", windows(plan, j, way, taken, made), way.dtype)
            if step.pool and s.ends:
                out.need("pooled", (2, n, -(-s.rows // 2), size.out_w, step.out_channels), dtype)
        for tap in {step.conv, step.relu, step.pool} & set(call.taps):
            _tapped(out, s, j, tap)
    if s.ends:  # squares of what the terms are made of
        for tap in call.styled:
            out.need("grams", (2, n, *plan.tap_shape(tap)[3:] * 2), torch.float64)
    return out


def _first_maps(out: Buffers, s: Strip) -> None:
    """What the network's input is made of."""
    plan, call, n = s.plan, s.plan.call, s.n
    c, w = call.chain.in_channels, s.first.w
    tall = s.conv_rows(0)[0]
    dense = 2 if call.kind == "dense" and not call.encode else 1
    maps = (dense, n, tall, w, padded_channels(c))
    out.need("maps", maps, plan.dtype)
    if call.looked_up:
        out.need("taken", (n, tall, w), torch.uint8)
    if call.resized:  # two rows of the source at a time, their mean, the weights of valid ones
        out.need("target", (4, n, c, tall, w), torch.float32)
    elif call.encode and call.kind != "dense":
        out.need("target", (n, c + 8, tall, w), torch.float32)
    if call.front:
        inside = plan.steps[0].in_channels
        wide = plan.policy.weight_dtype(plan.dtype)
        out.need("front", (2 * 2, n, tall, w, inside), wide)
        out.need("affine", (2, n, tall, w, inside), torch.float32)
        if wide != plan.dtype:
            out.need("wide", maps, torch.float32)


def _tapped(out: Buffers, s: Strip, j: int, tap: str) -> None:
    """φ', δ and their products, in float32; or φ' less the target's features, or as rounded."""
    plan, call = s.plan, s.plan.call
    step, size = plan.steps[j], plan.sizes[j]
    pooled = tap == step.pool
    rows, width = (size.out_h, size.out_w) if pooled else (size.conv_h, size.conv_w)
    if s.in_strips:
        rows = -(-s.rows // 2) if pooled else s.rows
    maps = (s.n, rows, width, step.out_channels)
    if tap in call.styled:
        out.need("style", (4, *maps), torch.float32)
        out.need("grams", (4, s.n, *maps[3:] * 2), torch.float32)
    unit = tap in call.normalized
    if call.plain and not call.encode and not (unit and plan.dtype == torch.float32):
        out.need("tap", maps, plan.dtype if unit else torch.float32)


def _unfinished(plan: Segments, i: int, images: Images, rows: Rows) -> list[Strip]:
    """Segments behind segment i that wait for more of their input, or whose gradient is needed for
    more of it: what they put out is held."""
    waiting = (j for j in range(i + 1, len(images) - 1) if images[j] < images[j + 1])
    return [Strip(plan, j, images, rows) for j in waiting]


def backward(plan: Segments, i: int, images: Images, rows: Rows) -> Buffers:
    """What the backward walk holds in segment i besides what was saved and the gradient."""
    s, call, dtype, n = Strip(plan, i, images, rows), plan.call, plan.dtype, images[i]
    out = Buffers(weights=_weights(plan, i, backward=True))
    out["levels"] = sum(
        bytes_of(deeper.level_out(0), dtype) for deeper in _unfinished(plan, i, images, rows)
    )
    if call.cross_entropy and not call.binary and i == 0:
        out.need("labels", (n, plan.h, plan.w), torch.int64)
    if call.spatial:  # its gradient over the largest; what fits float16 to it
        count = 7 if dtype == torch.float16 else 1
        out.need("map", (count, *plan.values_shape()), torch.float32)
    out.need("level.out", s.level_out(0), dtype)
    if s.ends and (call.spatial or len(plan.coefficients) > 1):
        _seed(out, "seed", plan, s.level_out(0))
    if i:
        out.need("level.in", s.level_in(0), dtype)
        if plan.ends[i - 1] in call.taps:
            _seed(out, "seed", plan, s.level_in(0))
    elif call.front:
        inside = plan.steps[0].in_channels
        out.need("front", (2, n, s.rows, s.first.w, inside), torch.float32)
        if call.chain.adapter:
            c = padded_channels(call.chain.in_channels)
            out.need("d_front", (3, n, s.rows, s.first.w, c), torch.float32)
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
        dx = (n, dx_rows, size.w, channels_in(plan, j))
        out.need("dz", dz, dtype)
        if j != s.segment[0]:
            out.need(f"dy{j % 2}", dx, dtype)
        elif not how.gradient.tile and s.in_strips:  # and that of the strip before
            out.need("d_maps", (2, *dx), dtype)
        elif i == 0:
            out.need("d_maps", dx, dtype)
        if not how.gradient.tile and how.gradient.dtype != dtype:
            out.need("wide dz", dz, torch.float32)
            out.need("wide dx", dx, torch.float32)
        made = transposed_windows(plan, j, how.gradient, dz, dx)
        out.need("windows", made, how.gradient.dtype)
        if not step.pool and j == s.segment[-1] and s.in_strips:
            out.need("relu", dz, dtype)
        if {step.conv, step.relu} & set(call.taps) - set(plan.ends):
            out.need("tap", (2, *dz), dtype)
            _seed(out, "seed of a tap", plan, dz)
    return out


def _seed(out: Buffers, name: str, plan: Segments, level: Shape) -> None:
    """What is added to a gradient at a tap: in float32 until it is whole, or in place."""
    call = plan.call
    if not (plan.policy.on_cpu or call.styles or call.spatial or plan.dtype == torch.float16):
        return
    count = 2 + (plan.dtype != torch.float32) + 2 * bool(call.styles)
    out.need(name, (count, *level), torch.float32)


def alone(plan: Segments, i: int) -> bool:
    """Whether segment i's gradient is one kernel from end to end."""
    segment = plan.segments[i]
    return len(segment) == 1 and plan.how[segment[0]].block_bwd and not (i == 0 and plan.call.front)


def peak(plan: Segments, images: Images, rows: Rows) -> int:
    """Bytes of a walk: in the segment that needs most, or of a look at one image before."""
    segments = range(len(plan.segments))
    by_aten = plan.call.branches and plan.policy.on_cpu
    look = grid_bytes(plan.call, plan.h, plan.w) if by_aten else 0
    return max(look, *(segment_peak(plan, i, images, rows) for i in segments))


def segment_peak(plan: Segments, i: int, images: Images, rows: Rows) -> int:
    """Bytes of segment i, of the walk that needs more."""
    return max(sum(walk(plan, i, images, rows).values()) for walk in (forward, backward))


def strip_peak(plan: Segments, i: int, rows: Rows) -> int:
    """Bytes of one image's strip alone, without what is of its whole height."""
    whole = ("weights", "table", "ce", "level.in", "level.out", "seed", "labels", "grams", "map")
    one = (1,) * len(plan.segments)

    def of(buffers: Buffers) -> int:
        return sum(size for name, size in buffers.items() if name not in whole)

    return max(of(walk(plan, i, one, rows)) for walk in (forward, backward))


# ------------------------------------------------------------------------------------------ weights


def large_weights_fit(plan: Segments, i: int) -> bool:
    """Whether the weights for step i's tiles of 4 x 4 leave the workspace to the maps."""
    small, large = (Way(tile, torch.float32) for tile in (2, 4))
    weight = max(weight_bytes(plan, i, {small, large}, False), weight_bytes(plan, i, {large}, True))
    return WINOGRAD_SHARE * weight <= plan.budget


def _weights(plan: Segments, i: int, backward: bool) -> int:
    """Of one of segment i's convolutions, one for each way it is computed."""

    def ways(j: int) -> set[Way]:
        how = plan.how[j]
        return {how.gradient} if backward else {how.prediction, how.difference}

    return max(weight_bytes(plan, j, ways(j), backward) for j in plan.segments[i])
