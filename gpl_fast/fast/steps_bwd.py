"""One step back: pool and ReLU, eq. (3), and the data gradient, eq. (4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpl_fast.fast.chunk import Chunk, Rows
from gpl_fast.fast.convolution import Convolutions
from gpl_fast.fast.logits import LogitsBackward
from gpl_fast.fast.seeds import Seeds
from gpl_fast.net.steps import Step
from gpl_fast.stages import POOLS, CudaStages


class StepBackward:
    """The gradient of a step's input from that of its output."""

    def __init__(self, chunk: Chunk[CudaStages], seeds: Seeds, logits: LogitsBackward) -> None:
        self.chunk, self.seeds, self.logits = chunk, seeds, logits
        self.convolutions = Convolutions(chunk)

    def run(
        self, i: int, dy: Tensor, rows: Rows, dx_rows: tuple[int, int], into: Tensor | None
    ) -> Tensor | None:
        """Rows `dx_rows` of the gradient of step i's input, in `into` where our kernels make it;
        None: it has gone on to the logits.

        Args:
            dy: of the step's output: whole if the step ends its segment, else rows of `rows`.
        """
        plan = self.chunk.plan
        step = plan.steps[i]
        ends = i in plan.last
        if plan.how[i].block_bwd:
            return self._block(i, dy, rows, dx_rows, ends, into)
        through = self._last_gradient if ends else self._relu_gradient
        dz = through(i, dy, rows)
        if step.conv in plan.inner and step.conv != step.relu:
            dz = self._add_tap(step.conv, dz, rows, plan.sizes[i].conv_h)
        if plan.how[i].gradient.tile and into is None:
            size, p = plan.sizes[i], step.kernel_size // 2
            count = dz.shape[1] - 2 * p if rows.strips else dz.shape[1]
            into = self.chunk.take(f"dy{i % 2}", (dz.shape[0], count, size.w, step.in_channels))
        return self.convolutions.data_gradient(i, dz, rows.strips, dx_rows[0], into)

    def _block(
        self, i: int, dy: Tensor, rows: Rows, dx_rows: tuple[int, int], ends: bool,
        into: Tensor | None,
    ) -> Tensor | None:  # fmt: skip
        """By one kernel, (3) and (4); of the first step through (5) to the logits."""
        chunk, plan = self.chunk, self.chunk.plan
        step, size = plan.steps[i], plan.sizes[i]
        if not ends:
            dy = self._add_tap(step.relu, dy, rows, size.conv_h)
        block: dict[str, Any] = {
            "w": chunk.packs[f"bwd.{step.conv}"],
            "pool": POOLS[step.pool_kind],
            "stride": step.stride,
            "dy_row0": 0 if ends else rows.lo,
            "allow_tf32": plan.allow_tf32,
            "code": chunk.saved[plan.codes[i]][chunk.images] if step.relu else None,
        }
        if i == 0 and not plan.call.front:
            x, arguments = self.logits.arguments()
            chunk.stages.conv_block_logits_bwd(
                dy.contiguous(), **block, x=x, **arguments, row0=rows.a, rows=rows.b - rows.a
            )
            self.logits.add_binary_ce(rows.a, rows.b)
            return None
        a, b = dx_rows if rows.strips else (0, size.h)
        if into is None:
            shape = (dy.shape[0], b - a, size.w, step.in_channels)
            into = chunk.take(f"dy{i % 2}", shape)  # not where `dy` is
        chunk.stages.conv_block_bwd(dy.contiguous(), **block, height=size.h, row0=a, dx=into)
        return into

    def _last_gradient(self, i: int, d_out: Tensor, rows: Rows) -> Tensor:
        """dZ of a segment's last convolution, 0 outside the image."""
        step, size, n = self.chunk.plan.steps[i], self.chunk.plan.sizes[i], d_out.shape[0]
        shape = (n, rows.hi - rows.lo, size.conv_w, step.out_channels)
        if not step.pool:
            inner, of_image = rows.inside(size.conv_h)
            dy = d_out[:, of_image]
            if rows.lo < 0 or rows.hi > size.conv_h:
                dy = self.chunk.take("relu", shape).zero_()
                dy[:, inner] = d_out[:, of_image]
            return self._relu_gradient(i, dy, rows)
        dz = self.chunk.take("dz", shape)
        code = self.chunk.saved[self.chunk.plan.codes[i]][self.chunk.images]
        self.chunk.stages.relu_pool_bwd(
            d_out, code=code, pool=POOLS[step.pool_kind], height=size.conv_h,
            width=size.conv_w, row0=rows.lo, dz=dz,
        )  # fmt: skip
        if step.relu in self.chunk.plan.inner:
            seed = self._add_tap(step.relu, torch.zeros_like(dz), rows, size.conv_h)
            dz += self._masked(step, seed, rows, size.conv_h, torch.zeros_like(dz))
        return dz

    def _relu_gradient(self, i: int, dy: Tensor, rows: Rows) -> Tensor:
        step, height = self.chunk.plan.steps[i], self.chunk.plan.sizes[i].conv_h
        if not step.relu:
            return dy.contiguous()
        dy = self._add_tap(step.relu, dy, rows, height)
        return self._masked(step, dy, rows, height, self.chunk.take("dz", dy.shape))

    def _masked(self, step: Step, dy: Tensor, rows: Rows, height: int, dz: Tensor) -> Tensor:
        """ReLU's gradient inside the image, 0 outside, in `dz`."""
        mask = self.chunk.saved[f"mask.{step.relu}"][self.chunk.images]
        inner, of_image = rows.inside(height)
        own = mask[:, of_image].contiguous()
        if inner == slice(0, rows.hi - rows.lo):
            self.chunk.stages.relu_bwd(dy.contiguous(), mask=own, dz=dz)
            return dz
        there = dy[:, inner].contiguous()
        self.chunk.stages.relu_bwd(there, mask=own, dz=there)
        dz.zero_()
        dz[:, inner] = there
        return dz

    def _add_tap(self, tap: str, dy: Tensor, rows: Rows, height: int) -> Tensor:
        """`dy` plus the gradient of a tap inside a segment."""
        if tap not in self.chunk.plan.inner:
            return dy
        inner, of_image = rows.inside(height)
        dy = dy.clone()
        here = dy[:, inner]
        made = self.seeds.at(tap, self.chunk.images, here, of_image)
        if made is not here:
            here.copy_(made)
        return dy
