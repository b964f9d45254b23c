"""The backward walk: eq. (2) to (5) from the saved tensors, at unit scale."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gpl_fast import ops
from gpl_fast.fast import memory, policy
from gpl_fast.fast.chunk import Chunk, Rows
from gpl_fast.fast.logits import LogitsBackward, empty_gradient
from gpl_fast.fast.plan import Plan
from gpl_fast.fast.seeds import Seeds
from gpl_fast.fast.steps_bwd import StepBackward
from gpl_fast.net.weights import padded_channels
from gpl_fast.stages import CudaStages


class Backward:
    """One call's walk: the forward's chunks and strips, from the last segment to the first.

    Args:
        plan, x, target, packs: as `Chunk`.
        saved: what the forward left.
        g: the gradients of its terms, (4, N) float32, or of its maps.
        stages: whose stages; None = the policy's.
    """

    def __init__(
        self,
        plan: Plan,
        x: Tensor,
        target: Mapping[str, Tensor],
        packs: Mapping[str, Tensor],
        saved: dict[str, Tensor],
        g: Tensor,
        stages: CudaStages | None = None,
    ) -> None:
        self.plan, self.dx = plan, empty_gradient(x)
        stages = stages or policy.implementation(plan.call.policy, "backward")
        self.chunk = Chunk(plan, x, target=target, packs=packs, saved=saved, stages=stages)
        self.seeds = Seeds(plan, saved, g)
        # Beside maps there is no cross-entropy that would read it.
        ce_scale = self.seeds.scale if plan.call.spatial else g[2].float().contiguous()
        self.logits = LogitsBackward(self.chunk, self.seeds.scale, ce_scale, self.dx)
        self.steps = StepBackward(self.chunk, self.seeds, self.logits)

    def run(self) -> Tensor:
        """The gradient of the prediction, (N, C, H, W), in its dtype and memory format."""
        plan, end, last = self.plan, self.plan.ends[-1], len(self.plan.segments) - 1
        for a in range(0, plan.n, plan.images[-1]):
            part = slice(a, min(a + plan.images[-1], plan.n))
            self._down(last, part, self.seeds.at(end, part, None))
        return self.dx

    def _down(self, i: int, images: slice, d_out: Tensor) -> None:
        """From segment i down to the logits: `d_out` is the gradient of what it puts out of these
        images."""
        first, stop = images.start, images.stop
        while stop - first <= (count := self.plan.images[i]):
            d_in = self._segment(i, images, d_out)
            if d_in is None:
                return
            d_out = d_in
            del d_in  # what it became is all that the next segment reads
            i -= 1
        for a in range(first, stop, count):
            b = min(a + count, stop)
            self._down(i, slice(a, b), d_out[a - first : b - first])

    def _segment(self, i: int, images: slice, d_out: Tensor) -> Tensor | None:
        """The gradient of segment i's input with that of its tap; of the first one it has gone on
        to the logits."""
        plan, segment = self.plan, self.plan.segments[i]
        self.chunk.begin(images, plan.rooms[memory.backward][i])
        if i == 0:
            self.logits.begin()
        size, rows = plan.sizes[segment[0]], plan.rows[i]
        if i == 0 and plan.on_cpu:
            # Strips write a few pixels of each channel's page: faults in that order cost more.
            ops.populate(self.dx[self.chunk.images])
        if plan.alone[i]:
            rows = size.h  # nothing is made between the two gradients
        strips = rows < size.h
        d_in = self._level(i, strips)
        for r0 in range(0, max(size.h, 1), max(rows, 1)):
            r1 = min(r0 + rows, size.h)
            into = None if d_in is None else d_in[:, r0:r1] if i else d_in[:, : r1 - r0]
            dy = self._strip(i, d_out, (r0, r1), strips, into)
            if dy is not None and i == 0:
                self.logits.from_maps(dy, r0, r1)
            elif into is not None and dy is not into and dy is not None:
                into.copy_(dy)
        if i == 0:
            return None
        d_in = dy if d_in is None else d_in
        assert d_in is not None
        tap = plan.ends[i - 1]
        return self.seeds.at(tap, images, d_in) if tap in plan.call.taps else d_in

    def _level(self, i: int, strips: bool) -> Tensor | None:
        """Memory for the gradient of segment i's input, or for a strip of the first one's; None
        where ATen makes it whole."""
        plan, segment = self.plan, self.plan.segments[i]
        size, step, how = plan.sizes[segment[0]], plan.steps[segment[0]], plan.how[segment[0]]
        n = self.chunk.images.stop - self.chunk.images.start
        ours = how.gradient.tile > 0 or how.block_bwd
        if i and (strips or ours):
            return self.chunk.take("level.in", (n, size.h, size.w, step.in_channels))
        if i == 0 and ours and (plan.call.front or not how.block_bwd):
            channels = step.in_channels
            if not plan.call.front:
                channels = padded_channels(plan.call.chain.in_channels)
            rows = min(plan.rows[0], size.h)
            return self.chunk.take("d_maps", (n, rows, size.w, channels))
        return None

    def _strip(
        self, i: int, d_out: Tensor, core: tuple[int, int], strips: bool, into: Tensor | None
    ) -> Tensor | None:
        """The gradient at rows `core` of segment i's input, in `into` where our kernels make it."""
        plan, (r0, r1) = self.plan, core
        reach = plan.halos[i]
        dy: Tensor | None = d_out  # first of the last step's whole output, then of rows [lo, hi)
        for j in reversed(plan.segments[i]):
            size = plan.sizes[j]
            lo, hi = (r0 - reach, r1 + reach) if strips else (0, size.conv_h)
            reach -= plan.steps[j].kernel_size // 2
            dx_rows = (r0 - reach, r1 + reach) if strips else (0, size.h)
            first = j == plan.segments[i][0]
            assert dy is not None
            at = Rows(lo, hi, r0, r1, strips)
            dy = self.steps.run(j, dy, at, dx_rows, into if first else None)
        return dy
