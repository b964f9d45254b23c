"""The network's gradient, NHWC -> the logits' gradient; the cross-entropy's in the same write.

Twin of ``csrc/cpu/softmax_bwd.cpp``: the same arguments, the same meaning.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gpl_fast.kernels.class_maps import hold_map, map_of, weight_of
from gpl_fast.kernels.launch import ACTIVATION_NAMES, cdiv, launch
from gpl_fast.kernels.logits import (
    hold_logits,
    inverse_of,
    layout_of,
    logits_of,
    row_of,
    store_logits,
    tiling,
)
from gpl_fast.kernels.softmax import activate, slope


@triton.jit
def _sums(xs, dys, x_row, dy_ptr, lse, at_dy, w, inside, x_c, x_w, inv_t, C: tl.constexpr,
          LAYOUT: tl.constexpr, HELD: tl.constexpr, TILES: tl.constexpr, C_PAD: tl.constexpr,
          BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr):  # fmt: skip
    """(1 / Σ y, Σ y dy / Σ y) over the classes with y = e^((x − lse) / T): Σ y is 1 but for the
    rounding of lse, which is absolute and so not small for large logits."""
    total = tl.zeros((BLOCK_C, BLOCK_W), tl.float32)
    dot = tl.zeros((BLOCK_C, BLOCK_W), tl.float32)
    for c0 in range(0, C, TILES * BLOCK_C):
        for i in tl.static_range(TILES):
            x = logits_of(xs, i, x_row, c0, w, inside, x_c, x_w, C, LAYOUT, HELD, BLOCK_C)
            y = activate(x, lse[None, :], inv_t, "softmax")
            total += y
            if dy_ptr is not None:
                dot += y * map_of(dys, i, dy_ptr, at_dy, c0, inside, C, C_PAD, HELD, BLOCK_C)
    inverse = 1.0 / tl.sum(total, axis=0)
    return inverse, tl.sum(dot, axis=0) * inverse


@triton.jit(
    do_not_specialize=["H", "row0"],
    # Of a chunk of images they begin anywhere, and each alignment would be another kernel.
    do_not_specialize_on_alignment=["scale_ptr", "ce_scale_ptr"],
)
def _softmax_bwd_kernel(
    x_ptr, dx_ptr,  # (N, C, H, W), any strides
    lse_ptr, dy_ptr, scale_ptr, valid_ptr,  # (N, H, W), (N, rows, W, C_PAD), (N,), (N, H, W)
    ce_labels_ptr, ce_mask_ptr, ce_lse_ptr,  # (N, H, W)
    ce_scale_ptr, class_weight_ptr,  # (N,), (C,)
    H, W, row0, inv_t, dy_n, x_strides, dx_strides,
    C: tl.constexpr, SMOOTHING: tl.constexpr, ACTIVATION: tl.constexpr, OWN_LSE: tl.constexpr,
    LAYOUT: tl.constexpr, DX_LAYOUT: tl.constexpr, HELD: tl.constexpr, TILES: tl.constexpr,
    WHOLE: tl.constexpr, C_PAD: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(W, BLOCK_W)
    r = tl.program_id(0) // tiles
    w = (tl.program_id(0) % tiles) * BLOCK_W + tl.arange(0, BLOCK_W)
    n = tl.program_id(1).to(tl.int64)
    h = row0 + r
    if (h < 0) | (h >= H):
        return
    inside = w < W
    at = (n * H + h) * W + w
    by = 1.0 if inv_t is None else inv_t
    x_row, x_c, x_w = row_of(x_ptr, x_strides, n, h, C, W, LAYOUT)
    dx_row, dx_c, dx_w = row_of(dx_ptr, x_strides if dx_strides is None else dx_strides, n, h, C,
                                W, DX_LAYOUT)  # fmt: skip
    xs = hold_logits(x_row, w, inside, x_c, x_w, C, LAYOUT, HELD, TILES, WHOLE, BLOCK_C)
    dys = ()
    at_dy = (r * W + w).to(tl.int64) * C_PAD
    scale = 0.0
    if dy_ptr is not None:
        dy_ptr += n * dy_n
        scale = tl.load(scale_ptr + n)
        dys = hold_map(dy_ptr, at_dy, inside, C, C_PAD, HELD, TILES, WHOLE, BLOCK_C)
    keep = inside
    if valid_ptr is not None:
        keep, of_pixel = weight_of(valid_ptr, at, inside)
        if valid_ptr.dtype.element_ty == tl.float32:
            scale = (scale * of_pixel)[None, :]
    lse = tl.zeros((BLOCK_W,), tl.float32)
    inverse, dot = lse + 1.0, lse
    if ACTIVATION == "softmax":
        lse = tl.load(lse_ptr + at, mask=inside, other=0.0)
        # Where a pixel is not valid the cross-entropy may still count it.
        inverse, dot = _sums(xs, dys, x_row, dy_ptr, lse, at_dy, w, inside, x_c, x_w, by, C, LAYOUT,
                             HELD, TILES, C_PAD, BLOCK_C, BLOCK_W)  # fmt: skip
    if ce_labels_ptr is not None:
        label = tl.load(ce_labels_ptr + at, mask=inside, other=-1)
        counted = inside & (label >= 0) & (label < C)
        weight = tl.where(counted, 1.0, 0.0)
        weights = C * 1.0
        if class_weight_ptr is not None:
            weight = tl.load(
                class_weight_ptr + tl.where(counted, label, 0), mask=counted, other=0.0
            )
            weights = 0.0
            for c0 in range(0, C, BLOCK_C):
                c = c0 + tl.arange(0, BLOCK_C)
                weights += tl.sum(tl.load(class_weight_ptr + c, mask=c < C, other=0.0))
        ce_lse, ce_inverse = lse, inverse
        if OWN_LSE:
            ce_lse = tl.load(ce_lse_ptr + at, mask=inside, other=0.0)
            ce_inverse, _ = _sums(xs, dys, x_row, None, ce_lse, at_dy, w, inside, x_c, x_w, 1.0, C,
                                  LAYOUT, HELD, TILES, C_PAD, BLOCK_C, BLOCK_W)  # fmt: skip
        s = tl.load(ce_scale_ptr + n)
        if ce_mask_ptr is not None:
            s *= tl.load(ce_mask_ptr + at, mask=counted, other=0.0)
        on_p = s * (weight * (1.0 - SMOOTHING) + SMOOTHING / C * weights)
        on_weight = s * SMOOTHING / C
        on_label = s * (1.0 - SMOOTHING) * weight
    for c0 in range(0, C, TILES * BLOCK_C):
        for i in tl.static_range(TILES):
            x = logits_of(xs, i, x_row, c0, w, inside, x_c, x_w, C, LAYOUT, HELD, BLOCK_C)
            g = tl.zeros((BLOCK_C, BLOCK_W), tl.float32)
            if dy_ptr is not None:
                dy = map_of(dys, i, dy_ptr, at_dy, c0, inside, C, C_PAD, HELD, BLOCK_C)
                if ACTIVATION == "softmax":
                    y = activate(x, lse[None, :], by, "softmax") * inverse[None, :]
                    g = scale * y * (dy - dot[None, :])
                else:
                    g = scale * dy * slope(x, by, ACTIVATION)
                # 1 / T comes last: it may be huge where the rest is 0.
                g *= by
                if valid_ptr is not None:
                    g = tl.where(keep[None, :], g, 0.0)
            if ce_labels_ptr is not None:
                # s (p_c (w_t (1 − e) + e/C Σ w) − e/C w_c) − [c = t] s (1 − e) w_t
                c = c0 + i * BLOCK_C + tl.arange(0, BLOCK_C)
                cw = tl.full((BLOCK_C,), 1.0, tl.float32)
                if class_weight_ptr is not None:
                    cw = tl.load(class_weight_ptr + c, mask=c < C, other=0.0)
                p = activate(x, ce_lse[None, :], 1.0, "softmax") * ce_inverse[None, :]
                ce = p * on_p[None, :]
                if SMOOTHING != 0.0:
                    ce -= on_weight * cw[:, None]
                ce -= tl.where(c[:, None] == label[None, :], on_label[None, :], 0.0)
                g += tl.where(counted[None, :], ce, 0.0)
            store_logits(dx_row, g, c0 + i * BLOCK_C, w, inside, dx_c, dx_w, C, i < WHOLE,
                         DX_LAYOUT, BLOCK_C)  # fmt: skip


def softmax_bwd(
    x: Tensor, *, activation: int, temperature: float, label_smoothing: float = 0.0, row0: int,
    rows: int, dx: Tensor, lse: Tensor | None = None, dy: Tensor | None = None,
    scale: Tensor | None = None, valid: Tensor | None = None, ce_labels: Tensor | None = None,
    ce_mask: Tensor | None = None, ce_lse: Tensor | None = None, ce_scale: Tensor | None = None,
    class_weight: Tensor | None = None,
) -> None:  # fmt: skip
    """`gpl_fast.stages.BackwardStages.softmax_bwd`."""
    n, channels, height, width = x.shape
    if n * channels * width * rows == 0:
        return
    kind = ACTIVATION_NAMES[activation]
    own_lse = kind != "softmax" or temperature != 1.0
    how = tiling(channels, channels, width, twice=ce_labels is not None and own_lse)
    layout, strides = layout_of(x)
    dx_layout, dx_strides = layout_of(dx)
    same = (dx_layout, dx_strides) == (layout, strides)
    launch(
        _softmax_bwd_kernel,
        (rows * cdiv(width, how["BLOCK_W"]), n),
        x, dx, lse, dy, scale, valid, ce_labels, ce_mask, ce_lse, ce_scale, class_weight,
        height, width, row0, None if temperature == 1.0 else inverse_of(temperature),
        None if dy is None else dy.stride(0), strides, None if same else dx_strides,
        C=channels, SMOOTHING=label_smoothing, ACTIVATION=kind,
        OWN_LSE=own_lse, LAYOUT=layout, DX_LAYOUT=dx_layout,
        C_PAD=channels if dy is None else dy.shape[3], **how,
    )  # fmt: skip
