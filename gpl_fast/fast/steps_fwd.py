"""One step of both branches: convolution, ReLU, pool; eq. (6)."""

from __future__ import annotations

import torch
from torch import Tensor

from gpl_fast.fast.chunk import Chunk, Maps, Rows, zero_outside
from gpl_fast.fast.convolution import Convolutions
from gpl_fast.fast.look_up import LookUp
from gpl_fast.fast.taps import TapsForward
from gpl_fast.stages import POOLS, TritonStages


class StepForward:
    """A step of both branches, stage by stage or by one kernel."""

    def __init__(self, chunk: Chunk[TritonStages], taps: TapsForward, look_up: LookUp) -> None:
        self.chunk, self.taps, self.look_up = chunk, taps, look_up
        self.convolutions = Convolutions(chunk)

    def run(self, i: int, maps: Maps, rows: Rows, out: Tensor | None) -> Maps:
        """Maps after step i, on the way to the next step; `out` (count, n, h, w, C) is what the
        segment puts out, if this step ends it."""
        plan = self.chunk.plan
        pad_h = 0 if rows.strips else plan.steps[i].kernel_size // 2
        if plan.how[i].block:
            return self._block(i, maps, rows, pad_h, out)
        z = self.convolutions.forward(i, maps, pad_h, rows.lo)
        assert z.carried is not None
        if maps.carried is None:
            assert z.delta is not None
            self.look_up.add(z.carried, z.delta, rows.lo)
        bias = self.chunk.packs.get(f"b.{plan.steps[i].conv}")
        if bias is not None:
            z.carried.add_(bias)
        maps = z
        if rows.strips and i not in plan.last:
            for t in (maps.carried, maps.delta):
                if t is not None:
                    zero_outside(t, rows.lo, plan.sizes[i].conv_h)
        self._activate(i, maps, rows, out)
        return maps

    def _activate(self, i: int, maps: Maps, rows: Rows, out: Tensor | None) -> None:
        """ReLU and pool of z', δz in their own memory, and the taps on the way."""
        plan, (z, dz) = self.chunk.plan, maps[:2]
        step, size = plan.steps[i], plan.sizes[i]
        assert z is not None
        own = slice(rows.a - rows.lo, rows.b - rows.lo)
        taps = plan.call.taps
        if step.conv in taps and step.conv != step.relu:  # of stride 2 the output is the ReLU's
            self._tap(step.conv, z, dz, own, rows.a, rows.b)
        if step.relu and (not step.pool or step.relu in taps):
            inner, of_image = rows.inside(size.conv_h)
            mask = self.chunk.saved_rows(f"mask.{step.relu}")
            self._relu(
                z[:, inner],
                None if dz is None else dz[:, inner],
                None if mask is None or step.pool_kind == "avg" else mask[:, of_image],
            )
            if step.relu in taps:
                self._tap(step.relu, z, dz, own, rows.a, rows.b)
        if step.pool:
            self._pool(i, z, dz, rows, out)
        elif out is not None:
            out[0][:, rows.a : rows.b] = z[:, own]
            if dz is not None:
                out[1][:, rows.a : rows.b] = dz[:, own]

    def _tap(
        self, tap: str, y: Tensor | None, d: Tensor | None, own: slice, a: int, b: int
    ) -> None:
        y, d = (None if t is None else t[:, own] for t in (y, d))
        self.taps.take(tap, y, d, a, b)

    def _relu(self, z: Tensor, dz: Tensor | None, mask: Tensor | None) -> None:
        if dz is None:
            self.chunk.stages.relu_fwd(z, y=z, mask=mask)
        else:
            self.chunk.stages.relu_diff_fwd(
                z, dz=dz, from_target=self.chunk.from_target, delta=dz, y=z, mask=mask
            )

    def _pool(self, i: int, z: Tensor, dz: Tensor | None, rows: Rows, out: Tensor | None) -> None:
        chunk, plan = self.chunk, self.chunk.plan
        step = plan.steps[i]
        a, b = rows.a // 2, min(-(-rows.b // 2), plan.sizes[i].out_h)
        if step.pool_kind == "max":
            code = chunk.saved_rows(f"code.{step.pool}", a, b)
        else:
            code = chunk.saved_rows(f"mask.{step.relu}", rows.a, rows.b)
        diff, styled = self.taps.diff.get(step.pool), step.pool in plan.call.styled
        shape = (z.shape[0], z.shape[1] // 2, z.shape[2] // 2, z.shape[3])
        y: Tensor | None = None
        if out is not None:
            y, d = out[0][:, a:b], out[-1][:, a:b]
        else:
            both = None
            if styled or dz is None or diff is None:
                both = chunk.take("pooled", (2, *shape))
            if styled or dz is None:
                assert both is not None
                y = both[0]
            if diff is not None:
                d = diff[:, a:b]
            else:
                assert both is not None
                d = both[1]
        everything = slice(None)
        if dz is None:
            assert y is not None
            chunk.stages.relu_pool_fwd(z, pool=POOLS[step.pool_kind], y=y, code=code)
            if step.pool in plan.call.taps:
                self._tap(step.pool, y, None, everything, a, b)
            return
        chunk.stages.relu_pool_diff_fwd(
            z, dz=dz, from_target=chunk.from_target, pool=POOLS[step.pool_kind], delta=d,
            y=y, code=code,
        )  # fmt: skip
        if styled or (diff is not None and out is not None):
            self._tap(step.pool, y, d, everything, a, b)

    def _block(self, i: int, maps: Maps, rows: Rows, pad_h: int, out: Tensor | None) -> Maps:
        """The step by one kernel: nothing but its output is looked at."""
        chunk, plan = self.chunk, self.chunk.plan
        step, size, plain = plan.steps[i], plan.sizes[i], plan.call.plain
        first_map = maps.delta if maps.carried is None else maps.carried
        assert first_map is not None
        n, tap = len(first_map), step.pool or step.relu
        a, b, width = rows.a, rows.b, size.conv_w
        _, of_image = rows.inside(size.conv_h)
        count = rows.hi - rows.lo
        if step.pool:
            a, b, width = a // 2, min(-(-b // 2), size.out_h), size.out_w
            count = b - a
        if step.pool_kind == "max":
            code = chunk.saved_rows(f"code.{step.pool}", a, b)
        else:
            mask = chunk.saved_rows(f"mask.{step.relu}")
            code = None if mask is None else mask[:, of_image]
        tile = plan.how[i].tile
        assert tile is not None
        made = self._block_output(i, (n, count, width, step.out_channels), (a, b), out)
        partial = chunk.stages.conv_block_fwd(
            first_map,
            d=maps.delta if maps.carried is not None else None,
            weight=chunk.packs[f"block.{step.conv}"],
            bias=chunk.packs.get(f"b.{step.conv}"),
            from_target=None if plain else chunk.from_target,
            target=self.look_up.listed() if maps.carried is None else None,
            kernel_size=step.kernel_size,
            stride=step.stride,
            relu=True,
            pool=POOLS[step.pool_kind],
            pad_h=pad_h,
            row0=rows.lo,
            image_rows=size.conv_h,
            tile=tile,
            y=made.carried,
            delta=made.delta,
            code=code,
            reduce=tap in plan.call.squared and not plain and bool(step.pool),
            allow_tf32=plan.allow_tf32,
        )
        if partial is not None:
            self.taps.add(tap, partial.sum(dim=1, dtype=torch.float64))
        first = 0 if step.pool or out is not None else a - rows.lo
        if tap in plan.call.taps:
            self._tap(tap, made.carried, made.delta, slice(first, first + b - a), a, b)
        return made

    def _block_output(
        self, i: int, shape: tuple[int, ...], rows: tuple[int, int], out: Tensor | None
    ) -> Maps:
        """Where a block writes to: the segment's output, the difference that is kept, or memory of
        the strip's."""
        plan, (a, b) = self.chunk.plan, rows
        step, plain = plan.steps[i], plan.call.plain
        tap = step.pool or step.relu
        diff = self.taps.diff.get(tap)
        if out is not None:
            return Maps(out[0][:, a:b], None if plain else out[1][:, a:b])
        if i + 1 == len(plan.steps) and diff is not None and not plain:
            # The last block leaves its difference alone.
            y = self.chunk.take(f"z{i % 2}", shape) if tap in plan.call.styled else None
            return Maps(y, diff[:, a:b])
        return Maps.of(self.chunk.take(f"z{i % 2}", (1 if plain else 2, *shape)))
