"""(1) and (5): from logits to the network's input, and from its gradient to theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpl_fast import reference
from gpl_fast.fast import binary_ce
from gpl_fast.fast.chunk import Chunk, Maps, zero_outside
from gpl_fast.fast.convolution import conv, conv_transpose
from gpl_fast.fast.look_up import LookUp, listed_map
from gpl_fast.net.weights import padded_channels
from gpl_fast.stages import ACTIVATIONS, CudaStages, TritonStages

# What softmax_pack_fwd reads of a target, by the names of its arguments.
LISTS = ("elements", "labels", "topk_values", "topk_indices", "topk_rest")


class LogitsForward:
    """Prediction and target at the network's input, a strip of rows at a time."""

    def __init__(self, chunk: Chunk[TritonStages], look_up: LookUp) -> None:
        self.chunk, self.look_up = chunk, look_up

    def maps(
        self, lo: int, hi: int, core: tuple[int, int], carried: Tensor | None, ce: Tensor | None
    ) -> Maps:
        """Rows [lo, hi) of y' and δ.

        u is y' less the target at the pixels where that leaves less (`taken`): the look-up adds
        the target's rows to z' there and takes them from δz elsewhere.

        Args:
            core: the rows that are this strip's own.
            carried: (n,) bool, the images whose target is carried.
            ce: (n, H, 2) float64, for the sums of each row's cross-entropy.
        """
        chunk, plan, call = self.chunk, self.chunk.plan, self.chunk.plan.call
        a, b = max(lo, 0), min(hi, plan.h)  # the strip's rows inside the image
        x, target = self._source(a, b)
        images = x.shape[0]
        shape = (images, hi - lo, plan.w, padded_channels(call.chain.in_channels))
        maps = chunk.take("maps", (1 if target is None else 2, *shape))
        taken = chunk.take("taken", shape[:3], torch.uint8) if call.looked_up else None
        as_it_is = call.encode and call.kind != "dense"  # a list of classes holds probabilities
        planes = ("valid",) if call.binary else ("valid", "ce_labels", "ce_mask")
        chunk.stages.softmax_pack_fwd(
            x,
            activation=ACTIVATIONS["none" if as_it_is else call.activation],
            target_activation=ACTIVATIONS[call.target_activation],
            temperature=1.0 if as_it_is else call.temperature,
            label_smoothing=0.0 if call.binary else call.label_smoothing,
            row0=lo - a,
            rows=hi - lo,
            core0=core[0] - a,
            core_rows=core[1] - core[0],
            **chunk.rows_of((*planes, *(() if as_it_is else LISTS)), a, b),
            target=target,
            from_target=None if target is None else carried,
            class_weight=None if call.binary else chunk.target.get("class_weight"),
            y=maps[0],
            delta=None if target is None else maps[1],
            taken=taken,
            lse=chunk.saved_rows("lse", a, b),
            ce_lse=chunk.saved_rows("ce_lse", a, b),
            ce_rows=None if ce is None or call.binary else ce[:, a:b],
        )
        if ce is not None and call.binary:
            binary_ce.add_losses(chunk, core, ce)
        self.look_up.begin(taken, lo)
        if call.front:
            return self._front(maps, lo, hi)
        return Maps(None, maps[0]) if call.looked_up else Maps.of(maps)

    def _source(self, a: int, b: int) -> tuple[Tensor, Tensor | None]:
        """Rows [a, b) of the prediction and of a dense target; to encode a target it stands where
        the prediction is."""
        chunk, call = self.chunk, self.chunk.plan.call
        if call.encode and call.kind != "dense":
            return listed_map(chunk, a, b), None
        x = chunk.x[chunk.images, :, a:b]
        if call.encode or call.kind != "dense":
            return x, None
        return x, self._dense_rows(chunk.target["dense"][chunk.images], a, b)

    def _dense_rows(self, t: Tensor, a: int, b: int) -> Tensor:
        """Rows [a, b) of a dense target, resized bilinearly where it has another size."""
        plan = self.chunk.plan
        if not plan.call.resized:
            return t[:, :, a:b]
        n, c, _, width = t.shape
        out = self.chunk.take("target", (n, c, b - a, plan.w), torch.float32)
        valid = self.chunk.of("dense_valid")
        # Five rows of the source are made for one: the wider it is, the fewer channels at a time.
        step = max(1, 3 * c * plan.w // (5 * width + plan.w))
        for c0 in range(0, c, step):
            part = slice(c0, c0 + step)
            out[:, part] = self._resized_rows(t[:, part], a, b, valid)
        if valid is not None:  # of what is valid alone, as `reference.resize`
            weight = self._resized_rows(valid.unsqueeze(1), a, b, None)
            out /= torch.where(weight > 0, weight, 1)
        return out

    def _resized_rows(self, t: Tensor, a: int, b: int, valid: Tensor | None) -> Tensor:
        """Rows [a, b) of maps (n, c, h, w) resized bilinearly to H x W, float32; their pixels are
        `valid` (n, h, w), with a weight, or 0."""
        if tuple(t.shape[2:]) == (self.chunk.plan.h, self.chunk.plan.w):
            return _float32(t[:, :, a:b])
        h, height, width = t.shape[2], self.chunk.plan.h, self.chunk.plan.w
        source = (torch.arange(a, b, device=t.device, dtype=torch.float32) + 0.5) * (h / height)
        source = (source - 0.5).clamp(min=0)
        above = source.floor().long().clamp(max=h - 1)
        below = (above + 1).clamp(max=h - 1)
        part = (source - above).view(1, 1, -1, 1)

        def of_source(i: Tensor) -> Tensor:
            rows = t[:, :, i]
            if valid is None:
                return _float32(rows)
            here = valid[:, i]
            return reference.weighted(_float32(reference.zero_invalid(rows, here)), here)

        rows = of_source(above) * (1 - part)
        rows += of_source(below) * part
        return reference.resize(rows, (b - a, width))

    def _front(self, maps: Tensor, lo: int, hi: int) -> Maps:
        """Input adapter, mean/std and zeroing; weights of pixels are in the maps already."""
        chunk, call = self.chunk, self.chunk.plan.call
        flat = maps.flatten(0, 1)
        if call.chain.adapter:
            flat = conv(flat, chunk.packs["w.adapter"], 1, (0, 0))
        else:
            wide = chunk.plan.policy.weight_dtype(flat.dtype)
            flat = flat[..., : call.chain.in_channels].to(wide).contiguous()
        maps = flat.view(*maps.shape[:4], flat.shape[-1])
        if call.looked_up:
            maps = torch.stack([torch.empty_like(maps[0]), maps[0]])
            self.look_up.add(maps[0], maps[1], lo)
        affine = [self._affine(m, lo, hi, i == 0) for i, m in enumerate(maps)]
        return Maps.of(torch.stack(affine))

    def _affine(self, y: Tensor, lo: int, hi: int, shift: bool) -> Tensor:
        """``(y − m mean) / std`` (differences are not shifted), 0 where not valid or outside."""
        chunk, height = self.chunk, self.chunk.plan.h
        if chunk.plan.call.chain.mean is None:
            return y
        z, valid, mean = y.float(), chunk.of("valid"), chunk.packs["mean"]
        rows: Tensor | None = None  # the weight of each pixel
        if valid is not None:
            rows = torch.zeros((*z.shape[:3], 1), dtype=valid.dtype, device=z.device)
            a, b = max(lo, 0), min(hi, height)
            rows[:, a - lo : b - lo] = valid[:, a:b].unsqueeze(-1)
        if shift:
            z = z - (mean if rows is None or rows.dtype == torch.bool else rows * mean)
        z = (z / chunk.packs["std"]).to(y.dtype)
        if rows is not None:
            z = torch.where(reference.counted(rows), z, 0)
        zero_outside(z, lo, height)
        return z


class LogitsBackward:
    """The logits' gradient, with the cross-entropy's, into `dx` (N, C, H, W).

    Args:
        scale, ce_scale: (N,) float32, of the perceptual terms and of the cross-entropy.
    """

    def __init__(
        self, chunk: Chunk[CudaStages], scale: Tensor, ce_scale: Tensor, dx: Tensor
    ) -> None:
        self.chunk, self.scale, self.ce_scale, self.dx = chunk, scale, ce_scale, dx
        self.labels: Tensor | None = None

    def begin(self) -> None:
        """Take the labels of the chunk's images."""
        labels = self.chunk.of("ce_labels")
        self.labels = None if labels is None else labels.long()

    def from_maps(self, dy: Tensor, r0: int, r1: int) -> None:
        """Rows [r0, r1), from the gradient of the network's input."""
        if self.chunk.plan.call.front:
            dy = self._front(dy)
        x, arguments = self.arguments()
        self.chunk.stages.softmax_bwd(x, **arguments, dy=dy, row0=r0, rows=r1 - r0)
        self.add_binary_ce(r0, r1)

    def add_binary_ce(self, r0: int, r1: int) -> None:
        """What labels of elements add to rows [r0, r1), and clear."""
        call, here = self.chunk.plan.call, self.chunk.images
        if call.binary:
            scale = self.ce_scale[here].contiguous() if call.cross_entropy else None
            binary_ce.add_gradient(self.chunk, (r0, r1), self.dx[here], scale)

    def arguments(self) -> tuple[Tensor, dict[str, Any]]:
        """The logits, and what (5) and the cross-entropy read and write beside rows of dy."""
        chunk, call, here = self.chunk, self.chunk.plan.call, self.chunk.images
        ce = self.labels is not None
        return chunk.x[here], {
            "activation": ACTIVATIONS[call.activation],
            "temperature": call.temperature,
            "label_smoothing": call.label_smoothing if ce else 0.0,
            "dx": self.dx[here],
            "lse": chunk.saved_rows("lse"),
            "scale": self.scale[here].contiguous(),
            "valid": chunk.of("valid"),
            "ce_labels": self.labels,
            "ce_mask": chunk.of("ce_mask") if ce else None,
            "ce_lse": chunk.saved_rows("ce_lse"),
            "ce_scale": self.ce_scale[here] if ce else None,
            "class_weight": chunk.target.get("class_weight") if ce else None,
        }

    def _front(self, dy: Tensor) -> Tensor:
        chunk, chain = self.chunk, self.chunk.plan.call.chain
        if chain.std is not None:
            dy = (dy.float() / chunk.packs["std"]).to(dy.dtype)
        if chain.adapter:
            w, tf32 = chunk.packs["w.adapter"], chunk.plan.allow_tf32
            return conv_transpose(dy, w, 1, (0, 0), (0, 0), tf32)
        return dy.contiguous()


def empty_gradient(x: Tensor) -> Tensor:
    """Uninitialised memory for the gradient of `x`, in its memory format."""
    nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if nhwc else torch.contiguous_format
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _float32(t: Tensor) -> Tensor:
    """`t` in float32, finite where it is: logits padded with float64's lowest are no −inf."""
    if t.dtype == torch.float64:
        limits = torch.finfo(torch.float32)
        t = t.clamp(limits.min, limits.max)
    return t.float()
