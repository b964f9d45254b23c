"""Sums of rows from those of their tiles, in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gpl_fast.kernels.launch import launch


@triton.jit(do_not_specialize=["H", "row0", "tiles"])
def _row_sums_kernel(parts_ptr, sums_ptr, H, row0, tiles, BLOCK: tl.constexpr):
    """(N, H, tiles, 2) -> (N, H, 2) float64, of the rows from row0 on."""
    row = tl.program_id(1).to(tl.int64) * H + row0 + tl.program_id(0)
    t = tl.arange(0, BLOCK)[:, None]
    of = tl.arange(0, 2)
    parts = tl.load(parts_ptr + row * tiles * 2 + t * 2 + of[None, :], mask=t < tiles, other=0.0)
    tl.store(sums_ptr + row * 2 + of, tl.sum(parts, axis=0))


def row_sums(parts: Tensor, sums: Tensor, row0: int, rows: int) -> None:
    """(N, H, tiles, 2) -> (N, H, 2) float64, of the rows from row0 on."""
    n, height, tiles, _ = parts.shape
    launch(
        _row_sums_kernel,
        (rows, n),
        parts, sums, height, row0, tiles, BLOCK=triton.next_power_of_2(tiles),
    )  # fmt: skip
