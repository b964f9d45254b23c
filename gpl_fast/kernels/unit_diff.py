"""Features of two branches over their norms: the sum of what their difference costs, and its
gradient. Twin of ``csrc/cpu/unit_diff.cpp``.

A program has some pixels with all their channels, which it reads three times: for the norms, for
the sums over channels, for the seed. Tiles are (channels, pixels).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpl_fast.kernels.branches import load
from gpl_fast.kernels.diff_reduce import slope
from gpl_fast.kernels.launch import CRITERION_NAMES, blocks_of_maps, cdiv, image_strides, launch


@triton.jit
def _features(y_ptr, target_ptr, at, inside):
    """(the prediction's, the target's, their difference)."""
    p, t = load(y_ptr, at, inside), load(target_ptr, at, inside)
    return p, t, p - t


@triton.jit
def _over(root, eps):
    """1 / (root + eps), 0 where the root is."""
    return tl.where(root == 0, 0.0, 1.0 / tl.where(root == 0, 1.0, root + eps))


@triton.jit
def _seed_of(p, t, d, w, of_target, of_prediction, over_larger, CRITERION: tl.constexpr):
    """(weight times the slope at u, u), u = n(p) − n(t) = (d − n(t) (R' − R)) / (R' + eps) =
    (d − n(p) (R' − R)) / (R + eps): over the larger norm, so that nothing cancels."""
    u = (d - t * of_target[None, :] - p * of_prediction[None, :]) * over_larger[None, :]
    return w[:, None] * slope(u, CRITERION), u


@triton.jit
def _unit_diff_fwd_kernel(
    y_ptr, target_ptr, weight_ptr, seed_ptr, distances_ptr, partial_ptr,
    y_image, target_image, seed_image, distances_image,  # strides
    pixels, C, eps_inside, eps_outside,
    CRITERION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    px = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.arange(0, BLOCK_C)
    y_ptr += n * y_image
    target_ptr += n * target_image
    pp = tl.zeros((BLOCK_P,), tl.float32)
    tt = tl.zeros((BLOCK_P,), tl.float32)
    change = tl.zeros((BLOCK_P,), tl.float32)
    for c0 in range(0, C, BLOCK_C):
        inside = (px[None, :] < pixels) & (c0 + channel[:, None] < C)
        at = px[None, :] * C + c0 + channel[:, None]
        p, t, d = _features(y_ptr, target_ptr, at, inside)
        pp += tl.sum(p * p, axis=0)
        tt += tl.sum(t * t, axis=0)
        change += tl.sum(d * (p + t), axis=0)
    root, other = tl.sqrt_rn(pp + eps_inside), tl.sqrt_rn(tt + eps_inside)
    over, over_other = _over(root, eps_outside), _over(other, eps_outside)
    both = root + other
    moved = tl.where(both == 0, 0.0, change / tl.where(both == 0, 1.0, both))
    larger = root >= other
    of_target = tl.where(larger, over_other * moved, 0.0)
    of_prediction = tl.where(larger, 0.0, over * moved)
    over_larger = tl.where(larger, over, over_other)
    value = tl.zeros((BLOCK_P,), tl.float32)
    along = tl.zeros((BLOCK_P,), tl.float32)
    for c0 in range(0, C, BLOCK_C):
        inside = (px[None, :] < pixels) & (c0 + channel[:, None] < C)
        at = px[None, :] * C + c0 + channel[:, None]
        p, t, d = _features(y_ptr, target_ptr, at, inside)
        w = tl.full((BLOCK_C,), 1.0, tl.float32)
        if weight_ptr is not None:
            w = load(weight_ptr, c0 + channel, c0 + channel < C)
        s, u = _seed_of(p, t, d, w, of_target, of_prediction, over_larger, CRITERION)
        value += tl.sum(s * u, axis=0)
        along += tl.sum(s * p, axis=0)
    if seed_ptr is not None:
        seed_ptr += n * seed_image
        # What of s points along the prediction's features does not change them over their norm.
        share = along * over / tl.where(root == 0, 1.0, root)
        for c0 in range(0, C, BLOCK_C):
            inside = (px[None, :] < pixels) & (c0 + channel[:, None] < C)
            at = px[None, :] * C + c0 + channel[:, None]
            p, t, d = _features(y_ptr, target_ptr, at, inside)
            w = tl.full((BLOCK_C,), 1.0, tl.float32)
            if weight_ptr is not None:
                w = load(weight_ptr, c0 + channel, c0 + channel < C)
            s, u = _seed_of(p, t, d, w, of_target, of_prediction, over_larger, CRITERION)
            seed = (s - p * share[None, :]) * over[None, :]
            tl.store(seed_ptr + at, seed.to(seed_ptr.dtype.element_ty), mask=inside)
    if distances_ptr is not None:
        tl.store(distances_ptr + n * distances_image + px, value, mask=px < pixels)
    tl.store(partial_ptr + n * tl.num_programs(0) + tl.program_id(0), tl.sum(value))


def unit_diff_fwd(
    y: Tensor, *, target: Tensor, criterion: int, eps: float, eps_inside: bool,
    weight: Tensor | None = None, seed: Tensor | None = None, distances: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`gpl_fast.tap_stages.TapStages.unit_diff_fwd`."""
    n, h, w, c = y.shape
    if y.numel() == 0:
        return y.new_zeros(n, dtype=torch.float64)
    block_p, block_c = blocks_of_maps(c)
    partial = y.new_empty((n, cdiv(h * w, block_p)), dtype=torch.float32)
    launch(
        _unit_diff_fwd_kernel, (partial.shape[1], n), y, target, weight, seed, distances, partial,
        *image_strides(y, target, seed, distances), h * w, c,
        eps if eps_inside else 0.0, 0.0 if eps_inside else eps,
        CRITERION=CRITERION_NAMES[criterion], BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    return partial.sum(dim=1, dtype=torch.float64)
