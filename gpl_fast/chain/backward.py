"""The backward walk: eq. (2) to (5) from the saved tensors, at unit scale."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gpl_fast import ops
from gpl_fast.chain.convolution import Convolutions, conv_transpose
from gpl_fast.chain.stages import backward_stages_on
from gpl_fast.plan import Plan, Step, padded_channels
from gpl_fast.precision import tf32_allowed
from gpl_fast.stages import ACTIVATIONS, POOLS


class Backward:
    """One call's backward walk: eq. (2) to (5), at unit scale.

    Args:
        plan, x, target, packs: as in `Forward`.
        saved: what it left.
        g: (4, N) float32, the gradients of its terms.
    """

    def __init__(
        self,
        plan: Plan,
        x: Tensor,
        target: Mapping[str, Tensor],
        packs: dict[str, Tensor],
        saved: dict[str, Tensor],
        g: Tensor,
    ) -> None:
        self.plan, self.x, self.target, self.packs, self.saved = plan, x, target, packs, saved
        self.stages = backward_stages_on(x.device)
        self.allow_tf32 = tf32_allowed()
        self.convolutions = Convolutions(plan, packs)
        self.n0 = self.n1 = 0
        # The chain carries seeds of at most one δ; what it was divided by is applied at its end.
        c = plan.coefficients()
        unit = max(c.values())
        g_n = g[:2].abs().amax(dim=0)
        relative = torch.where(g_n == 0, 0, g[:2] / g_n)
        self.seeds = {
            name: relative[0 if name.startswith("feature") else 1] * (value / unit)
            for name, value in c.items()
        }
        self.scale = (2 * unit * g_n).float()
        # What the segments put out; a tap there is added between them.
        self.ends = [_output(plan.steps[segment[-1]]) for segment in plan.segments]
        self.ce_scale = g[2].float().contiguous()
        self.dx = empty_gradient(x)

    def run(self) -> Tensor:
        """The gradient of the prediction, (N, C, H, W), in its dtype and memory format."""
        for n0 in range(0, self.plan.n, self.plan.images):
            self.n0, self.n1 = n0, min(n0 + self.plan.images, self.plan.n)
            self._chunk()
        return self.dx

    def _chunk(self) -> None:
        plan, n = self.plan, self.n1 - self.n0
        labels = self._of("ce_labels")
        self.labels = None if labels is None else labels.long()
        d_out = self._seed(self.ends[-1], 0, plan.tap_shape(self.ends[-1])[1], None)
        for i in reversed(range(len(plan.segments))):
            segment = plan.segments[i]
            size, rows = plan.sizes[segment[0]], plan.rows[i]
            if i == 0 and self.x.device.type == "cpu":
                # Strips write a few pixels of each channel's page: faults in that order cost more.
                ops.populate(self.dx[self.n0 : self.n1])
            alone = len(segment) == 1 and self._is_block(plan.steps[segment[0]])
            if alone and not (i == 0 and plan.front):
                rows = size.h  # nothing is made between the two gradients
            strips = rows < size.h
            d_in: Tensor | None = None
            if i and strips:
                channels = plan.steps[segment[0]].in_channels
                d_in = self.x.new_empty((n, size.h, size.w, channels), dtype=plan.dtype)
            elif strips and not plan.front and self.convolutions.ours(0):
                # The same memory for every strip, as in the forward.
                channels = padded_channels(plan.spec.in_channels)
                d_in = self.x.new_empty((n, rows, size.w, channels), dtype=plan.dtype)
            for r0 in range(0, max(size.h, 1), max(rows, 1)):
                r1 = min(r0 + rows, size.h)
                a, b = (r0, r1) if i else (0, r1 - r0)
                into = None if d_in is None else d_in[:, a:b]
                dy = self._segment(segment, d_out, (r0, r1), strips, into)
            self.convolutions.release()
            if i:
                tap, d_in = self.ends[i - 1], dy if d_in is None else d_in
                d_out = self._seed(tap, 0, size.h, d_in) if tap in plan.taps else d_in

    def _segment(
        self,
        segment: range,
        d_out: Tensor,
        core: tuple[int, int],
        strips: bool,
        into: Tensor | None,
    ) -> Tensor:
        """The gradient at rows ``core`` of the segment's input, in `into` where that is given; of
        the first segment it has gone on to the logits."""
        plan, (r0, r1) = self.plan, core
        reach = plan.halo(segment)
        dy: Tensor = d_out  # first of the last step's whole output, then of rows [lo, hi)
        for i in reversed(segment):
            step, size = plan.steps[i], plan.sizes[i]
            p = step.kernel_size // 2
            lo, hi = (r0 - reach, r1 + reach) if strips else (0, size.conv_h)
            reach -= p
            last, first = i == segment[-1], i == segment[0]
            if self._is_block(step):
                dy_row0 = 0 if last else lo
                if not last:
                    dy = self._add_tap(step.relu, dy, lo, hi, size.conv_h)
                if i == 0 and not plan.front:
                    self._block(step, dy, dy_row0, size.h, (r0, r1), None)
                    return dy
                rows = (r0 - reach, r1 + reach) if strips else (0, size.h)
                dx = into if first else None
                if dx is None:
                    shape = (dy.shape[0], rows[1] - rows[0], size.w, step.in_channels)
                    dx = dy.new_empty(shape)
                self._block(step, dy, dy_row0, size.h, rows, dx)
                dy = dx
                continue
            if last:
                dz = self._last_gradient(step, i, dy, lo, hi)
            else:
                dz = self._relu_gradient(step, i, dy, lo, hi)
            if step.conv != step.relu:
                dz = self._add_tap(step.conv, dz, lo, hi, size.conv_h)
            row0, out = r0 - reach if strips else 0, into if first else None
            dy = self.convolutions.data_gradient(i, dz, strips, row0, out)
        if segment[0] == 0:
            self._first_maps(dy, r0, r1)
        elif into is not None and dy is not into:
            into.copy_(dy)
        return dy

    def _is_block(self, step: Step) -> bool:
        """Whether one kernel goes from the gradient of the step's output to that of its input."""
        taps = set(self.plan.taps) - set(self.ends)
        inside = {step.conv} - {step.relu} | ({step.relu} if step.pool else set())
        exact = self.plan.dtype == torch.float32 and not self.allow_tf32
        return f"bwd.{step.conv}" in self.packs and not exact and not inside & taps

    def _block(
        self,
        step: Step,
        dy: Tensor,
        dy_row0: int,
        height: int,
        rows: tuple[int, int],
        dx: Tensor | None,
    ) -> None:
        """Rows of the step's input, (3) and (4), into `dx`; None: on through (5) to the logits."""
        name = f"code.{step.pool}" if step.pool_kind == "max" else f"mask.{step.relu}"
        code = self.saved[name][self.n0 : self.n1] if step.relu else None
        block = {
            "dy": dy.contiguous(), "code": code, "w": self.packs[f"bwd.{step.conv}"],
            "pool": POOLS[step.pool_kind], "stride": step.stride, "dy_row0": dy_row0,
            "allow_tf32": self.allow_tf32,
        }  # fmt: skip
        (a, b) = rows
        if dx is None:
            dlogits = self.dx[self.n0 : self.n1]
            self.stages.conv_block_logits_bwd(
                **block, **self._logits(), row0=a, rows=b - a, dx=dlogits
            )
        else:
            self.stages.conv_block_bwd(*block.values(), height, a, dx)

    def _last_gradient(self, step: Step, i: int, d_out: Tensor, lo: int, hi: int) -> Tensor:
        """dZ at rows [lo, hi) of a segment's last convolution, 0 outside the image."""
        plan, size, n = self.plan, self.plan.sizes[i], d_out.shape[0]
        if not step.pool:
            inner = d_out[:, max(lo, 0) : min(hi, size.conv_h)]
            if lo < 0 or hi > size.conv_h:
                dy = d_out.new_zeros((n, hi - lo, size.conv_w, step.out_channels))
                dy[:, max(lo, 0) - lo : min(hi, size.conv_h) - lo] = inner
            else:
                dy = inner
            return self._relu_gradient(step, i, dy, lo, hi)
        dz = d_out.new_empty((n, hi - lo, size.conv_w, step.out_channels))
        name = f"code.{step.pool}" if step.pool_kind == "max" else f"mask.{step.relu}"
        code = self.saved[name][self.n0 : self.n1]
        kind = POOLS[step.pool_kind]
        where = code, kind, size.conv_h, size.conv_w, lo, dz
        if isinstance(self.stages, ModuleType) and self.stages.__name__ == "gpl_fast.kernels":
            names = ("code", "pool", "height", "width", "row0", "dz")
            self.stages.relu_pool_bwd(d_out, **dict(zip(names, where, strict=True)))
        else:
            self.stages.relu_pool_bwd(d_out, *where)
        if step.relu in plan.taps:
            seed = self._add_tap(step.relu, torch.zeros_like(dz), lo, hi, size.conv_h)
            dz += self._masked(step, seed, lo, hi, size.conv_h)
        return dz

    def _relu_gradient(self, step: Step, i: int, dy: Tensor, lo: int, hi: int) -> Tensor:
        height = self.plan.sizes[i].conv_h
        if not step.relu:
            return dy.contiguous()
        dy = self._add_tap(step.relu, dy, lo, hi, height)
        return self._masked(step, dy, lo, hi, height)

    def _masked(self, step: Step, dy: Tensor, lo: int, hi: int, height: int) -> Tensor:
        """ReLU's gradient inside the image, 0 outside."""
        mask = self.saved[f"mask.{step.relu}"][self.n0 : self.n1]
        a, b = max(lo, 0), min(hi, height)
        if (a, b) == (lo, hi):
            dz = torch.empty_like(dy, memory_format=torch.contiguous_format)
            self.stages.relu_bwd(dy.contiguous(), mask=mask[:, a:b].contiguous(), dz=dz)
            return dz
        dz = torch.zeros_like(dy, memory_format=torch.contiguous_format)
        inner = dy[:, a - lo : b - lo].contiguous()
        self.stages.relu_bwd(inner, mask=mask[:, a:b].contiguous(), dz=inner)
        dz[:, a - lo : b - lo] = inner
        return dz

    def _add_tap(self, tap: str, dy: Tensor, lo: int, hi: int, height: int) -> Tensor:
        """`dy` plus the gradient of a tap inside a segment."""
        if tap not in self.plan.taps or tap in self.ends:
            return dy
        a, b = max(lo, 0), min(hi, height)
        dy = dy.clone()
        dy[:, a - lo : b - lo] = self._seed(tap, a, b, dy[:, a - lo : b - lo])
        return dy

    def _seed(self, tap: str, a: int, b: int, dy: Tensor | None) -> Tensor:
        """Rows [a, b) of ``dE_b``, eq. (2) and Gram's, added to `dy`, in the compute dtype."""
        chunk = slice(self.n0, self.n1)
        if set(self.seeds) == {f"feature.{tap}"} and dy is None:
            g = self.seeds[f"feature.{tap}"][chunk]
            diff = self.saved[f"diff.{tap}"][chunk, a:b]
            # One level: the seed is δ itself (times 0 or ±1 where the loss' gradient is).
            return diff * g.to(diff.dtype).view(-1, 1, 1, 1)
        total: Tensor | None = None if dy is None else dy.float()
        if f"feature.{tap}" in self.seeds:
            g = self.seeds[f"feature.{tap}"][chunk].float().view(-1, 1, 1, 1)
            seed = self.saved[f"diff.{tap}"][chunk, a:b].float() * g
            total = seed if total is None else total + seed
        if f"style.{tap}" in self.seeds:
            g = self.seeds[f"style.{tap}"][chunk].float().view(-1, 1, 1, 1)
            phi = self.saved[f"phi.{tap}"][chunk, a:b].float()
            seed = (phi.flatten(1, 2) @ self.saved[f"gram.{tap}"][chunk]).view_as(phi) * g
            total = seed if total is None else total + seed
        assert total is not None
        return total.to(self.plan.dtype)

    def _first_maps(self, dy: Tensor, r0: int, r1: int) -> None:
        """Rows [r0, r1) of the logits' gradient, from that of their map."""
        if self.plan.front:
            dy = self._front(dy)
        logits = self._logits()
        dlogits = self.dx[self.n0 : self.n1]
        self.stages.softmax_bwd(logits.pop("x"), dy=dy, **logits, row0=r0, rows=r1 - r0, dx=dlogits)

    def _logits(self) -> dict[str, Any]:
        """The arguments of (5) and the cross-entropy, of this chunk."""
        spec, chunk = self.plan.spec, slice(self.n0, self.n1)
        lse, ce_lse = self.saved.get("lse"), self.saved.get("ce_lse")
        return {
            "x": self.x[chunk],
            "lse": None if lse is None else lse[chunk],
            "scale": self.scale[chunk].contiguous(),
            "valid": self._of("valid"),
            "activation": ACTIVATIONS[spec.activation],
            "temperature": spec.temperature,
            "ce_labels": self.labels,
            "ce_lse": None if ce_lse is None else ce_lse[chunk],
            "ce_scale": None if self.labels is None else self.ce_scale[chunk],
            "class_weight": self.target.get("class_weight"),
            "label_smoothing": spec.label_smoothing,
        }

    def _front(self, dy: Tensor) -> Tensor:
        spec = self.plan.spec
        if spec.std is not None:
            dy = (dy.float() / self.packs["std"]).to(dy.dtype)
        if spec.adapter:
            return conv_transpose(dy, self.packs["w.adapter"], 1, (0, 0), (0, 0))
        return dy.contiguous()

    def _of(self, name: str) -> Tensor | None:
        t = self.target.get(name)
        return None if t is None else t[self.n0 : self.n1]


def _output(step: Step) -> str:
    """The layer whose output is the step's."""
    return step.pool or step.relu or step.conv


def empty_gradient(x: Tensor) -> Tensor:
    """Uninitialised memory for the gradient of `x`, in its memory format."""
    nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if nhwc else torch.contiguous_format
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)
