"""The forward walk: both branches in the difference form, eq. (6)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gpl_fast.fast import memory, policy
from gpl_fast.fast.branch import carried
from gpl_fast.fast.chunk import Chunk, Maps, Rows
from gpl_fast.fast.logits import LogitsForward
from gpl_fast.fast.look_up import LookUp
from gpl_fast.fast.plan import Plan
from gpl_fast.fast.steps_fwd import StepForward
from gpl_fast.fast.taps import TapsForward
from gpl_fast.stages import TritonStages


class Forward:
    """One call's walk: each segment in chunks of images, these in strips of rows, a strip step by
    step. What a segment puts out is whole before the next one begins.

    Args:
        plan, x, target, packs: as `Chunk`.
        keep: allocate what the backward reads.
        stages: whose stages; None = the policy's.
    """

    def __init__(
        self,
        plan: Plan,
        x: Tensor,
        target: Mapping[str, Tensor],
        packs: Mapping[str, Tensor],
        keep: bool,
        stages: TritonStages | None = None,
    ) -> None:
        self.plan = plan
        saved = {
            name: x.new_empty(shape, dtype=dtype)
            for name, (shape, dtype) in plan.contract.items()
            if keep or name.startswith("gram.")
        }
        self.ce: Tensor | None = None  # (N, H, 2) float64, sums of each row's cross-entropy
        self.terms = x.new_zeros((4, plan.n), dtype=torch.float64)
        stages = stages or policy.implementation(plan.call.policy, "forward")
        self.chunk = Chunk(plan, x, target=target, packs=packs, saved=saved, stages=stages)
        self.maps: Tensor | None = None  # in the terms' place
        if plan.call.spatial:
            self.maps = x.new_empty(plan.values_shape(), dtype=torch.float32)
        self.taps = TapsForward(self.chunk, self.terms, keep, self.maps)
        self.look_up = LookUp(self.chunk)
        self.logits = LogitsForward(self.chunk, self.look_up)
        self.steps = StepForward(self.chunk, self.taps, self.look_up)

    def run(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Terms (4, N) float64 (feature, style, Σ cross-entropy, Σ its weights), or the maps of
        `Plan.values_shape` float32, and `saved`."""
        plan, chunk = self.plan, self.chunk
        if not plan.call.plain:
            by = None if plan.on_cpu else chunk.stages
            chunk.branch = carried(plan.call, chunk.x, chunk.target, plan.transient, by)
        if plan.call.cross_entropy:
            self.ce = chunk.x.new_zeros((plan.n, plan.h, 2), dtype=torch.float64)
        self._level(len(plan.segments) - 1, slice(0, plan.n))
        if self.ce is not None:
            self.terms[2:] = self.ce.sum(dim=1).t()
        return self.terms if self.maps is None else self.maps, chunk.saved

    def _level(self, i: int, images: slice) -> Tensor | None:
        """What segment i puts out of these images, (count, n, halo + h + halo, w, C): y' and δ with
        the zeros around them that the next one's strips read; of the last one nothing."""
        plan, out, first = self.plan, None, images.start
        last, pad = plan.segments[i][-1], plan.pads[i]
        size, channels = plan.sizes[last], plan.steps[last].out_channels
        n, tall = images.stop - first, size.out_h + 2 * pad
        for a in range(first, images.stop, plan.images[i]):
            b = min(a + plan.images[i], images.stop)
            level = self._level(i - 1, slice(a, b)) if i else None
            self.chunk.begin(slice(a, b), plan.rooms[memory.forward][i])
            if out is None and i + 1 < len(plan.segments):
                shape = (1 if plan.call.plain else 2, n, tall, size.out_w, channels)
                out = self.chunk.take("level.out", shape)
                if pad:  # on a GPU even nothing is written by a launch
                    out[:, :, :pad] = 0
                    out[:, :, tall - pad :] = 0
            here = None if out is None else out[:, a - first : b - first, pad : tall - pad]
            self._segment(i, level, here)
            del level  # its memory serves what comes now
        return out

    def _segment(self, i: int, level: Tensor | None, out: Tensor | None) -> None:
        """Segment i from its input to `out`."""
        plan, segment = self.plan, self.plan.segments[i]
        first, strips = plan.sizes[segment[0]], plan.in_strips[i]
        halo, rows = plan.halos[i] if strips else 0, plan.rows[i]
        if plan.tapped[i]:
            self.taps.begin(plan.tapped[i])
        branch = None if plan.call.plain else self.chunk.from_target
        ce = None if self.ce is None else self.ce[self.chunk.images]
        for r0 in range(0, max(first.h, 1), max(rows, 1)):
            r1 = min(r0 + rows, first.h)
            lo, hi = (r0 - halo, r1 + halo) if strips else (0, first.h)
            if level is None:
                maps = self.logits.maps(lo, hi, (r0, r1), branch, ce)
            elif strips:
                # Rows of each map are contiguous, rows of both together are not.
                both = level[:, :, r0 : r1 + 2 * halo]
                maps = Maps(both[0], None if branch is None else both[1])
            else:
                maps = Maps(level[0], None if branch is None else level[1], level)
            for j in segment:
                p, height = plan.steps[j].kernel_size // 2, plan.sizes[j].conv_h
                lo, hi = (lo + p, hi - p) if strips else (0, height)
                at = Rows(lo, hi, *((r0, r1) if strips else (0, height)), strips)
                maps = self.steps.run(j, maps, at, out if j == segment[-1] else None)
            del maps  # its memory serves the next strip
        if plan.tapped[i]:
            self.taps.reduce(plan.tapped[i])
