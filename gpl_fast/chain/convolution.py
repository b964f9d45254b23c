"""Convolutions and data gradients on NHWC maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gpl_fast import ops
from gpl_fast.chain.stages import has_blocks
from gpl_fast.plan import Plan, Role, Way, direct_elements, winograd_elements
from gpl_fast.precision import tf32_allowed


class Convolutions:
    """The convolutions of a plan's steps and their data gradients, NHWC -> NHWC.

    On a CPU in the way that `Plan.way` says: csrc/cpu/winograd.cpp's, direct_conv.cpp's, or ATen's,
    which get float32 copies where the arithmetic is float32; on a GPU ATen's. Results of our own
    stay float32; data gradients have the dtype of `dz`. What decides signs and winners is computed
    by the definition or by Winograd's tiles of 2 x 2 results, which leave zeros and ties as they
    are.
    """

    def __init__(self, plan: Plan, packs: Mapping[str, Tensor]) -> None:
        self.plan, self.packs = plan, packs
        self.on_cpu = not has_blocks(packs[f"w.{plan.steps[0].conv}"].device)
        # One layer's weight as the kernels read it, each way: strips come one after the other.
        self._layer = ""
        self._weights: dict[Way, Tensor] = {}

    def ours(self, i: int) -> bool:
        """Whether step i's are not ATen's, as they are where Triton's interpreter is the GPU."""
        return self.on_cpu and self.plan.way(i, "prediction").tile > 0

    def conv(self, i: int, maps: Tensor, decisive: bool, pad_h: int, row0: int) -> Tensor:
        """Step i's convolution of maps (count, N, rows, W, C_in), `pad_h` rows of zeros above and
        below; its first row is `row0`. The first map is `decisive`: signs and winners come of it.
        """
        step = self.plan.steps[i]
        k, (count, n, rows, width) = step.kernel_size, maps.shape[:4]
        if self.ours(i):
            shape = (count, n, rows + 2 * pad_h - k + 1, width, step.out_channels)
            z = maps.new_empty(shape, dtype=torch.float32)
            for j in range(count):
                role: Role = "prediction" if decisive and j == 0 else "difference"
                self._write(i, maps[j], role, pad_h, row0, z[j])
            return z
        w = self.packs[f"w.{step.conv}"]
        z = conv(maps.flatten(0, 1), w, step.stride, (pad_h, k // 2))
        return z.view(count, n, *z.shape[1:])

    def data_gradient(
        self, i: int, dz: Tensor, strips: bool, row0: int, out: Tensor | None = None
    ) -> Tensor:
        """Eq. (4) of step i; of `strips` without the rows that the next ones add to. Its first row
        is `row0`, and it may be in `out`."""
        step, size = self.plan.steps[i], self.plan.sizes[i]
        p, w = step.kernel_size // 2, self.packs[f"w.{step.conv}"]
        if self.ours(i):
            if out is None:
                rows = dz.shape[1] - 2 * p if strips else dz.shape[1]
                out = dz.new_empty((dz.shape[0], rows, dz.shape[2], w.shape[1]))
            self._write(i, dz, "gradient", 0 if strips else p, row0, out)
            return out
        extra = (0, 0)
        if step.stride == 2:
            full = (2 * (size.conv_h - 1) - 2 * p + step.kernel_size,
                    2 * (size.conv_w - 1) - 2 * p + step.kernel_size)  # fmt: skip
            extra = (size.h - full[0], size.w - full[1])
        return conv_transpose(dz, w, step.stride, (2 * p if strips else p, p), extra)

    def release(self) -> None:
        """Forget the layer: other layers, or other images, come next."""
        self._weights.clear()

    def _write(self, i: int, maps: Tensor, role: Role, pad_h: int, row0: int, out: Tensor) -> None:
        step, way = self.plan.steps[i], self.plan.way(i, role)
        u = self._transformed(step.conv, way, role == "gradient")
        if way.tile == 1:
            ops.direct_conv(maps, u, step.kernel_size, pad_h, out)
        else:
            ops.winograd(maps, u, way.tile, pad_h, row0, out)

    def _transformed(self, name: str, way: Way, transposed: bool) -> Tensor:
        """The weight of a convolution, or of its transpose, as its kernel reads it: a walk asks for
        one of the two."""
        if self._layer != name:
            self.release()  # before the next one is allocated
            self._layer = name
        if way not in self._weights:
            w = self.packs[f"w.{name}"].permute(0, 2, 3, 1)
            c_in, c_out = (w.shape[0], w.shape[3]) if transposed else (w.shape[3], w.shape[0])
            if way.tile == 1:
                u = w.new_empty(direct_elements(w.shape[1] ** 2, c_in, c_out), dtype=way.dtype)
                ops.direct_weight(w, transposed, u)
            else:
                u = w.new_empty(winograd_elements(way.tile, c_in, c_out), dtype=way.dtype)
                ops.winograd_weight(w, way.tile, transposed, u)
            self._weights[way] = u
        return self._weights[way]


def conv(y: Tensor, w: Tensor, stride: int, pad: tuple[int, int]) -> Tensor:
    """NHWC -> NHWC in the dtype of `w`, `pad` = rows and columns of zeros on each side."""
    z = torch.conv2d(y.to(w.dtype).permute(0, 3, 1, 2), w, None, stride, pad)
    return z.permute(0, 2, 3, 1).contiguous()


def conv_transpose(
    dz: Tensor, w: Tensor, stride: int, pad: tuple[int, int], extra: Sequence[int]
) -> Tensor:
    """Eq. (4), NHWC -> NHWC in the dtype of `dz`, computed in that of `w`.

    What `torch.conv_transpose2d` calls, with `deterministic`: some of cuDNN's data gradients add in
    no fixed order, and ``torch.backends.cudnn.deterministic`` belongs to all threads.
    """
    wide, cudnn = dz.to(w.dtype).permute(0, 3, 1, 2), torch.backends.cudnn
    dy: Tensor = torch.ops.aten._convolution.default(
        wide, w, None, [stride, stride], list(pad), [1, 1], True, list(extra), 1,
        benchmark=cudnn.benchmark, deterministic=True, cudnn_enabled=cudnn.enabled,
        allow_tf32=tf32_allowed(),
    )  # fmt: skip
    return dy.to(dz.dtype).permute(0, 2, 3, 1).contiguous()


def zero_outside(z: Tensor, lo: int, height: int) -> None:
    """Rows of `z`, whose first is row `lo` of an image of `height` rows, that lie outside of it."""
    if lo < 0:
        z[:, :-lo] = 0
    if lo + z.shape[1] > height:
        z[:, height - lo :] = 0
