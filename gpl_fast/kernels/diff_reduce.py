"""Σ δ² of each image, or another criterion's sum, in a fixed order: a partial sum a block, then
their sum. Twin of ``csrc/cpu/diff_reduce.cpp``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpl_fast.kernels.launch import CRITERION_NAMES, cdiv, launch

BLOCK = 8192
# Of a program that writes the seed too.
SEEDED_BLOCK = 4096


@triton.jit
def _diff_reduce_fwd_kernel(delta_ptr, partial_ptr, M, BLOCK: tl.constexpr):
    n, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(delta_ptr + n * M + at, mask=at < M, other=0.0).to(tl.float32)
    tl.store(partial_ptr + n * tl.num_programs(0) + block, tl.sum(d * d))


@triton.jit
def slope(d, CRITERION: tl.constexpr):
    """Half the derivative of d², or that of |d|: 0 at 0. Times d it is the criterion's value."""
    if CRITERION == "l1":
        d = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
    return d


@triton.jit
def _seeded_reduce_kernel(delta_ptr, weight_ptr, seed_ptr, partial_ptr, M, C,
                          CRITERION: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    n, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(delta_ptr + n * M + at, mask=at < M, other=0.0).to(tl.float32)
    s = slope(d, CRITERION)
    if weight_ptr is not None:
        s *= tl.load(weight_ptr + at % C, mask=at < M, other=0.0)
    if seed_ptr is not None:
        tl.store(seed_ptr + n * M + at, s.to(seed_ptr.dtype.element_ty), mask=at < M)
    tl.store(partial_ptr + n * tl.num_programs(0) + block, tl.sum(s * d))


def diff_reduce_fwd(
    delta: Tensor, *, criterion: int = 0, weight: Tensor | None = None, seed: Tensor | None = None
) -> Tensor:
    """`gpl_fast.tap_stages.TapStages.diff_reduce_fwd`."""
    n = delta.shape[0]
    m = delta.numel() // n if n else 0
    if m == 0:
        return delta.new_zeros(n, dtype=torch.float64)
    name = CRITERION_NAMES[criterion]
    plain = name == "l2" and weight is None and seed is None
    block = BLOCK if plain else SEEDED_BLOCK
    partial = delta.new_empty((n, cdiv(m, block)), dtype=torch.float32)
    grid = partial.shape[1], n
    if plain:
        launch(_diff_reduce_fwd_kernel, grid, delta, partial, m, BLOCK=block, num_warps=4)
    else:
        launch(
            _seeded_reduce_kernel, grid, delta, weight, seed, partial, m, delta.shape[-1],
            CRITERION=name, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return partial.sum(dim=1, dtype=torch.float64)
