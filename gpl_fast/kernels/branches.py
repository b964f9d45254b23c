"""The difference form on registers (eq. 6 of docs/math.md); twin of ``csrc/cpu/branches.h``.

z is the pre-activation of the branch that is carried (`from_target`: the target's), dz the
prediction's less the target's. Without HAS_DIFF z is alone, and what stands for dz is not used.
Tiles are (channels, pixels), as the tensor cores leave them (`conv_block`).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load(ptr, at, inside):
    """float32, 0 elsewhere."""
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def relu_of(z):
    """ReLU that lets NaN through."""
    return tl.where(z <= 0, 0.0, z)


@triton.jit
def relu_difference(r, z_other, dz_other, other, from_target):
    """relu(prediction) − relu(target), r the carried branch's; exactly dz where r is z.      (6)"""
    off = other <= 0
    if_target = tl.where(off, 0.0 - r, (z_other - r) + dz_other)
    if_prediction = tl.where(off, r, (r - z_other) + dz_other)
    return tl.where(from_target, if_target, if_prediction)


@triton.jit
def relu_branches(z, dz, from_target, HAS_DIFF: tl.constexpr):
    """(relu of the carried branch, difference of both, the prediction's z)."""
    y = relu_of(z)
    p = z
    d = y
    if HAS_DIFF:
        p = tl.where(from_target, z + dz, z)
        d = relu_difference(y, z, dz, tl.where(from_target, p, z - dz), from_target)
    return y, d, p


@triton.jit
def _first_of(value, best):
    """Where a later position wins over an earlier one: NaN wins, as in PyTorch."""
    return (value > best) | (value != value)


@triton.jit
def max_window(z0, z1, z2, z3, d0, d1, d2, d3, from_target, HAS_DIFF: tl.constexpr):
    """ReLU and max over the four positions of a window, row-major.

    Returns (y⁺ of the carried branch, δ⁺, the prediction's code 0..3, or 4 = none positive).
    """
    best = z0
    if HAS_DIFF:
        best = tl.where(from_target, z0 + d0, z0)
    other = tl.where(from_target, best, z0 - d0) if HAS_DIFF else z0
    carried = z0  # max of z itself
    z_other, d_other = z0, d0
    code = tl.zeros(z0.shape, tl.int32)
    for i in tl.static_range(1, 4):
        z = z1 if i == 1 else (z2 if i == 2 else z3)
        d = d1 if i == 1 else (d2 if i == 2 else d3)
        p = z
        if HAS_DIFF:
            p = tl.where(from_target, z + d, z)
            o = tl.where(from_target, p, z - d)
            other_wins = _first_of(o, other)
            other = tl.where(other_wins, o, other)
            z_other = tl.where(other_wins, z, z_other)
            d_other = tl.where(other_wins, d, d_other)
            carried = tl.where(_first_of(z, carried), z, carried)
        wins = _first_of(p, best)
        best = tl.where(wins, p, best)
        code = tl.where(wins, i, code)
    code = tl.where(best <= 0, 4, code)
    y = relu_of(carried) if HAS_DIFF else relu_of(best)
    delta = y
    if HAS_DIFF:
        delta = relu_difference(y, z_other, d_other, other, from_target)
    return y, delta, code


@triton.jit
def pack_nibbles(code, CHANNELS: tl.constexpr, PIXELS: tl.constexpr):
    """(CHANNELS, PIXELS) codes -> (CHANNELS // 2, PIXELS) uint8, even ones in the low nibbles."""
    pairs = code.to(tl.uint8).reshape(CHANNELS // 2, 2, PIXELS).permute(0, 2, 1)
    low, high = tl.split(pairs)
    return low | (high << 4)


@triton.jit
def pack_bits(on, CHANNELS: tl.constexpr, PIXELS: tl.constexpr):
    """(CHANNELS, PIXELS) bool -> (CHANNELS // 8, PIXELS) uint8, the first in the lowest bit."""
    bits = on.to(tl.int32).reshape(CHANNELS // 8, 8, PIXELS) << tl.arange(0, 8)[None, :, None]
    return tl.sum(bits, axis=1).to(tl.uint8)


@triton.jit
def windows(z, CHANNELS: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr):
    """(CHANNELS, 2 PH * 2 PW) -> the four positions of each window, (CHANNELS, PH * PW) each."""
    z = z.reshape(CHANNELS, PH, 2, PW, 2).permute(0, 1, 3, 2, 4)
    left, right = tl.split(z)
    z0, z2 = tl.split(left)
    z1, z3 = tl.split(right)
    return (z0.reshape(CHANNELS, PH * PW), z1.reshape(CHANNELS, PH * PW),
            z2.reshape(CHANNELS, PH * PW), z3.reshape(CHANNELS, PH * PW))  # fmt: skip
