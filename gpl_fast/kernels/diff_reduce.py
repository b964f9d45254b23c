"""Σ δ² of each image in a fixed order: a partial sum a block, then their sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpl_fast.kernels.launch import cdiv, launch

BLOCK = 8192


@triton.jit
def _diff_reduce_fwd_kernel(delta_ptr, partial_ptr, M, BLOCK: tl.constexpr):
    n, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(delta_ptr + n * M + at, mask=at < M, other=0.0).to(tl.float32)
    tl.store(partial_ptr + n * tl.num_programs(0) + block, tl.sum(d * d))


def diff_reduce_fwd(delta: Tensor) -> Tensor:
    """`gpl_fast.stages.Stages.diff_reduce_fwd`."""
    n = delta.shape[0]
    m = delta.numel() // n if n else 0
    if m == 0:
        return delta.new_zeros(n, dtype=torch.float64)
    partial = delta.new_empty((n, cdiv(m, BLOCK)), dtype=torch.float32)
    launch(
        _diff_reduce_fwd_kernel, (partial.shape[1], n), delta, partial, m, BLOCK=BLOCK, num_warps=4
    )
    return partial.sum(dim=1, dtype=torch.float64)
