"""ReLU and 2 x 2 pooling with 4-bit codes, or 1-bit masks for an average, there and back.

Twin of ``csrc/cpu/relu_pool.cpp``: the same arguments, the same meaning.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gpl_fast.kernels.branches import load, max_window, pack_bits, pack_nibbles, relu_branches
from gpl_fast.kernels.launch import POOL_NAMES, blocks_of_maps, cdiv, image_strides, launch


@triton.jit(do_not_specialize_on_alignment=["from_target_ptr"])
def _relu_pool_fwd_kernel(
    z_ptr, dz_ptr,  # (N, H, W, C)
    from_target_ptr,  # (N,)
    y_ptr, delta_ptr,  # (N, H // 2, W // 2, C)
    code_ptr,  # max: (N, H // 2, W // 2, ⌈C/2⌉), average: (N, H, W, ⌈C/8⌉)
    H, W, C, z_n, dz_n, y_n, delta_n, code_n,
    POOL: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_W windows of one row of windows; an odd last row and column have masks only."""
    HAS_DIFF: tl.constexpr = dz_ptr is not None
    tiles = tl.cdiv(tl.cdiv(W, 2), BLOCK_W)
    i, j0 = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * BLOCK_W
    c0 = tl.program_id(1) * BLOCK_C
    n = tl.program_id(2).to(tl.int64)
    j, c = j0 + tl.arange(0, BLOCK_W), c0 + tl.arange(0, BLOCK_C)
    window = (j[None, :] < W // 2) & (c[:, None] < C) & (i < H // 2)
    from_target = tl.zeros((BLOCK_C, BLOCK_W), tl.int1)
    z_ptr += n * z_n
    if HAS_DIFF:
        from_target = from_target | (tl.load(from_target_ptr + n) != 0)
        dz_ptr += n * dz_n
    first = (2 * i * W + 2 * j[None, :]).to(tl.int64) * C + c[:, None]
    below = ((2 * i + 1) * W + 2 * j[None, :]).to(tl.int64) * C + c[:, None]
    y = tl.zeros((BLOCK_C, BLOCK_W), tl.float32)
    delta = y
    if POOL == "max":
        z0, z1 = load(z_ptr, first, window), load(z_ptr, first + C, window)
        z2, z3 = load(z_ptr, below, window), load(z_ptr, below + C, window)
        d0, d1, d2, d3 = z0, z1, z2, z3
        if HAS_DIFF:
            d0, d1 = load(dz_ptr, first, window), load(dz_ptr, first + C, window)
            d2, d3 = load(dz_ptr, below, window), load(dz_ptr, below + C, window)
        y, delta, code = max_window(z0, z1, z2, z3, d0, d1, d2, d3, from_target, HAS_DIFF)
        if code_ptr is not None:
            width = tl.cdiv(C, 2)
            byte = c0 // 2 + tl.arange(0, BLOCK_C // 2)
            packed = pack_nibbles(tl.where(c[:, None] < C, code, 0), BLOCK_C, BLOCK_W)
            at = (i * (W // 2) + j[None, :]).to(tl.int64) * width + byte[:, None]
            stored = (j[None, :] < W // 2) & (byte[:, None] < width) & (i < H // 2)
            tl.store(code_ptr + n * code_n + at, packed, mask=stored)
    else:
        width = tl.cdiv(C, 8)
        byte = c0 // 8 + tl.arange(0, BLOCK_C // 8)
        for p in tl.static_range(4):
            row, column = 2 * i + p // 2, 2 * j + p % 2
            inside = (column[None, :] < W) & (c[:, None] < C) & (row < H)
            at = (row * W + column[None, :]).to(tl.int64)
            z = load(z_ptr, at * C + c[:, None], inside)
            dz = z
            if HAS_DIFF:
                dz = load(dz_ptr, at * C + c[:, None], inside)
            yp, dp, prediction = relu_branches(z, dz, from_target, HAS_DIFF)
            y += yp
            delta += dp
            if code_ptr is not None:
                packed = pack_bits(inside & ~(prediction <= 0), BLOCK_C, BLOCK_W)
                stored = (column[None, :] < W) & (byte[:, None] < width) & (row < H)
                tl.store(code_ptr + n * code_n + at * width + byte[:, None], packed, mask=stored)
        y *= 0.25
        delta *= 0.25
    out = (i * (W // 2) + j[None, :]).to(tl.int64) * C + c[:, None]
    if y_ptr is not None:
        tl.store(y_ptr + n * y_n + out, y.to(y_ptr.dtype.element_ty), mask=window)
    if HAS_DIFF:
        tl.store(delta_ptr + n * delta_n + out, delta.to(delta_ptr.dtype.element_ty), mask=window)


@triton.jit(do_not_specialize=["row0", "rows"])
def _relu_pool_bwd_kernel(
    dy_ptr, code_ptr, dz_ptr,  # (N, H // 2, W // 2, C), as the forward's, (N, rows, W, C)
    H, W, C, row0, rows, dy_n, code_n, dz_n,
    POOL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_P pixels of full resolution; zeros where no window reaches.                    (3)"""
    n = tl.program_id(2).to(tl.int64)
    p = (tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P))[None, :]
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[:, None]
    h, w = row0 + p // W, p % W
    in_map = (p < rows * W) & (c < C)
    inside = in_map & (h >= 0) & (h < H // 2 * 2) & (w < W // 2 * 2)
    pooled = (h // 2 * (W // 2) + w // 2).to(tl.int64)
    dy = load(dy_ptr + n * dy_n, pooled * C + c, inside)
    if POOL == "max":
        byte = pooled * tl.cdiv(C, 2) + c // 2
        code = tl.load(code_ptr + n * code_n + byte, mask=inside, other=68).to(tl.int32)
        won = ((code >> (c % 2 * 4)) & 15) == h % 2 * 2 + w % 2
    else:
        byte = (h * W + w).to(tl.int64) * tl.cdiv(C, 8) + c // 8
        mask = tl.load(code_ptr + n * code_n + byte, mask=inside, other=0).to(tl.int32)
        won = ((mask >> (c % 8)) & 1) != 0
        dy *= 0.25
    out = p.to(tl.int64) * C + c
    dz = tl.where(won & inside, dy, 0.0)
    tl.store(dz_ptr + n * dz_n + out, dz.to(dz_ptr.dtype.element_ty), mask=in_map)


def relu_pool_fwd(z: Tensor, *, pool: int, y: Tensor, code: Tensor | None = None) -> None:
    """`gpl_fast.stages.Stages.relu_pool_fwd`."""
    _launch(z, None, None, POOL_NAMES[pool], None, y, code)


def relu_pool_diff_fwd(
    z: Tensor, *, dz: Tensor, from_target: Tensor, pool: int, delta: Tensor,
    y: Tensor | None = None, code: Tensor | None = None,
) -> None:  # fmt: skip
    """`gpl_fast.stages.Stages.relu_pool_diff_fwd`."""
    _launch(z, dz, from_target, POOL_NAMES[pool], delta, y, code)


def _launch(
    z: Tensor, dz: Tensor | None, from_target: Tensor | None, pool: str, delta: Tensor | None,
    y: Tensor | None, code: Tensor | None,
) -> None:  # fmt: skip
    n, h, w, c = z.shape
    rows, columns = (h // 2, w // 2) if pool == "max" else (cdiv(h, 2), cdiv(w, 2))
    if n * rows * columns * c == 0:
        return
    block_w, block_c = blocks_of_maps(c)
    block_w = min(max(block_w // 2, 1), triton.next_power_of_2(columns))
    tiles = cdiv(cdiv(w, 2), block_w)
    launch(
        _relu_pool_fwd_kernel,
        (rows * tiles, cdiv(c, block_c), n),
        z, dz, from_target, y, delta, code,
        h, w, c, *image_strides(z, dz, y, delta, code), POOL=pool,
        BLOCK_W=block_w, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip


def relu_pool_bwd(
    dy: Tensor, *, code: Tensor, pool: int, height: int, width: int, row0: int, dz: Tensor
) -> None:
    """`gpl_fast.stages.BackwardStages.relu_pool_bwd`."""
    n, rows, _, c = dz.shape
    if dz.numel() == 0:
        return
    block_p, block_c = blocks_of_maps(c)
    launch(
        _relu_pool_bwd_kernel,
        (cdiv(rows * width, block_p), cdiv(c, block_c), n),
        dy, code, dz, height, width, c, row0, rows, *image_strides(dy, code, dz),
        POOL=POOL_NAMES[pool], BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
