"""ReLU with 1-bit masks, there and back.

Twin of ``csrc/cpu/relu.cpp``: the same arguments, the same meaning.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gpl_fast.kernels.branches import load, pack_bits, relu_branches
from gpl_fast.kernels.launch import blocks_of_maps, cdiv, launch


@triton.jit(do_not_specialize_on_alignment=["from_target_ptr"])
def _relu_fwd_kernel(
    z_ptr, dz_ptr, from_target_ptr, y_ptr, delta_ptr, mask_ptr,  # (pixels, C), mask (pixels, ⌈C/8⌉)
    pixels, image_pixels, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    HAS_DIFF: tl.constexpr = dz_ptr is not None
    px = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (px[None, :] < pixels) & (c[:, None] < C)
    at = px[None, :] * C + c[:, None]
    z = load(z_ptr, at, inside)
    dz, from_target = z, z > z
    if HAS_DIFF:
        dz = load(dz_ptr, at, inside)
        carried = tl.load(from_target_ptr + px // image_pixels, mask=px < pixels, other=0)
        from_target = (carried != 0)[None, :]
    y, delta, prediction = relu_branches(z, dz, from_target, HAS_DIFF)
    if y_ptr is not None:
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    if HAS_DIFF:
        tl.store(delta_ptr + at, delta.to(delta_ptr.dtype.element_ty), mask=inside)
    if mask_ptr is not None:
        width = tl.cdiv(C, 8)
        byte = tl.program_id(1) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
        on = inside & ~(prediction <= 0)
        tl.store(mask_ptr + px[None, :] * width + byte[:, None], pack_bits(on, BLOCK_C, BLOCK_P),
                 mask=(px[None, :] < pixels) & (byte[:, None] < width))  # fmt: skip


@triton.jit
def _relu_bwd_kernel(dy_ptr, mask_ptr, dz_ptr, pixels, C, BLOCK_P: tl.constexpr,
                     BLOCK_C: tl.constexpr):  # fmt: skip
    px = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (px[None, :] < pixels) & (c[:, None] < C)
    at = px[None, :] * C + c[:, None]
    byte = px[None, :] * tl.cdiv(C, 8) + c[:, None] // 8
    on = (tl.load(mask_ptr + byte, mask=inside, other=0).to(tl.int32) >> (c[:, None] % 8)) & 1
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0)
    tl.store(dz_ptr + at, tl.where(on != 0, dy, 0.0).to(dz_ptr.dtype.element_ty), mask=inside)


def relu_fwd(z: Tensor, *, y: Tensor, mask: Tensor | None = None) -> None:
    """`gpl_fast.stages.Stages.relu_fwd`."""
    _launch(z, None, None, None, y, mask)


def relu_diff_fwd(
    z: Tensor, *, dz: Tensor, from_target: Tensor, delta: Tensor, y: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:  # fmt: skip
    """`gpl_fast.stages.Stages.relu_diff_fwd`."""
    _launch(z, dz, from_target, delta, y, mask)


def _launch(
    z: Tensor, dz: Tensor | None, from_target: Tensor | None, delta: Tensor | None,
    y: Tensor | None, mask: Tensor | None,
) -> None:  # fmt: skip
    n, h, w, c = z.shape
    if z.numel() == 0:
        return
    block_p, block_c = blocks_of_maps(c)
    launch(
        _relu_fwd_kernel,
        (cdiv(n * h * w, block_p), cdiv(c, block_c)),
        z, dz, from_target, y, delta, mask, n * h * w, h * w, c,
        BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip


def relu_bwd(dy: Tensor, *, mask: Tensor, dz: Tensor) -> None:
    """`gpl_fast.stages.BackwardStages.relu_bwd`."""
    n, h, w, c = dy.shape
    if dy.numel() == 0:
        return
    block_p, block_c = blocks_of_maps(c)
    launch(
        _relu_bwd_kernel, (cdiv(n * h * w, block_p), cdiv(c, block_c)), dy, mask, dz, n * h * w, c,
        BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
