"""Shapes of the rows of a segment that go through together."""

from __future__ import annotations

from gpl_fast.fast.geometry import Segments
from gpl_fast.net.weights import padded_channels

Shape = tuple[int, ...]


class Strip:
    """Shapes of a strip of segment i: of ``rows[i]`` rows, of ``images[i]`` images."""

    def __init__(self, plan: Segments, i: int, images: Shape, rows: Shape) -> None:
        self.plan, self.i, self.n, self.rows = plan, i, images[i], rows[i]
        self.n_out = images[min(i + 1, len(images) - 1)]  # what it puts out is whole for the next
        self.segment = plan.segments[i]
        self.first, self.last = plan.sizes[self.segment[0]], plan.sizes[self.segment[-1]]
        self.in_strips = self.rows < self.first.h
        self.halo = plan.halos[i] if self.in_strips else 0
        following = plan.segments[i + 1] if i + 1 < len(plan.segments) else None
        self.pad = 0
        if following and rows[i + 1] < plan.sizes[following[0]].h:
            self.pad = plan.halos[i + 1]
        self.ends = following is None

    def level_in(self, pad: int) -> Shape:
        """(n, h, w, C) of the segment's input, with `pad` rows above and below."""
        c = channels_in(self.plan, self.segment[0])
        return self.n, self.first.h + 2 * pad, self.first.w, c

    def level_out(self, pad: int) -> Shape:
        """The same of its output."""
        c = self.plan.steps[self.segment[-1]].out_channels
        return self.n_out, self.last.out_h + 2 * pad, self.last.out_w, c

    def conv_rows(self, j: int) -> tuple[int, int]:
        """Rows of step j's input and of its convolution: a strip loses its halo on the way."""
        if not self.in_strips:
            return self.plan.sizes[j].h, self.plan.sizes[j].conv_h
        before = sum(self.plan.steps[k].kernel_size // 2 for k in self.segment if k < j)
        rows = self.rows + 2 * (self.halo - before)
        return rows, rows - 2 * (self.plan.steps[j].kernel_size // 2)


def channels_in(plan: Segments, j: int) -> int:
    """Channels of step j's input as it lies in memory."""
    c = plan.steps[j].in_channels
    return padded_channels(c) if j == 0 and not plan.call.front else c
