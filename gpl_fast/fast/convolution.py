"""Convolutions and data gradients on NHWC maps.

On a CPU in the way that `Plan.how` says: csrc/cpu/winograd.cpp's, direct_conv.cpp's, or ATen's,
which get float32 copies where the arithmetic is float32; on a GPU ATen's. Results of our own stay
float32; data gradients have the dtype of `dz`. What decides signs and winners is computed by the
definition or by Winograd's tiles of 2 x 2 results, which leave zeros and ties as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpl_fast import ops
from gpl_fast.fast.chunk import Chunk, Maps
from gpl_fast.fast.policy import Way


class Convolutions:
    """Of a call's steps, NHWC -> NHWC."""

    def __init__(self, chunk: Chunk[Any]) -> None:
        self.chunk, self.plan, self.packs = chunk, chunk.plan, chunk.packs
        self._layer = ""  # whose weight is there

    def forward(self, i: int, maps: Maps, pad_h: int, row0: int) -> Maps:
        """z' and δz of step i, `pad_h` rows of zeros above and below; their first row is `row0`."""
        step, how = self.plan.steps[i], self.plan.how[i]
        k, both = step.kernel_size, not self.plan.call.plain
        there: tuple[Tensor, ...] = maps[:2]  # type: ignore[assignment]
        if maps.carried is None or maps.delta is None:
            there = maps[1:2] if maps.carried is None else maps[:1]  # type: ignore[assignment]
        if how.prediction.tile:
            n, rows, width, _ = there[0].shape
            one = (n, rows + 2 * pad_h - k + 1, width, step.out_channels)
            z = self.chunk.take(f"z{i % 2}", (1 + both, *one), torch.float32)
            # Of u alone the result belongs to δ.
            for j, m in enumerate(there, len(z) - len(there)):
                decisive = m is there[0]
                self._write(i, m, how.prediction if decisive else how.difference, pad_h, row0, z[j])
            return Maps(z[0], z[1] if both else None, z)
        w, pad = self.packs[f"w.{step.conv}"], (pad_h, k // 2)
        if maps.stack is not None:
            z = conv(maps.stack.flatten(0, 1), w, step.stride, pad)
            z = z.view(*maps.stack.shape[:2], *z.shape[1:])
            return Maps(z[0], z[1] if both else None, z)
        made = [conv(m, w, step.stride, pad) for m in there]
        if len(made) == 1 and both:
            return Maps(torch.empty_like(made[0]), made[0])
        return Maps(made[0], made[1] if both else None)

    def data_gradient(
        self, i: int, dz: Tensor, strips: bool, row0: int, out: Tensor | None
    ) -> Tensor:
        """Eq. (4) of step i; of `strips` without the rows that the next ones add to. Its first row
        is `row0`; our own kernels write to `out`."""
        step, size, way = self.plan.steps[i], self.plan.sizes[i], self.plan.how[i].gradient
        p, w = step.kernel_size // 2, self.packs[f"w.{step.conv}"]
        if way.tile:
            assert out is not None
            self._write(i, dz, way, 0 if strips else p, row0, out, transposed=True)
            return out
        extra = (0, 0)
        if step.stride == 2:
            full = (2 * (size.conv_h - 1) - 2 * p + step.kernel_size,
                    2 * (size.conv_w - 1) - 2 * p + step.kernel_size)  # fmt: skip
            extra = (size.h - full[0], size.w - full[1])
        pad = (2 * p if strips else p, p)
        return conv_transpose(dz, w, step.stride, pad, extra, self.plan.allow_tf32)

    def _write(
        self, i: int, maps: Tensor, way: Way, pad_h: int, row0: int, out: Tensor,
        transposed: bool = False,
    ) -> None:  # fmt: skip
        step = self.plan.steps[i]
        u = self._transformed(step.conv, way, transposed)
        if way.tile == 1:
            ops.direct_conv(maps, u, step.kernel_size, pad_h, out)
        else:
            ops.winograd(maps, u, way.tile, pad_h, row0, out)

    def _transformed(self, name: str, way: Way, transposed: bool) -> Tensor:
        """The weight of a convolution, or of its transpose, as its kernel reads it: a walk asks for
        one of the two. One layer's at a time, for all strips of its segment."""
        held = self.chunk.weights
        if self._layer != name:
            held.clear()  # before the next one is allocated
            self._layer = name
        if way not in held:
            w = self.packs[f"w.{name}"].permute(0, 2, 3, 1)
            c_in, c_out = (w.shape[0], w.shape[3]) if transposed else (w.shape[3], w.shape[0])
            u = w.new_empty(way.weight_elements(w.shape[1], c_in, c_out), dtype=way.dtype)
            if way.tile == 1:
                ops.direct_weight(w, transposed, u)
            else:
                ops.winograd_weight(w, way.tile, transposed, u)
            held[way] = u
        return held[way]


def conv(y: Tensor, w: Tensor, stride: int, pad: tuple[int, int]) -> Tensor:
    """NHWC -> NHWC in the dtype of `w`, `pad` = rows and columns of zeros on each side."""
    z = torch.conv2d(y.to(w.dtype).permute(0, 3, 1, 2), w, None, stride, pad)
    return z.permute(0, 2, 3, 1).contiguous()


def conv_transpose(
    dz: Tensor,
    w: Tensor,
    stride: int,
    pad: tuple[int, int],
    extra: Sequence[int],
    allow_tf32: bool,
) -> Tensor:
    """Eq. (4), NHWC -> NHWC in the dtype of `dz`, computed in that of `w`.

    What `torch.conv_transpose2d` calls, with `deterministic`: some of cuDNN's data gradients add in
    no fixed order, and ``torch.backends.cudnn.deterministic`` belongs to all threads.
    """
    wide, cudnn = dz.to(w.dtype).permute(0, 3, 1, 2), torch.backends.cudnn
    dy: Tensor = torch.ops.aten._convolution.default(
        wide, w, None, [stride, stride], list(pad), [1, 1], True, list(extra), 1,
        benchmark=cudnn.benchmark, deterministic=True, cudnn_enabled=cudnn.enabled,
        allow_tf32=allow_tf32,
    )  # fmt: skip
    return dy.to(dz.dtype).permute(0, 2, 3, 1).contiguous()
