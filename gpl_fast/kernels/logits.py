"""Tiles of logits, (BLOCK_C, BLOCK_W) of a row: their sizes, loads and stores.

A program holds all classes of its pixels in registers, as a tuple of tiles, where they fit (HELD):
then it reads them once. Else it holds none and reads them again, tile by tile, for every pass.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Classes that a program holds at most, of as many pixels as a sector of 32 bytes has logits.
HELD = 1280


def tiling(classes: int, channels: int, width: int, twice: bool = False) -> dict[str, int]:
    """What a program of either kernel covers: 16 to 40 logits a thread, where they are held; fewer
    where each has two exponentials, which are held too (`twice`).

    Tiles of BLOCK_C x BLOCK_W: TILES for the `channels` of a map, WHOLE of them full of `classes`.
    """
    held = channels <= (HELD - 256 if twice else HELD)
    if channels <= 32:
        block_c, warps = max(triton.next_power_of_2(channels), 2), 2 if channels > 8 else 4
        block_w = 2048 // block_c
    elif channels <= 256:
        block_c, block_w = 32, 64 if channels <= 64 else 32
        warps = 4 if channels <= (128 if twice else 160) else 8
    elif held:
        block_c, block_w, warps = 128, 16 if channels <= 512 else 8, 8
    else:
        block_c, block_w, warps = 64, 32, 4
    return {
        "HELD": held,
        "TILES": -(-channels // block_c) if held else 1,
        "WHOLE": classes // block_c if held else 0,
        "BLOCK_C": block_c,
        "BLOCK_W": min(triton.next_power_of_2(width), block_w),
        "num_warps": warps,
    }


def layout_of(x: Tensor) -> tuple[str, tuple[int, ...]]:
    """The layout of logits (N, C, H, W), of any number of rows of an image, and what its strides
    are made of."""
    (n, c, _, w), strides = x.shape, x.stride()
    if strides[2:] == (w, 1) and (n == 1 or strides[0] == c * strides[1]):
        return "nchw", strides[1:2]
    if strides[1:] == (1, w * c, c):
        return "nhwc", strides[:1]
    return "any", strides


def inverse_of(temperature: float) -> float:
    """1 / T, in float32 finite and positive whatever T is: times 0 it is 0."""
    return 1.0 / min(max(temperature, 2.0**-126), 2.0**128)


@triton.jit
def row_of(x_ptr, strides, n, h, C: tl.constexpr, W, LAYOUT: tl.constexpr):
    """(pointer to the row's first logit, its stride of a class, of a pixel)"""
    h = h.to(tl.int64)
    if LAYOUT == "nchw":
        return x_ptr + n * C * strides[0] + h * W, strides[0], 1
    elif LAYOUT == "nhwc":
        return x_ptr + n * strides[0] + h * W * C, 1, C
    else:
        return x_ptr + n * strides[0] + h * strides[2], strides[1], strides[3]


@triton.jit
def _load(row_ptr, c, w, inside, stride_c, stride_w, C: tl.constexpr, FULL: tl.constexpr):
    at = c[:, None].to(tl.int64) * stride_c + w[None, :].to(tl.int64) * stride_w
    if row_ptr.dtype.element_ty == tl.uint8:  # labels of elements: the map that they are
        live = (c[:, None] < C) & inside[None, :]
        return (tl.load(row_ptr + at, mask=live, other=0) == 1).to(tl.float32)
    elif FULL:  # what is outside of the row is in columns of its own
        return tl.load(row_ptr + at, mask=inside[None, :]).to(tl.float32)
    else:
        live = (c[:, None] < C) & inside[None, :]
        return tl.load(row_ptr + at, mask=live, other=float("-inf")).to(tl.float32)


@triton.jit
def load_logits(row_ptr, c0, w, inside, stride_c, stride_w, C: tl.constexpr, FULL: tl.constexpr,
                LAYOUT: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Classes from c0 on, (BLOCK_C, BLOCK_W) float32; −inf beyond the last, unless FULL."""
    if LAYOUT == "nhwc":
        c = c0 + tl.arange(0, BLOCK_C)
        return _load(row_ptr, c, w, inside, stride_c, stride_w, C, FULL)
    else:
        # A thread has pairs of classes, which a map has side by side.
        c = c0 + 2 * tl.arange(0, BLOCK_C // 2)
        even = _load(row_ptr, c, w, inside, stride_c, stride_w, C, FULL)
        odd = _load(row_ptr, c + 1, w, inside, stride_c, stride_w, C, FULL)
        return tl.join(even, odd).permute(0, 2, 1).reshape(BLOCK_C, w.shape[0])


@triton.jit
def hold_logits(row_ptr, w, inside, stride_c, stride_w, C: tl.constexpr, LAYOUT: tl.constexpr,
                HELD: tl.constexpr, TILES: tl.constexpr, WHOLE: tl.constexpr,
                BLOCK_C: tl.constexpr):  # fmt: skip
    """All classes, TILES tiles; nothing where they are not held."""
    xs = ()
    if HELD:
        for i in tl.static_range(TILES):
            x = load_logits(row_ptr, i * BLOCK_C, w, inside, stride_c, stride_w, C, i < WHOLE,
                            LAYOUT, BLOCK_C)  # fmt: skip
            xs = xs + (x,)  # type: ignore[assignment] # noqa: RUF005
    return xs


@triton.jit
def logits_of(xs, i: tl.constexpr, row_ptr, c0, w, inside, stride_c, stride_w, C: tl.constexpr,
              LAYOUT: tl.constexpr, HELD: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Tile i of those held, or the one from class c0 on."""
    if HELD:
        return xs[i]
    else:
        return load_logits(row_ptr, c0, w, inside, stride_c, stride_w, C, False, LAYOUT, BLOCK_C)


@triton.jit
def store_logits(row_ptr, value, c0, w, inside, stride_c, stride_w, C: tl.constexpr,
                 FULL: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """As `load_logits`."""
    value = value.to(row_ptr.dtype.element_ty)
    if LAYOUT == "nhwc":
        c = c0 + tl.arange(0, BLOCK_C)
        _store(row_ptr, value, c, w, inside, stride_c, stride_w, C, FULL)
    else:
        pairs = value.reshape(BLOCK_C // 2, 2, w.shape[0]).permute(0, 2, 1)
        even, odd = tl.split(pairs)
        c = c0 + 2 * tl.arange(0, BLOCK_C // 2)
        _store(row_ptr, even, c, w, inside, stride_c, stride_w, C, FULL)
        _store(row_ptr, odd, c + 1, w, inside, stride_c, stride_w, C, FULL)


@triton.jit
def _store(row_ptr, value, c, w, inside, stride_c, stride_w, C: tl.constexpr, FULL: tl.constexpr):
    at = c[:, None].to(tl.int64) * stride_c + w[None, :].to(tl.int64) * stride_w
    if FULL:
        tl.store(row_ptr + at, value, mask=inside[None, :])
    else:
        tl.store(row_ptr + at, value, mask=(c[:, None] < C) & inside[None, :])
