"""ReLU with 1-bit masks, and 2 x 2 pooling with 4-bit codes, there and back.

Twin of ``csrc/cpu/relu.cpp`` and ``relu_pool.cpp``: the same arguments, the same meaning.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gpl_fast.kernels.branches import max_window, pack_bits, pack_nibbles, relu_branches
from gpl_fast.kernels.launch import MAX, cdiv, image_strides, launch


@triton.jit
def _load(ptr, at, inside):
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize_on_alignment=["from_target_ptr"])
def _relu_fwd_kernel(
    z_ptr, dz_ptr, from_target_ptr, y_ptr, delta_ptr, mask_ptr,  # (pixels, C), mask (pixels, ⌈C/8⌉)
    pixels, image_pixels, C,
    HAS_DIFF: tl.constexpr, HAS_Y: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    px = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (px[:, None] < pixels) & (c[None, :] < C)
    at = px[:, None] * C + c[None, :]
    z = _load(z_ptr, at, inside)
    dz, from_target = z, z > z
    if HAS_DIFF:
        dz = _load(dz_ptr, at, inside)
        carried = tl.load(from_target_ptr + px // image_pixels, mask=px < pixels, other=0)
        from_target = (carried != 0)[:, None]
    y, delta, prediction = relu_branches(z, dz, from_target, HAS_DIFF)
    if HAS_Y:
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    if HAS_DIFF:
        tl.store(delta_ptr + at, delta.to(delta_ptr.dtype.element_ty), mask=inside)
    if HAS_MASK:
        width = tl.cdiv(C, 8)
        byte = tl.program_id(1) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
        on = inside & ~(prediction <= 0)
        tl.store(mask_ptr + px[:, None] * width + byte[None, :], pack_bits(on, BLOCK_P, BLOCK_C),
                 mask=(px[:, None] < pixels) & (byte[None, :] < width))  # fmt: skip


@triton.jit
def _relu_bwd_kernel(dy_ptr, mask_ptr, dz_ptr, pixels, C, BLOCK_P: tl.constexpr,
                     BLOCK_C: tl.constexpr):  # fmt: skip
    px = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (px[:, None] < pixels) & (c[None, :] < C)
    at = px[:, None] * C + c[None, :]
    byte = px[:, None] * tl.cdiv(C, 8) + c[None, :] // 8
    on = (tl.load(mask_ptr + byte, mask=inside, other=0).to(tl.int32) >> (c[None, :] % 8)) & 1
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0)
    tl.store(dz_ptr + at, tl.where(on != 0, dy, 0.0).to(dz_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["from_target_ptr"])
def _relu_pool_fwd_kernel(
    z_ptr, dz_ptr,  # (N, H, W, C)
    from_target_ptr,  # (N,)
    y_ptr, delta_ptr,  # (N, H // 2, W // 2, C)
    code_ptr,  # max: (N, H // 2, W // 2, ⌈C/2⌉), average: (N, H, W, ⌈C/8⌉)
    H, W, C, z_n, dz_n, y_n, delta_n, code_n,
    POOL: tl.constexpr, HAS_DIFF: tl.constexpr, HAS_Y: tl.constexpr, HAS_CODE: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_W windows of one row of windows; an odd last row and column have masks only."""
    tiles = tl.cdiv(tl.cdiv(W, 2), BLOCK_W)
    i, j0 = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * BLOCK_W
    c0 = tl.program_id(1) * BLOCK_C
    n = tl.program_id(2).to(tl.int64)
    j, c = j0 + tl.arange(0, BLOCK_W), c0 + tl.arange(0, BLOCK_C)
    window = (j[:, None] < W // 2) & (c[None, :] < C) & (i < H // 2)
    from_target = tl.zeros((BLOCK_W, BLOCK_C), tl.int1)
    if HAS_DIFF:
        from_target = from_target | (tl.load(from_target_ptr + n) != 0)
    z_ptr += n * z_n
    dz_ptr += n * dz_n
    first = (2 * i * W + 2 * j[:, None]).to(tl.int64) * C + c[None, :]
    below = ((2 * i + 1) * W + 2 * j[:, None]).to(tl.int64) * C + c[None, :]
    y = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    delta = y
    if POOL == 0:
        z0, z1 = _load(z_ptr, first, window), _load(z_ptr, first + C, window)
        z2, z3 = _load(z_ptr, below, window), _load(z_ptr, below + C, window)
        d0, d1, d2, d3 = z0, z1, z2, z3
        if HAS_DIFF:
            d0, d1 = _load(dz_ptr, first, window), _load(dz_ptr, first + C, window)
            d2, d3 = _load(dz_ptr, below, window), _load(dz_ptr, below + C, window)
        y, delta, code = max_window(z0, z1, z2, z3, d0, d1, d2, d3, from_target, HAS_DIFF)
        if HAS_CODE:
            width = tl.cdiv(C, 2)
            byte = c0 // 2 + tl.arange(0, BLOCK_C // 2)
            packed = pack_nibbles(tl.where(c[None, :] < C, code, 0), BLOCK_W, BLOCK_C)
            at = (i * (W // 2) + j[:, None]).to(tl.int64) * width + byte[None, :]
            stored = (j[:, None] < W // 2) & (byte[None, :] < width) & (i < H // 2)
            tl.store(code_ptr + n * code_n + at, packed, mask=stored)
    else:
        width = tl.cdiv(C, 8)
        byte = c0 // 8 + tl.arange(0, BLOCK_C // 8)
        for p in tl.static_range(4):
            row, column = 2 * i + p // 2, 2 * j + p % 2
            inside = (column[:, None] < W) & (c[None, :] < C) & (row < H)
            at = (row * W + column[:, None]).to(tl.int64)
            z = _load(z_ptr, at * C + c[None, :], inside)
            dz = z
            if HAS_DIFF:
                dz = _load(dz_ptr, at * C + c[None, :], inside)
            yp, dp, prediction = relu_branches(z, dz, from_target, HAS_DIFF)
            y += yp
            delta += dp
            if HAS_CODE:
                packed = pack_bits(inside & ~(prediction <= 0), BLOCK_W, BLOCK_C)
                stored = (column[:, None] < W) & (byte[None, :] < width) & (row < H)
                tl.store(code_ptr + n * code_n + at * width + byte[None, :], packed, mask=stored)
        y *= 0.25
        delta *= 0.25
    out = (i * (W // 2) + j[:, None]).to(tl.int64) * C + c[None, :]
    if HAS_Y:
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
    p = (tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    h, w = row0 + p // W, p % W
    in_map = (p < rows * W) & (c[None, :] < C)
    inside = in_map & (h >= 0) & (h < H // 2 * 2) & (w < W // 2 * 2)
    pooled = (h // 2 * (W // 2) + w // 2).to(tl.int64)
    dy = _load(dy_ptr + n * dy_n, pooled * C + c[None, :], inside)
    if POOL == 0:
        byte = pooled * tl.cdiv(C, 2) + c[None, :] // 2
        code = tl.load(code_ptr + n * code_n + byte, mask=inside, other=68).to(tl.int32)
        won = ((code >> (c[None, :] % 2 * 4)) & 15) == h % 2 * 2 + w % 2
    else:
        byte = (h * W + w).to(tl.int64) * tl.cdiv(C, 8) + c[None, :] // 8
        mask = tl.load(code_ptr + n * code_n + byte, mask=inside, other=0).to(tl.int32)
        won = ((mask >> (c[None, :] % 8)) & 1) != 0
        dy *= 0.25
    out = p.to(tl.int64) * C + c[None, :]
    dz = tl.where(won & inside, dy, 0.0)
    tl.store(dz_ptr + n * dz_n + out, dz.to(dz_ptr.dtype.element_ty), mask=in_map)


def _blocks(channels: int) -> tuple[int, int]:
    """Pixels and channels of a program: about 4096 elements, whole bytes of masks."""
    block_c = min(max(triton.next_power_of_2(channels), 8), 128)
    return max(2048 // block_c, 1), block_c


def relu_fwd(z: Tensor, y: Tensor, mask: Tensor | None) -> None:
    """As the operator of this name in ``csrc/ops.cpp``, like all launchers here."""
    _relu(z, None, None, y, None, mask)


def relu_diff_fwd(
    z: Tensor, dz: Tensor, from_target: Tensor, y: Tensor | None, delta: Tensor, mask: Tensor | None
) -> None:
    _relu(z, dz, from_target, y, delta, mask)


def _relu(
    z: Tensor,
    dz: Tensor | None,
    from_target: Tensor | None,
    y: Tensor | None,
    delta: Tensor | None,
    mask: Tensor | None,
) -> None:
    n, h, w, c = z.shape
    if z.numel() == 0:
        return
    block_p, block_c = _blocks(c)
    launch(
        _relu_fwd_kernel,
        (cdiv(n * h * w, block_p), cdiv(c, block_c)),
        z,
        *(z if t is None else t for t in (dz, from_target, y, delta, mask)),
        n * h * w, h * w, c,
        HAS_DIFF=dz is not None, HAS_Y=y is not None, HAS_MASK=mask is not None,
        BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip


def relu_bwd(dy: Tensor, mask: Tensor, dz: Tensor) -> None:
    n, h, w, c = dy.shape
    if dy.numel() == 0:
        return
    block_p, block_c = _blocks(c)
    launch(
        _relu_bwd_kernel, (cdiv(n * h * w, block_p), cdiv(c, block_c)), dy, mask, dz, n * h * w, c,
        BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip


def relu_pool_fwd(z: Tensor, pool: int, y: Tensor, code: Tensor | None) -> None:
    _relu_pool(z, None, None, pool, y, None, code)


def relu_pool_diff_fwd(
    z: Tensor,
    dz: Tensor,
    from_target: Tensor,
    pool: int,
    y: Tensor | None,
    delta: Tensor,
    code: Tensor | None,
) -> None:
    _relu_pool(z, dz, from_target, pool, y, delta, code)


def _relu_pool(
    z: Tensor,
    dz: Tensor | None,
    from_target: Tensor | None,
    pool: int,
    y: Tensor | None,
    delta: Tensor | None,
    code: Tensor | None,
) -> None:
    n, h, w, c = z.shape
    rows, columns = (h // 2, w // 2) if pool == MAX else (cdiv(h, 2), cdiv(w, 2))
    if n * rows * columns * c == 0:
        return
    block_w, block_c = _blocks(c)
    block_w = min(max(block_w // 2, 1), triton.next_power_of_2(columns))
    tiles = cdiv(cdiv(w, 2), block_w)
    launch(
        _relu_pool_fwd_kernel,
        (rows * tiles, cdiv(c, block_c), n),
        z,
        *(z if t is None else t for t in (dz, from_target, y, delta, code)),
        h, w, c, *image_strides(z, dz, y, delta, code),
        POOL=pool, HAS_DIFF=dz is not None, HAS_Y=y is not None, HAS_CODE=code is not None,
        BLOCK_W=block_w, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip


def relu_pool_bwd(
    dy: Tensor, code: Tensor, pool: int, height: int, width: int, row0: int, dz: Tensor
) -> None:
    n, rows, _, c = dz.shape
    if dz.numel() == 0:
        return
    block_p, block_c = _blocks(c)
    launch(
        _relu_pool_bwd_kernel,
        (cdiv(rows * width, block_p), cdiv(c, block_c), n),
        dy, code, dz, height, width, c, row0, rows, *image_strides(dy, code, dz),
        POOL=pool, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
