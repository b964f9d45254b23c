"""What the fast path will do for a call and an input shape: steps, saved tensors, who, chunks.

Pure arithmetic on shapes: no tensor is touched, so fakes, `explain` and the walks share it. A
*step* is one convolution and what follows it; a *segment* is a run of steps at one resolution up to
and including its down-sampling; a *strip* is rows of a segment that go through together.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from gpl_fast.fast import chunks, memory, policy
from gpl_fast.fast.call import Call
from gpl_fast.fast.geometry import Segments
from gpl_fast.fast.policy import How, Role, Way
from gpl_fast.net.steps import Step
from gpl_fast.net.weights import padded_channels
from gpl_fast.precision import tf32_allowed


class Plan(Segments):
    """A call at a shape, planned.

    Attributes:
        policy, on_cpu: who decides, and where for.
        how: who computes each step.
        budget, transient: bytes of memory that the walks may take, and those that they take.
        images: of a chunk, for each segment: so many go through together, never fewer in a deeper
            one.
        rows: of a strip, for each segment; its whole height = no strips (`in_strips`).
        contract: `saved`; codes: of each step, the codes of its max pool or the mask of its ReLU.
        alone: whether one kernel makes a segment's gradient from end to end.
        unit, relative: the largest of `coefficients` with what the derivative adds, the 2 of a
            square; each of them over the largest.
        rooms: the named buffers of each walk, by segment.
    """

    def __init__(self, call: Call, n: int, h: int, w: int, *, tf32: bool | None = None) -> None:
        super().__init__(call, n, h, w)
        self.policy = policy.named(call.policy)
        self.on_cpu = self.policy.on_cpu
        self.allow_tf32 = tf32_allowed() if tf32 is None else tf32
        # True float32 is ATen's convolutions; TF32 is the kernels' too.
        self.exact = call.dtype == torch.float32 and not self.allow_tf32
        self.budget, self.hard = self.policy.workspace(call.workspace_mb)
        self.contract = self.saved()
        self.images, self.rows = self._fit()
        self.transient = memory.peak(self, self.images, self.rows)
        heights = (self.sizes[segment[0]].h for segment in self.segments)
        self.in_strips = tuple(r < h for r, h in zip(self.rows, heights, strict=True))
        # Rows of zeros around what each segment puts out.
        self.pads = tuple(
            halo * strips
            for halo, strips in zip((*self.halos[1:], 0), (*self.in_strips[1:], False), strict=True)
        )
        self.codes = tuple(
            f"code.{s.pool}" if s.pool_kind == "max" else f"mask.{s.relu}" for s in self.steps
        )
        self.alone = tuple(memory.alone(self, i) for i in range(len(self.segments)))
        # Taps inside of segments.
        self.inner = frozenset(call.taps) - frozenset(self.ends)
        self.tapped = tuple(self._tapped(segment) for segment in self.segments)
        largest = max(self.coefficients.values(), default=1.0)
        self.unit = call.distance.slope * largest
        self.relative = {name: value / largest for name, value in self.coefficients.items()}
        self.rooms = {
            walk: [walk(self, i, self.images, self.rows) for i in range(len(self.segments))]
            for walk in (memory.forward, memory.backward)
        }

    # ------------------------------------------------------------------------------ who, how much

    def _tapped(self, segment: range) -> frozenset[str]:
        """The layers of a segment that are compared."""
        steps = [self.steps[i] for i in segment]
        return frozenset(self.call.taps).intersection(
            name for s in steps for name in (s.conv, s.relu, s.pool)
        )

    def _fit(self) -> tuple[memory.Images, memory.Rows]:
        """Decide `how`, and what goes through at a time: perhaps only without large tiles."""
        for self.large_tiles in (True, False):
            self.how = tuple(self._how(i, step) for i, step in enumerate(self.steps))
            if (found := chunks.chunks(self)) is not None:
                return found
        needed = chunks.least(self)
        if self.hard:
            raise ValueError(
                f"workspace_mb: got {self.budget / policy.MIB:.3g}, expected at least "
                f"{-(-needed // policy.MIB)} for an input of {self.h} x {self.w} with "
                f"{self.call.chain.in_channels} channels, of which not one strip of rows fits, "
                "or 'auto'"
            )
        self.budget = int(chunks.ENOUGH * needed)
        found = chunks.chunks(self)
        assert found is not None
        return found

    def _how(self, i: int, step: Step) -> How:
        call, who = self.call, self.policy
        prediction, difference = self.way(i, "prediction"), self.way(i, "difference")
        inner = ({step.conv} - {step.relu}) | ({step.relu} if step.pool else set())
        # One kernel does what nobody looks into.
        whole = not who.on_cpu and not self.exact and bool(step.relu)
        block = whole and not inner & set(call.taps)
        c_in = padded_channels(step.in_channels) if i == 0 and not call.front else step.in_channels
        tile = who.tile(call, i, step, c_in) if block else None
        taps = set(call.taps) - set(self.ends)
        block_bwd = not self.exact and not inner & taps and who.by_kernel(call, i, step)
        return How(block, tile, prediction, difference, self.way(i, "gradient"), block_bwd)

    def way(self, i: int, role: Role) -> Way:
        """Of step i's convolution, or of its data gradient."""
        step = self.steps[i]
        tiles = {2: self._tiles(i, 2), 4: self._tiles(i, 4)}
        if role != "prediction" and not self._large_tiles_fit(i):
            tiles[4] = 0
        if self.call.signs and role != "gradient":
            tiles = dict.fromkeys(
                tiles, 0
            )  # a transform's rounding has signs where nothing differs
        return self.policy.way(self.call, i, step, role, tiles)

    def _tiles(self, i: int, tile: int) -> int:
        size = self.sizes[i]
        return self.n * -(-size.conv_h // tile) * -(-size.conv_w // tile)

    def _large_tiles_fit(self, i: int) -> bool:
        return self.large_tiles and memory.large_weights_fit(self, i)

    # ------------------------------------------------------------------------------------- counts

    def bytes_saved(self) -> int:
        """Of all of `saved`."""
        return sum(memory.bytes_of(shape, dtype) for shape, dtype in self.saved().values())

    def bytes_saved_by_layer(self) -> Mapping[str, int]:
        """Of codes, masks, differences by the layer that they belong to."""
        out: dict[str, int] = {}
        for name, (shape, dtype) in self.saved().items():
            layer = name.partition(".")[2]
            out[layer] = out.get(layer, 0) + memory.bytes_of(shape, dtype)
        return out

    def bytes_transient(self) -> int:
        """Of the named buffers of the walks: at most the workspace."""
        return self.transient


@functools.lru_cache(maxsize=256)
def plan_of(call: Call, n: int, h: int, w: int, tf32: bool) -> Plan:
    """The Plan of a call and a shape, made once."""
    return Plan(call, n, h, w, tf32=tf32)
