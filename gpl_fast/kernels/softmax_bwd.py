"""The network's gradient, NHWC -> the logits' gradient; the cross-entropy's in the same write.

Twin of ``csrc/cpu/softmax_bwd.cpp``: the same arguments, the same meaning.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gpl_fast.kernels.launch import ACTIVATION_NAMES, cdiv, image_strides, launch, pointers
from gpl_fast.kernels.logits import blocks, inverse_of, slope


@triton.jit
def _load_dy(dy_ptr, at_dy, c, keep, C_PAD: tl.constexpr):
    """(BLOCK_C, BLOCK_W) float32; whole vectors, the channels of the padding with them."""
    inside = (c[:, None] < C_PAD) & keep[None, :]
    return tl.load(dy_ptr + at_dy[None, :] + c[:, None], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _sums(x_ptr, dy_ptr, lse, at_x, at_dy, x_c, C, inv_t, keep, HAS_DY: tl.constexpr,
          C_PAD: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr):  # fmt: skip
    """(1 / Σ y, Σ y dy / Σ y) over the classes with y = e^((x − lse) / T): Σ y is 1 but for the
    rounding of lse, which is absolute and so not small for large logits."""
    total = tl.zeros((BLOCK_W,), tl.float32)
    dot = tl.zeros((BLOCK_W,), tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        live = (c[:, None] < C) & keep[None, :]
        x = tl.load(x_ptr + c[:, None].to(tl.int64) * x_c + at_x[None, :], mask=live, other=0.0)
        y = tl.where(live, tl.exp((x.to(tl.float32) - lse[None, :]) * inv_t), 0.0)
        total += tl.sum(y, axis=0)
        if HAS_DY:
            dy = _load_dy(dy_ptr, at_dy, c, keep, C_PAD)
            dot += tl.sum(tl.where(live, y * dy, 0.0), axis=0)
    inverse = 1.0 / total
    return inverse, dot * inverse


@triton.jit(
    do_not_specialize=["row0"],
    # Of a chunk of images they begin anywhere, and each alignment would be another kernel.
    do_not_specialize_on_alignment=["scale_ptr", "ce_scale_ptr"],
)
def _softmax_bwd_kernel(
    x_ptr, dx_ptr,  # (N, C, H, W), any strides
    lse_ptr, dy_ptr, scale_ptr, valid_ptr,  # (N, H, W), (N, rows, W, C_PAD), (N,), (N, H, W)
    ce_labels_ptr, ce_lse_ptr, ce_scale_ptr, class_weight_ptr,  # (N, H, W) twice, (N,), (C,)
    C, H, W, row0, inv_t, smoothing,
    x_n, x_c, x_h, x_w, dx_n, dx_c, dx_h, dx_w, dy_n,
    ACTIVATION: tl.constexpr, HAS_DY: tl.constexpr, HAS_VALID: tl.constexpr, HAS_CE: tl.constexpr,
    OWN_LSE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    C_PAD: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(W, BLOCK_W)
    r = tl.program_id(0) // tiles
    w = (tl.program_id(0) % tiles) * BLOCK_W + tl.arange(0, BLOCK_W)
    n = tl.program_id(1).to(tl.int64)
    h = row0 + r
    inside = (w < W) & (h >= 0) & (h < H)
    at = (n * H + h) * W + w
    keep = inside
    if HAS_VALID:
        keep = keep & (tl.load(valid_ptr + at, mask=inside, other=0) != 0)
    x_ptr += n * x_n + h.to(tl.int64) * x_h
    dx_ptr += n * dx_n + h.to(tl.int64) * dx_h
    at_x, at_dx = w.to(tl.int64) * x_w, w.to(tl.int64) * dx_w
    dy_ptr += n * dy_n
    at_dy = (r * W + w).to(tl.int64) * C_PAD
    lse = tl.zeros((BLOCK_W,), tl.float32)
    inverse, dot = lse + 1.0, lse
    scale = 0.0
    if HAS_DY:
        scale = tl.load(scale_ptr + n)
    if ACTIVATION == "softmax":
        lse = tl.load(lse_ptr + at, mask=inside, other=0.0)
        # Where a pixel is not valid the cross-entropy may still count it.
        inverse, dot = _sums(x_ptr, dy_ptr, lse, at_x, at_dy, x_c, C, inv_t, inside, HAS_DY,
                             C_PAD, BLOCK_C, BLOCK_W)  # fmt: skip
    label = tl.full((BLOCK_W,), -1, tl.int64)
    counted = w < 0
    ce_lse, ce_inverse = lse, inverse
    on_p, on_label, on_weight = lse * 0.0, lse * 0.0, 0.0
    if HAS_CE:
        label = tl.load(ce_labels_ptr + at, mask=inside, other=-1)
        counted = inside & (label >= 0) & (label < C)
        weight = tl.where(counted, 1.0, 0.0)
        weights = C * 1.0
        if HAS_WEIGHT:
            weight = tl.load(
                class_weight_ptr + tl.where(counted, label, 0), mask=counted, other=0.0
            )
            weights = 0.0
            for c0 in range(0, C, BLOCK_C):
                c = c0 + tl.arange(0, BLOCK_C)
                weights += tl.sum(tl.load(class_weight_ptr + c, mask=c < C, other=0.0))
        if OWN_LSE:
            ce_lse = tl.load(ce_lse_ptr + at, mask=inside, other=0.0)
            ce_inverse, _ = _sums(x_ptr, dy_ptr, ce_lse, at_x, at_dy, x_c, C, 1.0, inside,
                                  False, C_PAD, BLOCK_C, BLOCK_W)  # fmt: skip
        s = tl.load(ce_scale_ptr + n)
        on_p = s * (weight * (1.0 - smoothing) + smoothing / C * weights)
        on_weight = s * smoothing / C
        on_label = s * (1.0 - smoothing) * weight
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        live = (c[:, None] < C) & inside[None, :]
        x = tl.load(x_ptr + c[:, None].to(tl.int64) * x_c + at_x[None, :], mask=live, other=0.0)
        x = x.to(tl.float32)
        g = tl.zeros((BLOCK_C, BLOCK_W), tl.float32)
        y = g
        if ACTIVATION == "softmax":
            y = tl.exp((x - lse[None, :]) * inv_t) * inverse[None, :]
        if HAS_DY:
            dy = _load_dy(dy_ptr, at_dy, c, inside, C_PAD)
            if ACTIVATION == "softmax":
                g = scale * y * (dy - dot[None, :])
            else:
                g = scale * dy * slope(x, inv_t, ACTIVATION)
            # 1 / T comes last: it may be huge where the rest is 0.
            g = tl.where(keep[None, :], g * inv_t, 0.0)
        if HAS_CE:
            # s (p_c (w_t (1 − e) + e/C Σ w) − e/C w_c) − [c = t] s (1 − e) w_t
            if OWN_LSE:
                y = tl.exp(x - ce_lse[None, :]) * ce_inverse[None, :]
            cw = tl.full((BLOCK_C,), 1.0, tl.float32)
            if HAS_WEIGHT:
                cw = tl.load(class_weight_ptr + c, mask=c < C, other=0.0)
            ce = y * on_p[None, :] - on_weight * cw[:, None]
            ce -= tl.where(c[:, None] == label[None, :], on_label[None, :], 0.0)
            g += tl.where(counted[None, :], ce, 0.0)
        tl.store(dx_ptr + c[:, None].to(tl.int64) * dx_c + at_dx[None, :],
                 g.to(dx_ptr.dtype.element_ty), mask=live)  # fmt: skip


def softmax_bwd(
    x: Tensor, *, activation: int, temperature: float, label_smoothing: float = 0.0, row0: int,
    rows: int, dx: Tensor, lse: Tensor | None = None, dy: Tensor | None = None,
    scale: Tensor | None = None, valid: Tensor | None = None, ce_labels: Tensor | None = None,
    ce_lse: Tensor | None = None, ce_scale: Tensor | None = None,
    class_weight: Tensor | None = None,
) -> None:  # fmt: skip
    """`gpl_fast.stages.BackwardStages.softmax_bwd`."""
    n, channels, height, width = x.shape
    if n * channels * width * rows == 0:
        return
    kind = ACTIVATION_NAMES[activation]
    block_c, block_w = blocks(channels, width)
    launch(
        _softmax_bwd_kernel,
        (rows * cdiv(width, block_w), n),
        x, dx,
        *pointers(x, lse, dy, scale, valid, ce_labels, ce_lse, ce_scale, class_weight),
        channels, height, width, row0,
        inverse_of(temperature), label_smoothing,
        *x.stride(), *dx.stride(), *image_strides(dy),
        ACTIVATION=kind, HAS_DY=dy is not None, HAS_VALID=valid is not None,
        HAS_CE=ce_labels is not None, OWN_LSE=kind != "softmax" or temperature != 1.0,
        HAS_WEIGHT=class_weight is not None, C_PAD=channels if dy is None else dy.shape[3],
        BLOCK_C=block_c, BLOCK_W=block_w, num_warps=8 if block_c * block_w >= 4096 else 4,
    )  # fmt: skip
