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
    """One call's walk: images in chunks, each segment in strips of rows, each strip step by step.

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
        self.terms = x.new_zeros((4, plan.n), dtype=torch.float64)
        stages = stages or policy.implementation(plan.call.policy, "forward")
        self.chunk = Chunk(plan, x, target=target, packs=packs, saved=saved, stages=stages)
        self.taps = TapsForward(self.chunk, self.terms, keep)
        self.look_up = LookUp(self.chunk)
        self.logits = LogitsForward(self.chunk, self.look_up)
        self.steps = StepForward(self.chunk, self.taps, self.look_up)

    def run(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Terms (4, N) float64 (feature, style, Σ cross-entropy, Σ its weights), and `saved`."""
        plan, chunk = self.plan, self.chunk
        branch = None
        if not plan.call.plain:
            branch = carried(plan.call, chunk.x, chunk.target, plan.transient)
        ce = None
        if plan.call.cross_entropy:
            ce = chunk.x.new_zeros((plan.n, plan.h, 2), dtype=torch.float64)
        for n0 in range(0, plan.n, plan.images):
            chunk.images = here = slice(n0, min(n0 + plan.images, plan.n))
            if branch is not None:
                self.look_up.from_target = self.taps.from_target = branch[here]
            self._chunk(None if ce is None else ce[here])
        if ce is not None:
            self.terms[2:] = ce.sum(dim=1).t()
        return self.terms, chunk.saved

    def _chunk(self, ce: Tensor | None) -> None:
        chunk, rooms = self.chunk, self.plan.rooms[memory.forward]
        self.taps.begin()
        level: Tensor | None = None  # (count, n, halo + h + halo, w, C): y' and δ
        for i in range(len(self.plan.segments)):
            chunk.room, chunk.held, chunk.weights = rooms[i], {}, {}
            level = self._segment(i, level, ce)
        self.taps.reduce()

    def _segment(self, i: int, level: Tensor | None, ce: Tensor | None) -> Tensor | None:
        """What segment i puts out, with the zeros that the next one's strips read around it."""
        plan, segment = self.plan, self.plan.segments[i]
        first, strips = plan.sizes[segment[0]], plan.in_strips[i]
        halo, rows = plan.halos[i] if strips else 0, plan.rows[i]
        following, out = self._level(i)
        branch = None if plan.call.plain else self.look_up.from_target
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
            del maps  # its memory serves the next strip and level
        return following

    def _level(self, i: int) -> tuple[Tensor | None, Tensor | None]:
        """Memory for what segment i puts out: with zeros around it, and without."""
        plan = self.plan
        if i + 1 == len(plan.segments):
            return None, None
        last = plan.sizes[plan.segments[i][-1]]
        pad = plan.halos[i + 1] if plan.in_strips[i + 1] else 0
        channels = plan.steps[plan.segments[i][-1]].out_channels
        count = 1 if plan.call.plain else 2
        n = self.chunk.images.stop - self.chunk.images.start
        shape = (count, n, last.out_h + 2 * pad, last.out_w, channels)
        level = self.chunk.take("level.out", shape)
        if pad:  # on a GPU even nothing is written by a launch
            level[:, :, :pad] = 0
            level[:, :, pad + last.out_h :] = 0
        return level, level[:, :, pad : pad + last.out_h]
