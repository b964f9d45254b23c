"""The binary cross-entropy of logits with labels of single elements, and its gradient.

Twin of ``csrc/cpu/binary_ce.cpp``: the same arguments, the same meaning.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpl_fast.kernels.class_maps import load_elements, weight_of
from gpl_fast.kernels.launch import cdiv, launch
from gpl_fast.kernels.logits import layout_of, row_of
from gpl_fast.kernels.row_sums import row_sums
from gpl_fast.kernels.softmax import LOG2_E

ELEMENTS = 2048  # of a tile


@triton.jit
def _terms(class_weight_ptr, pos_weight_ptr, c, one, SMOOTHING: tl.constexpr, C: tl.constexpr):
    """An element's loss is on_0 softplus(x) + on_1 softplus(−x), by its label, (BLOCK_C, BLOCK_W)
    each."""
    weight = tl.full(c.shape, 1.0, tl.float32)
    if class_weight_ptr is not None:
        weight = tl.load(class_weight_ptr + c, mask=c < C, other=0.0)
    positive = weight
    if pos_weight_ptr is not None:
        positive = weight * tl.load(pos_weight_ptr + c, mask=c < C, other=0.0)
    e = 0.5 * SMOOTHING
    on_0 = weight[:, None] * tl.where(one, e, 1.0 - e)
    on_1 = positive[:, None] * tl.where(one, 1.0 - e, e)
    return on_0, on_1


@triton.jit
def _log1p(e):
    """log(1 + e) of 0 <= e <= 1, exact relative to itself: 2 artanh(e / (2 + e))."""
    s = e / (2.0 + e)
    z = s * s
    p = z * (1.0 / 15) + 1.0 / 13
    p = p * z + 1.0 / 11
    p = p * z + 1.0 / 9
    p = p * z + 1.0 / 7
    p = p * z + 1.0 / 5
    p = p * z + 1.0 / 3
    return 2.0 * (p * z * s + s)


@triton.jit
def _weighted(weight, y):
    """weight · y, where an infinite y of no weight is nothing."""
    return tl.where(weight != 0.0, weight * y, 0.0)


@triton.jit
def _tile(x_row, labels_row, c, w, on_map, x_c, x_w, labels_c, C: tl.constexpr):
    """Logits, labels, and which of them count."""
    inside = (c[:, None] < C) & on_map[None, :]
    at = c[:, None].to(tl.int64) * x_c + w[None, :].to(tl.int64) * x_w
    x = tl.load(x_row + at, mask=inside, other=0.0).to(tl.float32)
    label = load_elements(labels_row, c, w, on_map, labels_c, C)
    return x, label, label < 2


@triton.jit(do_not_specialize=["H", "row0"])
def _binary_ce_fwd_kernel(
    x_ptr, labels_ptr,  # (N, C, H, W)
    class_weight_ptr, pos_weight_ptr, mask_ptr,  # (C,) twice, (N, H, W)
    parts_ptr,  # (N, H, tiles, 2) float64
    H, W, row0, labels_n, labels_c, x_strides,
    C: tl.constexpr, SMOOTHING: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(W, BLOCK_W)
    h, tile = row0 + tl.program_id(0) // tiles, tl.program_id(0) % tiles
    n = tl.program_id(1).to(tl.int64)
    w = tile * BLOCK_W + tl.arange(0, BLOCK_W)
    on_map = w < W
    x_row, x_c, x_w = row_of(x_ptr, x_strides, n, h, C, W, LAYOUT)
    labels_row = labels_ptr + n * labels_n + h.to(tl.int64) * W
    mask = tl.full((BLOCK_W,), 1.0, tl.float32)
    if mask_ptr is not None:
        _, mask = weight_of(mask_ptr, (n * H + h) * W + w, on_map)
    losses, count = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        x, label, counts = _tile(x_row, labels_row, c, w, on_map, x_c, x_w, labels_c, C)
        on_0, on_1 = _terms(class_weight_ptr, pos_weight_ptr, c, label == 1, SMOOTHING, C)
        rest = _log1p(tl.exp2(-tl.abs(x) * LOG2_E))
        loss = _weighted(on_0, rest + tl.where(x < 0, 0.0, x))
        loss += _weighted(on_1, rest + tl.where(x > 0, 0.0, -x))
        losses += tl.sum(tl.where(counts, loss * mask[None, :], 0.0)).to(tl.float64)
        count += tl.sum(tl.where(counts, mask[None, :], 0.0)).to(tl.float64)
    part = parts_ptr + ((n * H + h) * tiles + tile) * 2
    tl.store(part, losses)
    tl.store(part + 1, count)


@triton.jit(
    do_not_specialize=["H", "row0"],
    # Of a chunk of images it begins anywhere, and each alignment would be another kernel.
    do_not_specialize_on_alignment=["scale_ptr"],
)
def _binary_ce_bwd_kernel(
    x_ptr, dx_ptr, labels_ptr,  # (N, C, H, W)
    scale_ptr, class_weight_ptr, pos_weight_ptr, mask_ptr,  # (N,), (C,) twice, (N, H, W)
    H, W, row0, labels_n, labels_c, x_strides, dx_strides,
    C: tl.constexpr, SMOOTHING: tl.constexpr, CLEAR: tl.constexpr, LAYOUT: tl.constexpr,
    DX_LAYOUT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(W, BLOCK_W)
    h = row0 + tl.program_id(0) // tiles
    n = tl.program_id(1).to(tl.int64)
    if (h < 0) | (h >= H):
        return
    w = (tl.program_id(0) % tiles) * BLOCK_W + tl.arange(0, BLOCK_W)
    on_map = w < W
    x_row, x_c, x_w = row_of(x_ptr, x_strides, n, h, C, W, LAYOUT)
    dx_row, dx_c, dx_w = row_of(dx_ptr, x_strides if dx_strides is None else dx_strides, n, h, C,
                                W, DX_LAYOUT)  # fmt: skip
    labels_row = labels_ptr + n * labels_n + h.to(tl.int64) * W
    scale = tl.zeros((BLOCK_W,), tl.float32)
    if scale_ptr is not None:
        scale += tl.load(scale_ptr + n)
        if mask_ptr is not None:
            _, mask = weight_of(mask_ptr, (n * H + h) * W + w, on_map)
            scale *= mask
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        inside = (c[:, None] < C) & on_map[None, :]
        at = c[:, None].to(tl.int64) * dx_c + w[None, :].to(tl.int64) * dx_w
        dx = tl.load(dx_row + at, mask=inside, other=0.0).to(tl.float32)
        x, label, counts = _tile(x_row, labels_row, c, w, on_map, x_c, x_w, labels_c, C)
        g = dx
        if scale_ptr is not None:
            on_0, on_1 = _terms(class_weight_ptr, pos_weight_ptr, c, label == 1, SMOOTHING, C)
            e = tl.exp2(-tl.abs(x) * LOG2_E)
            larger = 1.0 / (1.0 + e)
            smaller = e * larger
            positive = x > 0
            slope = on_0 * tl.where(positive, larger, smaller)
            slope -= on_1 * tl.where(positive, smaller, larger)
            g = dx + scale[None, :] * slope
        g = tl.where(counts, g, 0.0 if CLEAR else dx)
        tl.store(dx_row + at, g.to(dx_ptr.dtype.element_ty), mask=inside)


def _blocks(channels: int, width: int) -> dict[str, int]:
    block_w = min(triton.next_power_of_2(width), 64 if channels > 8 else 256)
    return {
        "BLOCK_W": block_w,
        "BLOCK_C": min(triton.next_power_of_2(channels), max(ELEMENTS // block_w, 1)),
        "num_warps": 4,
    }


def binary_ce_fwd(
    x: Tensor, *, labels: Tensor, row0: int, rows: int, ce_rows: Tensor,
    label_smoothing: float = 0.0, class_weight: Tensor | None = None,
    pos_weight: Tensor | None = None, ce_mask: Tensor | None = None,
) -> None:  # fmt: skip
    """`gpl_fast.binary_stages.BinaryStages.binary_ce_fwd`."""
    n, channels, height, width = x.shape
    row1 = min(row0 + rows, height)
    row0 = max(row0, 0)
    if n * channels * width == 0 or row1 <= row0:
        return
    how = _blocks(channels, width)
    tiles = cdiv(width, how["BLOCK_W"])
    parts = ce_rows
    if tiles > 1:
        parts = torch.empty((n, height, tiles, 2), dtype=torch.float64, device=x.device)
    layout, strides = layout_of(x)
    launch(
        _binary_ce_fwd_kernel,
        ((row1 - row0) * tiles, n),
        x, labels, class_weight, pos_weight, ce_mask, parts, height, width, row0,
        *labels.stride()[:2], strides,
        C=channels, SMOOTHING=label_smoothing, LAYOUT=layout, **how,
    )  # fmt: skip
    if parts is not ce_rows:
        row_sums(parts, ce_rows, row0, row1 - row0)


def binary_ce_bwd(
    x: Tensor, *, labels: Tensor, row0: int, rows: int, dx: Tensor, clear: bool,
    label_smoothing: float = 0.0, ce_scale: Tensor | None = None,
    class_weight: Tensor | None = None, pos_weight: Tensor | None = None,
    ce_mask: Tensor | None = None,
) -> None:  # fmt: skip
    """`gpl_fast.binary_stages.BinaryBackwardStages.binary_ce_bwd`."""
    n, channels, height, width = x.shape
    if n * channels * width * rows == 0 or not (clear or ce_scale is not None):
        return
    how = _blocks(channels, width)
    layout, strides = layout_of(x)
    dx_layout, dx_strides = layout_of(dx)
    same = (dx_layout, dx_strides) == (layout, strides)
    launch(
        _binary_ce_bwd_kernel,
        (rows * cdiv(width, how["BLOCK_W"]), n),
        x, dx, labels, ce_scale, class_weight, pos_weight, ce_mask, height, width, row0,
        *labels.stride()[:2], strides, None if same else dx_strides,
        C=channels, SMOOTHING=label_smoothing, CLEAR=clear, LAYOUT=layout, DX_LAYOUT=dx_layout,
        **how,
    )  # fmt: skip
