"""Stands for the stages of a walk and keeps what each launch has to do.

A launch is a stage, or an operator of ATen's that neither views nor allocates. Bytes are those of
each tensor once: halos, weights that leave the cache and rows that other programs read again come
on top.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpl_fast.stages import Listed
from gpl_fast.tiles import Tile

SMALL = "other operators (ATen)"
GRADIENT = "data gradient (ATen)"
CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten._convolution.default)
ALLOCATING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
VIEWS_BACKWARD = {"select_backward", "slice_backward", "diagonal_backward"}
HOST = {"scalar_tensor"}  # a number of Python's, which a kernel takes as an argument


@dataclass
class Launch:
    """One kernel's work.

    Attributes:
        images, rows, columns: of its grid: of a convolution that of what comes before the pool.
        c_in, c_out, maps: of a convolution; the classes are `c_in`.
        operator: which one, of those that are `SMALL`.
    """

    name: str
    flops: float
    bytes: float
    images: int = 1
    rows: int = 1
    columns: int = 1
    c_in: int = 1
    c_out: int = 1
    maps: int = 1
    tile: Tile | None = None
    operator: str = ""


def count_of(func: Any) -> int:
    """How many kernels an operator runs: what views, allocates or looks at values has none, a
    view's gradient is zeros and a copy."""
    packet = func.overloadpacket.__name__
    looks = func.namespace == "gpl_fast" and packet.startswith("check_")
    if func.is_view or looks or packet in ALLOCATING | HOST or packet == "_unsafe_view":
        return 0
    return 2 if packet in VIEWS_BACKWARD else 1


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stands for the stages, and sees ATen's operators: collects both."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in CONVOLUTIONS:
            x, w = args[:2]
            transposed = args[6]
            out = out.contiguous(memory_format=torch.channels_last)  # as cuDNN leaves it
            # Each weight meets each pixel of the side that is not spread.
            n, _, rows, columns = (x if transposed else out).shape
            name = GRADIENT if transposed else "convolution (ATen)"
            flops = 2.0 * n * rows * columns * w.numel()
            sizes = (n, rows, columns, out.shape[1], x.shape[1])
            self.launches.append(Launch(name, flops, _bytes((x, w, out)), *sizes))
        elif count := count_of(func):
            packet = func.overloadpacket.__name__
            fills = packet.startswith("new_") or packet.endswith("_like")
            # What gathers reads of its source as much as it writes, what fills nothing.
            flat = tree_leaves(out if fills or packet == "index" else (args, kwargs, out))
            once = {id(t): t for t in flat if isinstance(t, Tensor)}.values()
            moved = _bytes(once) * (2 if packet == "index" else 1)
            self.launches += [Launch(SMALL, 0.0, moved / count, operator=packet)] * count
        return out

    def __getattr__(self, name: str) -> Callable[..., None]:
        """A stage without arithmetic worth counting, on tensors of the rows that it touches."""
        if name.startswith("_") or not name.endswith(("_fwd", "_bwd")):
            raise AttributeError(name)
        return lambda first, **rest: self.launches.append(
            Launch(name, 0.0, _bytes((first, *rest.values())), len(first))
        )

    def carry_target_fwd(self, x: Tensor, *, step: tuple[int, int], **rest: Any) -> None:
        """As `gpl_fast.stages`: pixels of a grid, and what decides."""
        moved = _bytes((x, *rest.values())) / (step[0] * step[1])
        self.launches += [Launch("carry_target_fwd", 0.0, moved)] * 2

    def softmax_pack_fwd(self, x: Tensor, *, rows: int, target: Tensor | None, **rest: Any) -> None:
        """As `gpl_fast.stages`."""
        n, c, _, width = x.shape
        moved = _bytes((x, target, *rest.values()))
        maps = 1 if target is None else 2
        self.launches.append(Launch("softmax_pack_fwd", 0.0, moved, n, rows, width, c, maps=maps))

    def conv_block_fwd(
        self, a: Tensor, *, weight: Tensor, d: Tensor | None, target: Listed | None, **rest: Any
    ) -> Tensor | None:
        """As `gpl_fast.stages`."""
        n, height, width, _ = a.shape
        k, stride = rest["kernel_size"], rest["stride"]
        rows = (height + 2 * rest["pad_h"] - k) // stride + 1
        columns = (width + 2 * (k // 2) - k) // stride + 1
        branches = 1 if d is None else 2
        flops = 2.0 * branches * n * rows * columns * weight.numel()
        moved: float = _bytes((a, d, weight, *rest.values()))
        if target is not None:
            whole = (target.labels, target.values, target.indices, target.rest, target.valid)
            image_rows = next(t.shape[-2] for t in whole if t is not None)
            moved += _bytes((target.table, target.taken, target.interior, target.rest_table))
            moved += _bytes(whole) * min(1.0, height / image_rows)
        sizes = (n, rows, columns, a.shape[3], weight.shape[1], branches)
        self.launches.append(Launch("conv_block_fwd", flops, moved, *sizes, rest["tile"]))
        return a.new_empty((n, 1), dtype=torch.float32) if rest["reduce"] else None

    def relu_pool_bwd(
        self, dy: Tensor, *, code: Tensor, height: int, dz: Tensor, **_rest: int
    ) -> None:
        """As `gpl_fast.stages`: rows of whole maps."""
        moved = _bytes((dy, code)) * min(1.0, dz.shape[1] / height) + _bytes((dz,))
        self.launches.append(Launch("relu_pool_bwd", 0.0, moved, len(dy)))

    def softmax_bwd(self, x: Tensor, *, dy: Tensor, **rest: Any) -> None:
        """As `gpl_fast.stages`: rows of whole planes."""
        (n, c, height, width), rows = x.shape, dy.shape[1]
        moved = _bytes((x, *rest.values())) * min(1.0, rows / height) + _bytes((dy,))
        self.launches.append(Launch("softmax_bwd", 0.0, moved, n, rows, width, c))

    def conv_block_bwd(
        self, dy: Tensor, *, w: Tensor, dx: Tensor, stride: int, **rest: Any
    ) -> None:
        """As `gpl_fast.stages`."""
        moved = _bytes((dy, w, dx, *rest.values()))
        n, rows, columns, _ = dx.shape
        self._fused("conv_block_bwd", dy, w, stride, (n, rows, columns), moved)

    def conv_block_logits_bwd(
        self, dy: Tensor, *, w: Tensor, stride: int, rows: int, x: Tensor, dx: Tensor, **rest: Any
    ) -> None:
        """As `gpl_fast.stages`: rows of whole planes."""
        n, _, height, columns = dx.shape
        moved = _bytes((dy, w)) + _bytes((x, dx, *rest.values())) * min(1.0, rows / height)
        self._fused("conv_block_logits_bwd", dy, w, stride, (n, rows, columns), moved)

    def _fused(
        self, name: str, dy: Tensor, w: Tensor, stride: int, grid: tuple[int, int, int],
        moved: float,
    ) -> None:  # fmt: skip
        (n, rows, columns), (taps, _, c_in), c_out = grid, w.shape, dy.shape[3]
        flops = 2.0 * n * rows * columns / stride**2 * taps * c_in * c_out
        self.launches.append(Launch(name, flops, moved, *grid, c_in, c_out))


def _bytes(arguments: Iterable[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in arguments if isinstance(t, Tensor))
