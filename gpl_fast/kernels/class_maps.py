"""Tiles of class maps, (BLOCK_C, BLOCK_W) of (…, W, C_PAD): loads, stores, those of a list."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_map(map_ptr, at, c0, on_map, C: tl.constexpr, C_PAD: tl.constexpr, FULL: tl.constexpr,
             BLOCK_C: tl.constexpr):  # fmt: skip
    """Channels from c0 on, (BLOCK_C, BLOCK_W) float32, 0 beyond the last class unless FULL; whole
    vectors, the channels of the padding with them."""
    c = c0 + tl.arange(0, BLOCK_C)
    at = at[None, :] + c[:, None]
    if FULL:
        return tl.load(map_ptr + at, mask=on_map[None, :]).to(tl.float32)
    else:
        y = tl.load(map_ptr + at, mask=on_map[None, :] & (c[:, None] < C_PAD), other=0.0)
        return tl.where(c[:, None] < C, y.to(tl.float32), 0.0)


@triton.jit
def hold_map(map_ptr, at, on_map, C: tl.constexpr, C_PAD: tl.constexpr, HELD: tl.constexpr,
             TILES: tl.constexpr, WHOLE: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """All channels, TILES tiles; nothing where they are not held."""
    ys = ()
    if HELD:
        for i in tl.static_range(TILES):
            y = load_map(map_ptr, at, i * BLOCK_C, on_map, C, C_PAD, i < WHOLE, BLOCK_C)
            ys = ys + (y,)  # type: ignore[assignment] # noqa: RUF005
    return ys


@triton.jit
def map_of(ys, i: tl.constexpr, map_ptr, at, c0, on_map, C: tl.constexpr, C_PAD: tl.constexpr,
           HELD: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Tile i of those held, or the one from channel c0 on."""
    if HELD:
        return ys[i]
    else:
        return load_map(map_ptr, at, c0, on_map, C, C_PAD, False, BLOCK_C)


@triton.jit
def weight_of(valid_ptr, at, inside):
    """(whether each pixel counts, its weight: float32, of a bool that is 1)"""
    if valid_ptr.dtype.element_ty == tl.float32:
        m = tl.load(valid_ptr + at, mask=inside, other=0.0)
        return m > 0.0, tl.where(m > 0.0, m, 0.0)
    else:
        keep = inside & (tl.load(valid_ptr + at, mask=inside, other=0) != 0)
        return keep, keep.to(tl.float32)


@triton.jit
def zeroed(y, c, valid_ptr, keep, weight, C: tl.constexpr, FULL: tl.constexpr):
    """0 beyond the last class, and where a pixel is not kept; times its weight."""
    if not FULL:
        y = tl.where(c[:, None] < C, y, 0.0)
    if valid_ptr is not None:
        y = tl.where(keep[None, :], y, 0.0)
        if valid_ptr.dtype.element_ty == tl.float32:
            y *= weight[None, :]
    return y


@triton.jit
def store_map(map_ptr, at, value, c, on_map, C_PAD: tl.constexpr, FULL: tl.constexpr):
    """A tile (BLOCK_C, BLOCK_W) to (…, W, C_PAD)."""
    at = at[None, :] + c[:, None]
    value = value.to(map_ptr.dtype.element_ty)
    if FULL:
        tl.store(map_ptr + at, value, mask=on_map[None, :])
    else:
        tl.store(map_ptr + at, value, mask=on_map[None, :] & (c[:, None] < C_PAD))


@triton.jit
def store_zeros(map_ptr, at, on_map, C_PAD: tl.constexpr, BLOCK_C: tl.constexpr,
                 BLOCK_W: tl.constexpr):  # fmt: skip
    for c0 in range(0, C_PAD, BLOCK_C):
        zeros = tl.zeros((BLOCK_C, BLOCK_W), tl.float32)
        store_map(map_ptr, at, zeros, c0 + tl.arange(0, BLOCK_C), on_map, C_PAD, False)


@triton.jit
def load_elements(row_ptr, c, w, on_map, stride_c, C: tl.constexpr):
    """Labels of a row's elements, (BLOCK_C, BLOCK_W) uint8; 2, which do not count, outside."""
    at = c[:, None].to(tl.int64) * stride_c + w[None, :]
    return tl.load(row_ptr + at, mask=(c[:, None] < C) & on_map[None, :], other=2)


@triton.jit
def topk_tile(values_ptr, indices_ptr, rest_ptr, first, at, c, inside, plane, K: tl.constexpr,
               FAR: tl.constexpr, BLOCK_C: tl.constexpr,
               BLOCK_W: tl.constexpr):  # fmt: skip
    """The target's map from its listed classes, (BLOCK_C, BLOCK_W)."""
    if FAR:  # in 32 bits the list's registers are fewer
        plane += tl.zeros((), tl.int64)
    t = tl.zeros((BLOCK_C, BLOCK_W), tl.float32)
    if rest_ptr is not None:
        t += tl.load(rest_ptr + at, mask=inside, other=0.0)[None, :]
        for j in range(0, K):
            index = tl.load(indices_ptr + first + j * plane, mask=inside, other=-1)
            t = tl.where(c[:, None] == index[None, :], 0.0, t)
    for j in range(0, K):
        index = tl.load(indices_ptr + first + j * plane, mask=inside, other=-1)
        value = tl.load(values_ptr + first + j * plane, mask=inside, other=0.0)
        t += tl.where(c[:, None] == index[None, :], value[None, :], 0.0)
    return t
