"""The forward walk: both branches in the difference form, eq. (6)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from gpl_fast import reference
from gpl_fast.chain.branch import GRID, carry_target
from gpl_fast.chain.convolution import Convolutions, conv, zero_outside
from gpl_fast.chain.stages import has_blocks, stages_on, tile_for
from gpl_fast.plan import Plan, Step, padded_channels
from gpl_fast.precision import tf32_allowed
from gpl_fast.stages import ACTIVATIONS, POOLS, Listed


class Forward:
    """One call's forward walk.

    Args:
        plan: what to do.
        x: (N, C, H, W) prediction, any strides.
        target: by name, as there are: dense (N, C, h, w), labels (N, H, W) int64,
            topk_values, topk_indices (N, k, H, W), topk_rest (N, H, W), valid (N, H, W) bool,
            ce_labels (N, H, W) int64, class_weight (C,), and for tap t ``feature.t`` (N, H_b, W_b,
            C_b) stored target features, ``gram.t`` (1 or N, C_b, C_b) of another style target.
        packs: of `pack_weights`.
        keep: allocate what the backward reads.
    """

    def __init__(
        self,
        plan: Plan,
        x: Tensor,
        target: Mapping[str, Tensor],
        packs: dict[str, Tensor],
        keep: bool,
    ) -> None:
        self.plan, self.x, self.target, self.packs, self.keep = plan, x, target, packs, keep
        self.plain = plan.spec.kind in ("features", "encode")
        self.convolutions = Convolutions(plan, packs)
        self.table = packs.get("table")  # of the dtype of what it adds to
        if self.table is not None and self.convolutions.ours(0) and not plan.front:
            self.table = self.table.float()
        self.stages = stages_on(x.device)
        # True float32 is ATen's convolutions; TF32 is the kernels' too.
        self.blocks = has_blocks(x.device) and (plan.dtype != torch.float32 or tf32_allowed())
        self.n0 = self.n1 = 0
        self.saved: dict[str, Tensor] = {
            name: x.new_empty(shape, dtype=dtype)
            for name, (shape, dtype) in plan.saved().items()
            if keep or name.split(".")[0] == "gram"
        }
        self.terms = x.new_zeros((4, plan.n), dtype=torch.float64)

    def run(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Terms (4, N) float64 (feature, style, Σ cross-entropy, Σ its weights), and `saved`."""
        plan = self.plan
        if not self.plain:
            self.carried = self._carried()
        ce_rows = None
        if plan.spec.cross_entropy:
            ce_rows = self.x.new_zeros((plan.n, plan.h, 2), dtype=torch.float64)
        for n0 in range(0, plan.n, plan.images):
            self.n0, self.n1 = n0, min(n0 + plan.images, plan.n)
            self._chunk(None if ce_rows is None else ce_rows[self.n0 : self.n1])
        if ce_rows is not None:
            self.terms[2:] = ce_rows.sum(dim=1).t()
        return self.terms, self.saved

    def _chunk(self, ce_rows: Tensor | None) -> None:
        plan, n = self.plan, self.n1 - self.n0
        self.taps = {
            f"{kind}.{tap}": self._tap_buffer(f"{kind}.{tap}", tap)
            for kind, weights in (("diff", plan.spec.feature_weights), ("phi", {}))
            for tap in weights
        }
        self.squares: dict[str, Tensor] = {}  # Σ δ² of each image where a block has reduced it
        for tap in plan.spec.style_weights:
            self.saved[f"gram.{tap}"][self.n0 : self.n1].zero_()
        if not self.plain:
            self.from_target = self.carried[self.n0 : self.n1]
        self.strip: Tensor | None = None
        level: Tensor | None = None  # (2, n, halo + h + halo, w, C): y' and δ; plain: y' alone
        for i, segment in enumerate(plan.segments):
            first, last = plan.sizes[segment[0]], plan.sizes[segment[-1]]
            rows, halo = plan.rows[i], plan.halo(segment)
            strips = rows < first.h
            following = None
            if i + 1 < len(plan.segments):
                after = plan.segments[i + 1]
                pad = plan.halo(after) if plan.rows[i + 1] < plan.sizes[after[0]].h else 0
                channels = plan.steps[segment[-1]].out_channels
                count = 1 if self.plain else 2
                shape = (count, n, last.out_h + 2 * pad, last.out_w, channels)
                following = self.x.new_empty(shape, dtype=plan.dtype)
                if pad:  # on a GPU even nothing is written by a launch
                    following[:, :, :pad] = 0
                    following[:, :, pad + last.out_h :] = 0
                out = following[:, :, pad : pad + last.out_h]
            else:
                out = None
            for r0 in range(0, max(first.h, 1), max(rows, 1)):
                r1 = min(r0 + rows, first.h)
                lo, hi = (r0 - halo, r1 + halo) if strips else (0, first.h)
                if i == 0:
                    maps = [self._first_maps(lo, hi, r0, r1, ce_rows)]
                else:
                    assert level is not None
                    # Rows of each map are contiguous, rows of both together are not.
                    both = level[:, :, r0 : r1 + 2 * halo]
                    maps = [both[:1], both[1:]][: len(both)] if strips else [level]
                    del both
                self._segment(segment, maps, (lo, hi), (r0, r1), strips, out)
                del maps  # its memory serves the next strip and level
            self.strip = None
            self.convolutions.release()
            level = following
        self._reduce()

    def _carried(self) -> Tensor:
        """(N,) bool, `carry_target`: its many small operators once for as many images as fit."""
        plan = self.plan
        # About eight float32 maps of the grid are alive at a time.
        an_image = 32 * plan.spec.in_channels * GRID[0] * GRID[1]
        step = max(1, plan.spec.workspace_bytes // an_image)
        parts = [
            carry_target(plan.spec, self.x, self.target, slice(n0, n0 + step), plan.dtype)
            for n0 in range(0, max(plan.n, 1), step)
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    # (1) prediction and target at the network's input: softmax, difference, look-up

    def _first_maps(self, lo: int, hi: int, r0: int, r1: int, ce_rows: Tensor | None) -> Tensor:
        """(y', δ) stacked, y' alone in the plain form, or u alone where the target is looked up.

        u is y' less the target at the pixels where that leaves less (`taken`): the look-up adds
        the target's rows to z' there and takes them from δz elsewhere.
        """
        plan, spec = self.plan, self.plan.spec
        a, b = max(lo, 0), min(hi, plan.h)  # the strip's rows inside the image
        x = self.x[self.n0 : self.n1, :, a:b]
        shape = (self.n1 - self.n0, hi - lo, plan.w, padded_channels(spec.in_channels))
        dense, listed = spec.kind == "dense", spec.kind in ("labels", "topk")
        taken = x.new_empty(shape[:3], dtype=torch.uint8) if listed else None
        pair = self._strip_of((2 if dense else 1, *shape))
        self.stages.softmax_pack_fwd(
            x,
            activation=ACTIVATIONS[spec.activation],
            target_activation=ACTIVATIONS[spec.target_activation],
            temperature=spec.temperature,
            label_smoothing=spec.label_smoothing,
            row0=lo - a,
            rows=hi - lo,
            core0=r0 - a,
            core_rows=r1 - r0,
            valid=self._rows("valid", a, b),
            target=self._dense_rows(a, b) if dense else None,
            from_target=self.from_target if dense else None,
            labels=self._rows("labels", a, b),
            topk_values=self._rows("topk_values", a, b),
            topk_indices=self._rows("topk_indices", a, b),
            topk_rest=self._rows("topk_rest", a, b),
            ce_labels=self._rows("ce_labels", a, b),
            class_weight=self.target.get("class_weight"),
            y=pair[0],
            delta=pair[1] if dense else None,
            taken=taken,
            lse=self._saved_rows("lse", a, b),
            ce_lse=self._saved_rows("ce_lse", a, b),
            ce_rows=None if ce_rows is None else ce_rows[:, a:b],
        )
        self.taken = taken, lo
        return self._front(pair, lo, hi) if plan.front else pair

    def _strip_of(self, shape: tuple[int, ...]) -> Tensor:
        """Uninitialised memory for a strip's maps: the same for every strip of a chunk, since an
        allocator that maps so much anew takes as long for it as the softmax."""
        plan, count = self.plan, math.prod(shape)
        if plan.front:  # which leaves maps of its own
            return self.x.new_empty(shape, dtype=plan.dtype)
        if self.strip is None or self.strip.numel() < count:
            self.strip = self.x.new_empty(shape, dtype=plan.dtype)
        return self.strip.view(-1)[:count].view(shape)

    def _dense_rows(self, a: int, b: int) -> Tensor:
        """Rows [a, b) of the dense target, resized bilinearly where it has another size."""
        t = self.target["dense"][self.n0 : self.n1]
        h, w = t.shape[2:]
        if (h, w) == (self.plan.h, self.plan.w):
            rows = t[:, :, a:b]
            return _float32(rows) if t.dtype == torch.float64 else rows
        valid = self._of("dense_valid")
        if valid is None:
            return self._resized_rows(t, a, b)
        # Of what is valid alone, as `reference.resize`.
        weight = self._resized_rows(valid.unsqueeze(1).float(), a, b)
        rows = self._resized_rows(reference.zero_invalid(t, valid), a, b)
        return rows / torch.where(weight > 0, weight, 1)

    def _resized_rows(self, t: Tensor, a: int, b: int) -> Tensor:
        """Rows [a, b) of maps (n, c, h, w) resized bilinearly to H x W, float32."""
        h = t.shape[2]
        source = (torch.arange(a, b, device=t.device, dtype=torch.float32) + 0.5) * (
            h / self.plan.h
        )
        source = (source - 0.5).clamp(min=0)
        above = source.floor().long().clamp(max=h - 1)
        below = (above + 1).clamp(max=h - 1)
        part = (source - above).view(1, 1, -1, 1)
        rows = _float32(t[:, :, above]) * (1 - part) + _float32(t[:, :, below]) * part
        return reference.resize(rows, (b - a, self.plan.w))

    def _front(self, maps: Tensor, lo: int, hi: int) -> Tensor:
        """Input adapter, mean/std and zeroing of (y', δ), from what `_first_maps` describes."""
        flat = maps.flatten(0, 1)
        if self.plan.spec.adapter:
            flat = conv(flat, self.packs["w.adapter"], 1, (0, 0))
        else:
            dtype = torch.float32 if self.plan.spec.arithmetic == "float32" else flat.dtype
            flat = flat[..., : self.plan.spec.in_channels].to(dtype).contiguous()
        maps = flat.view(*maps.shape[:4], flat.shape[-1])
        if self.taken[0] is not None:
            maps = torch.stack([torch.empty_like(maps[0]), maps[0]])
            self._look_up(maps[0], maps[1], lo)
        return torch.stack([self._affine(m, lo, hi, i == 0) for i, m in enumerate(maps)])

    def _affine(self, y: Tensor, lo: int, hi: int, shift: bool) -> Tensor:
        """``(y − mean) / std`` (differences are not shifted), 0 where not valid or outside."""
        spec = self.plan.spec
        if spec.mean is None or spec.std is None:
            return y
        z = y.float()
        if shift:
            z = z - self.packs["mean"]
        z = (z / self.packs["std"]).to(y.dtype)
        valid = self._of("valid")
        if valid is not None:
            rows = torch.zeros((*z.shape[:3], 1), dtype=torch.bool, device=z.device)
            a, b = max(lo, 0), min(hi, self.plan.h)
            rows[:, a - lo : b - lo] = valid[:, a:b].unsqueeze(-1)
            z = torch.where(rows, z, 0)
        zero_outside(z, lo, self.plan.h)
        return z

    def _look_up(self, z: Tensor, dz: Tensor, row0: int) -> None:
        """z' and δz from the convolution of u, which `dz` holds on entry."""
        table, (taken, lo) = self.table, self.taken
        assert table is not None
        common = {
            "valid": self._of("valid"), "table": table, "from_target": self.from_target,
            "taken": taken, "taken_row0": lo, "row0": row0, "z": z, "dz": dz,
        }  # fmt: skip
        if self.plan.spec.kind == "labels":
            interior = self.packs["interior"]
            self.stages.label_conv_fwd(self._of("labels"), interior=interior, **common)
        else:
            rest = self._of("topk_rest")
            self.stages.topk_conv_fwd(
                self._of("topk_values"),
                topk_indices=self._of("topk_indices"),
                topk_rest=rest,
                rest_table=None if rest is None else self.packs["rest_table"],
                **common,
            )

    # (2) convolution, ReLU, pool: eq. (6)

    def _segment(
        self,
        segment: range,
        maps: list[Tensor],
        rows: tuple[int, int],
        core: tuple[int, int],
        strips: bool,
        out: Tensor | None,
    ) -> None:
        """Rows ``core`` of a segment's output from its input maps at ``rows``."""
        plan, (lo, hi) = self.plan, rows
        for i in segment:
            step, size = plan.steps[i], plan.sizes[i]
            p = step.kernel_size // 2
            if strips:
                lo, hi = lo + p, hi - p
            else:
                lo, hi = 0, size.conv_h
            a, b = (core[0], core[1]) if strips else (0, size.conv_h)
            if self._is_block(step):
                pad_h, end = 0 if strips else p, i == segment[-1]
                maps = self._block(i, maps, (lo, hi), (a, b), pad_h, out if end else None)
                continue
            maps = self._convolve(i, maps, lo, 0 if strips else p)
            z, dz = maps[0][0], None if self.plain else maps[-1][-1]
            if strips and i != segment[-1]:
                for t in maps:
                    zero_outside(t.flatten(0, 1), lo, size.conv_h)
            inner = slice(max(lo, 0) - lo, min(hi, size.conv_h) - lo)
            image_rows = slice(max(lo, 0), min(hi, size.conv_h))
            if step.conv != step.relu:  # a stride-2 layer's output is its ReLU's
                self._tap(step.conv, z, dz, a - lo, b - lo, a, b)
            needs_relu = step.relu and (not step.pool or step.relu in plan.taps)
            if needs_relu:
                mask = self._saved_rows(f"mask.{step.relu}")
                self._relu(
                    z[:, inner],
                    None if dz is None else dz[:, inner],
                    None if mask is None or step.pool_kind == "avg" else mask[:, image_rows],
                )
                self._tap(step.relu, z, dz, a - lo, b - lo, a, b)
            if step.pool:
                a2, b2 = a // 2, min(-(-b // 2), size.out_h)
                self._pool(step, z, dz, a2, b2, (a, b), out)
            elif out is not None and i == segment[-1]:
                out[0][:, a:b] = z[:, a - lo : b - lo]
                if dz is not None:
                    out[1][:, a:b] = dz[:, a - lo : b - lo]

    def _convolve(self, i: int, maps: list[Tensor], lo: int, pad_h: int) -> list[Tensor]:
        """z' and δz of (y', δ), stacked as these are; with the look-up where `maps` is u alone."""
        bias = self.packs.get(f"b.{self.plan.steps[i].conv}")
        out = []
        for j, m in enumerate(maps):
            out.append(self.convolutions.conv(i, m, j == 0, pad_h, lo))
        if sum(m.shape[0] for m in maps) == 1 and not self.plain:
            out.insert(0, torch.empty_like(out[0]))
            self._look_up(out[0][0], out[1][0], lo)
        if bias is not None:
            out[0][0] += bias
        return out

    def _is_block(self, step: Step) -> bool:
        """Whether one kernel does the step: nothing but its output is looked at."""
        if not self.blocks or not step.relu:
            return False
        inner = {step.conv} - {step.relu} | ({step.relu} if step.pool else set())
        return not inner & set(self.plan.taps)

    def _block(
        self,
        i: int,
        maps: list[Tensor],
        rows: tuple[int, int],
        core: tuple[int, int],
        pad_h: int,
        out: Tensor | None,
    ) -> list[Tensor]:
        """The step's output from its input maps; rows of the convolution, and those of `out`."""
        plan, (lo, hi), (a, b), n = self.plan, rows, core, maps[0].shape[1]
        step, size = plan.steps[i], plan.sizes[i]
        width, channels, tap = size.conv_w, step.out_channels, step.pool or step.relu
        mask = self._saved_rows(f"mask.{step.relu}")
        code_row0 = 0
        if step.pool:
            a, b, width = a // 2, min(-(-b // 2), size.out_h), size.out_w
            code = self._saved_rows(f"code.{step.pool}", a, b)
            if step.pool_kind != "max":
                code = None if mask is None else mask[:, lo:hi]
            count = b - a
        else:
            code = None if mask is None else mask[:, max(lo, 0) : min(hi, size.conv_h)]
            code_row0, count = max(lo, 0) - lo, hi - lo
        listed = not self.plain and sum(m.shape[0] for m in maps) == 1
        diff = self.taps.get(f"diff.{tap}")
        y: Tensor | None
        if out is not None:
            y, d = out[0][:, a:b], out[-1][:, a:b]
        elif i + 1 == len(plan.steps) and diff is not None and not self.plain:
            # The last block leaves its difference alone.
            shape = (n, count, width, channels)
            y = maps[0].new_empty(shape) if tap in plan.spec.style_weights else None
            d = diff[:, a:b]
        else:
            made = maps[0].new_empty((1 if self.plain else 2, n, count, width, channels))
            y, d = made[0], made[-1]
        a_map, d_map = maps[0][0], None if self.plain or listed else maps[-1][-1]
        weight = self.packs[f"block.{step.conv}"]
        form = "listed" if listed else "plain" if d_map is None else "diff"
        partial = self.stages.conv_block_fwd(
            a_map,
            d=d_map,
            weight=weight,
            bias=self.packs.get(f"b.{step.conv}"),
            from_target=None if self.plain else self.from_target,
            target=self._listed() if listed else None,
            tile=tile_for(a_map, a_map.shape[-1], weight.shape[1], step.stride, form),
            kernel_size=step.kernel_size,
            stride=step.stride,
            relu=True,
            pool=POOLS[step.pool_kind],
            pad_h=pad_h,
            row0=lo,
            image_rows=size.conv_h,
            y=y,
            delta=None if self.plain else d,
            code=code,
            code_row0=code_row0,
            reduce=diff is not None and not self.plain and bool(step.pool),
        )
        if partial is not None:
            sums = partial.sum(dim=1, dtype=torch.float64)
            self.squares[tap] = self.squares.get(tap, 0) + sums
        i0 = 0 if step.pool or out is not None else a - lo
        self._tap(tap, y, None if self.plain else d, i0, i0 + b - a, a, b)
        return [m.unsqueeze(0) for m in ((y,) if self.plain else (y, d)) if m is not None]

    def _listed(self) -> Listed:
        taken, taken_row0 = self.taken
        values = self._of("topk_values")
        rest = self._of("topk_rest")
        assert taken is not None
        return Listed(
            table=self.packs["table"],
            taken=taken,
            taken_row0=taken_row0,
            valid=self._of("valid"),
            labels=self._of("labels"),
            interior=self.packs["interior"] if values is None else None,
            values=values,
            indices=self._of("topk_indices"),
            rest=rest,
            rest_table=None if rest is None else self.packs["rest_table"],
        )

    def _relu(self, z: Tensor, dz: Tensor | None, mask: Tensor | None) -> None:
        if dz is None:
            self.stages.relu_fwd(z, y=z, mask=mask)
        else:
            self.stages.relu_diff_fwd(
                z, dz=dz, from_target=self.from_target, y=z, delta=dz, mask=mask
            )

    def _pool(
        self,
        step: Step,
        z: Tensor,
        dz: Tensor | None,
        a: int,
        b: int,
        conv_rows: tuple[int, int],
        out: Tensor | None,
    ) -> None:
        kind = POOLS[step.pool_kind]
        if step.pool_kind == "max":
            code = self._saved_rows(f"code.{step.pool}")
            code = None if code is None else code[:, a:b]
        else:
            code = self._saved_rows(f"mask.{step.relu}")
            code = None if code is None else code[:, conv_rows[0] : conv_rows[1]]
        diff = self.taps.get(f"diff.{step.pool}")
        styled = step.pool in self.plan.spec.style_weights
        shape = (z.shape[0], z.shape[1] // 2, z.shape[2] // 2, z.shape[3])
        y: Tensor | None = None
        if out is not None:
            y, d = out[0][:, a:b], out[-1][:, a:b]
        else:
            if styled or dz is None:
                y = z.new_empty(shape, dtype=self.plan.dtype)
            d = z.new_empty(shape, dtype=self.plan.dtype) if diff is None else diff[:, a:b]
        if dz is None:
            self.stages.relu_pool_fwd(z, pool=kind, y=y, code=code)
            self._tap(step.pool, y, None, 0, b - a, a, b)
            return
        self.stages.relu_pool_diff_fwd(
            z, dz=dz, from_target=self.from_target, pool=kind, y=y, delta=d, code=code
        )
        if styled or (diff is not None and out is not None):
            self._tap(step.pool, y, d, 0, b - a, a, b)

    # (3) taps: diff_b, and for style the prediction's features and G' − G

    def _tap(
        self, tap: str, y: Tensor | None, d: Tensor | None, i0: int, i1: int, a: int, b: int
    ) -> None:
        """Rows [i0, i1) of the maps are rows [a, b) of the layer."""
        plan, chunk = self.plan, slice(self.n0, self.n1)
        if tap not in plan.taps:
            return
        diff = self.taps.get(f"diff.{tap}")
        if diff is not None:
            if d is None:
                assert y is not None
                target = self.target.get(f"feature.{tap}")
                diff[:, a:b] = y[:, i0:i1] if target is None else y[:, i0:i1] - target[chunk, a:b]
            elif diff[:, a:b].data_ptr() != d[:, i0:i1].data_ptr():
                diff[:, a:b] = d[:, i0:i1]
        if tap in plan.spec.style_weights:
            assert y is not None
            phi = y[:, i0:i1].float().flatten(1, 2)
            if d is not None:
                delta = d[:, i0:i1].float().flatten(1, 2)
                phi = phi + delta * self.from_target.view(-1, 1, 1)
            gram = self.saved[f"gram.{tap}"][chunk]
            if f"gram.{tap}" in self.target:
                gram += phi.transpose(1, 2) @ phi
            else:
                # G' − G = δᵀφ' + φᵀδ: the difference form again, no cancellation.
                gram += delta.transpose(1, 2) @ phi + (phi - delta).transpose(1, 2) @ delta
            if self.keep:
                n, width, channels = phi.shape[0], plan.tap_shape(tap)[2], phi.shape[2]
                kept = self.saved[f"phi.{tap}"]
                kept[chunk, a:b] = phi.view(n, b - a, width, channels).to(kept.dtype)

    def _reduce(self) -> None:
        plan, chunk = self.plan, slice(self.n0, self.n1)
        for tap, weight in plan.spec.feature_weights.items():
            _, h, w, c = plan.tap_shape(tap)
            sums = self.squares.get(tap)
            if sums is None:
                sums = self.stages.diff_reduce_fwd(self.taps[f"diff.{tap}"])
            self.terms[0, chunk] += sums * (weight / (c * h * w))
        for tap, weight in plan.spec.style_weights.items():
            _, h, w, c = plan.tap_shape(tap)
            gram = self.saved[f"gram.{tap}"][chunk]
            gram /= c * h * w
            other = self.target.get(f"gram.{tap}")
            if other is not None:
                gram -= other if other.shape[0] == 1 else other[chunk]
            self.terms[1, chunk] += weight * gram.double().square().sum(dim=(1, 2))

    def _tap_buffer(self, name: str, tap: str) -> Tensor:
        if self.keep:
            return self.saved[name][self.n0 : self.n1]
        shape = (self.n1 - self.n0, *self.plan.tap_shape(tap)[1:])
        return self.x.new_empty(shape, dtype=self.plan.dtype)

    def _of(self, name: str) -> Tensor | None:
        t = self.target.get(name)
        return None if t is None else t[self.n0 : self.n1]

    def _rows(self, name: str, a: int, b: int) -> Tensor | None:
        """Rows [a, b) of a target tensor (N, H, W) or (N, k, H, W)."""
        t = self._of(name)
        return None if t is None else t[..., a:b, :]

    def _saved_rows(self, name: str, a: int = 0, b: int | None = None) -> Tensor | None:
        t = self.saved.get(name)
        return None if t is None else t[self.n0 : self.n1, a:b]


def _float32(t: Tensor) -> Tensor:
    """`t` in float32, finite where it is: logits padded with float64's lowest are no −inf."""
    if t.dtype == torch.float64:
        limits = torch.finfo(torch.float32)
        t = t.clamp(limits.min, limits.max)
    return t.float()
