"""Of tiles of logits: activation, log-sum-exp, cross-entropy."""

from __future__ import annotations

import triton
import triton.language as tl

from gpl_fast.kernels.logits import load_logits, logits_of

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def activate(x, m, inv_t, ACTIVATION: tl.constexpr):
    """e^((x − m) / T) for softmax, sigmoid of x / T, or x / T itself; x in float32."""
    if ACTIVATION == "softmax":
        return tl.exp2((x - m) * (inv_t * LOG2_E))
    elif ACTIVATION == "sigmoid":
        return 1.0 / (1.0 + tl.exp2(x * (inv_t * -LOG2_E)))
    else:
        return x * inv_t


@triton.jit
def less_one(y, x, inv_t, ACTIVATION: tl.constexpr):
    """y' − 1: where x is large, nothing of it is left in a sigmoid's y'."""
    if ACTIVATION == "sigmoid":
        return -activate(-x, 0.0, inv_t, ACTIVATION)
    else:
        return y - 1.0


@triton.jit
def slope(x, inv_t, ACTIVATION: tl.constexpr):
    """act' at x / T of an activation of each logit by itself: y' (1 − y') without cancellation."""
    if ACTIVATION == "sigmoid":
        t = x * (inv_t * LOG2_E)
        return 1.0 / (1.0 + tl.exp2(0.0 - t)) / (1.0 + tl.exp2(t))
    else:
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def log_sum_exp(xs, row_ptr, w, inside, stride_c, stride_w, inv_t, C: tl.constexpr,
                LAYOUT: tl.constexpr, HELD: tl.constexpr, TILES: tl.constexpr,
                BLOCK_C: tl.constexpr):  # fmt: skip
    """(max, Σ e^((x − max) / T)) over the classes, (BLOCK_W,) each; a max of −inf is 0 here."""
    if HELD:
        m = xs[0]
        for i in tl.static_range(1, TILES):
            m = tl.maximum(m, xs[i])
        m = _finite(tl.max(m, axis=0))
        s = activate(xs[0], m[None, :], inv_t, "softmax")
        for i in tl.static_range(1, TILES):
            s += activate(xs[i], m[None, :], inv_t, "softmax")
        return m, tl.sum(s, axis=0)
    else:
        m = tl.full(w.shape, float("-inf"), tl.float32)
        s = tl.zeros(w.shape, tl.float32)
        for c0 in range(0, C, BLOCK_C):
            x = load_logits(row_ptr, c0, w, inside, stride_c, stride_w, C, False, LAYOUT, BLOCK_C)
            higher = tl.maximum(m, tl.max(x, axis=0))
            now = _finite(higher)
            s = s * activate(m, now, inv_t, "softmax")
            s += tl.sum(activate(x, now[None, :], inv_t, "softmax"), axis=0)
            m = higher
        return _finite(m), s


@triton.jit
def _finite(m):
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def cross_entropy(xs, row_ptr, ce_labels_ptr, ce_mask_ptr, class_weight_ptr, at, w, counts, m,
                  log_s, stride_c, stride_w, SMOOTHING: tl.constexpr, C: tl.constexpr,
                  LAYOUT: tl.constexpr, HELD: tl.constexpr, TILES: tl.constexpr,
                  BLOCK_C: tl.constexpr):  # fmt: skip
    """Loss and weight of each pixel, (BLOCK_W,) float32, 0 where it does not count.

    lse = m + log_s, kept apart: lse − x_c of a confident pixel is about log_s alone.
    """
    label = tl.load(ce_labels_ptr + at, mask=counts, other=-1)
    counted = (label >= 0) & (label < C)
    label = tl.where(counted, label, 0)
    weight = tl.where(counted, 1.0, 0.0)
    if class_weight_ptr is not None:
        weight *= tl.load(class_weight_ptr + label, mask=counted, other=0.0)
    of_label = row_ptr + label * stride_c + w.to(tl.int64) * stride_w
    x_label = tl.load(of_label, mask=counted, other=0.0).to(tl.float32)
    loss = weight * (1.0 - SMOOTHING) * ((m - x_label) + log_s)
    if SMOOTHING != 0.0:
        # e/C Σ w_c (lse − x_c)
        below = tl.zeros(w.shape, tl.float32)
        weights = 0.0
        for c0 in range(0, C, TILES * BLOCK_C):
            for i in tl.static_range(TILES):
                c = c0 + i * BLOCK_C + tl.arange(0, BLOCK_C)
                x = logits_of(xs, i, row_ptr, c0, w, counts, stride_c, stride_w, C, LAYOUT, HELD,
                              BLOCK_C)  # fmt: skip
                cw = tl.where(c < C, SMOOTHING / C, 0.0)
                if class_weight_ptr is not None:
                    cw *= tl.load(class_weight_ptr + c, mask=c < C, other=0.0)
                part = cw[:, None] * (m[None, :] - x)
                below += tl.sum(tl.where(c[:, None] < C, part, 0.0), axis=0)
                weights += tl.sum(cw)
        loss += weights * log_s + below
    if ce_mask_ptr is not None:
        mask = tl.load(ce_mask_ptr + at, mask=counted, other=0.0)
        loss *= mask
        weight *= mask
    return tl.where(counted, loss, 0.0), weight
