"""Tiles of logits, (BLOCK_C, BLOCK_W) of a row: activation, log-sum-exp, cross-entropy."""

from __future__ import annotations

import triton
import triton.language as tl

CLASSES = 64  # of a tile, at most


def blocks(channels: int, width: int) -> tuple[int, int]:
    """Classes and pixels of a tile."""
    block_c = min(triton.next_power_of_2(channels), CLASSES)
    return block_c, min(triton.next_power_of_2(width), 64 if block_c >= 32 else 256)


def inverse_of(temperature: float) -> float:
    """1 / T, in float32 finite and positive whatever T is: times 0 it is 0."""
    return 1.0 / min(max(temperature, 2.0**-126), 2.0**128)


@triton.jit
def activate(x, m, inv_t, ACTIVATION: tl.constexpr):
    """e^((x − m) / T) for softmax, sigmoid of x / T, or x / T itself; x in float32."""
    if ACTIVATION == "softmax":
        return tl.exp((x - m) * inv_t)
    if ACTIVATION == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-(x * inv_t)))
    return x * inv_t


@triton.jit
def less_one(y, x, inv_t, ACTIVATION: tl.constexpr):
    """y' − 1: where x is large, nothing of it is left in a sigmoid's y'."""
    if ACTIVATION == "sigmoid":
        return -activate(-x, 0.0, inv_t, ACTIVATION)
    return y - 1.0


@triton.jit
def slope(x, inv_t, ACTIVATION: tl.constexpr):
    """act' at x / T of an activation of each logit by itself: y' (1 − y') without cancellation."""
    s = tl.full(x.shape, 1.0, tl.float32)
    if ACTIVATION == "sigmoid":
        s = 1.0 / (1.0 + tl.exp(0.0 - x * inv_t)) / (1.0 + tl.exp(x * inv_t))
    return s


@triton.jit
def load_logits(x_ptr, c, w, stride_c, stride_w, C, W, BLOCK_C: tl.constexpr):
    """A tile, (BLOCK_C, BLOCK_W) float32; −inf beyond the last class."""
    at = c[:, None].to(tl.int64) * stride_c + w[None, :].to(tl.int64) * stride_w
    inside = (c[:, None] < C) & (w[None, :] < W)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return tl.where(c[:, None] < C, x, float("-inf"))


@triton.jit
def log_sum_exp(x_ptr, w, stride_c, stride_w, C, W, inv_t, BLOCK_C: tl.constexpr,
                BLOCK_W: tl.constexpr):  # fmt: skip
    """(max, Σ e^((x − max) / T)) over the classes, (BLOCK_W,) each."""
    m = tl.full((BLOCK_W,), float("-inf"), tl.float32)
    s = tl.zeros((BLOCK_W,), tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        x = load_logits(x_ptr, c, w, stride_c, stride_w, C, W, BLOCK_C)
        higher = tl.maximum(m, tl.max(x, axis=0))
        # −inf − −inf where every logit so far is −inf: s is 0 then, or NaN
        s = tl.where(m == float("-inf"), s, s * tl.exp((m - higher) * inv_t))
        e = tl.exp((x - higher[None, :]) * inv_t)
        s += tl.sum(tl.where(x == float("-inf"), 0.0, e), axis=0)
        m = higher
    return m, s


@triton.jit
def cross_entropy(x_ptr, ce_labels_ptr, class_weight_ptr, at, w, inside, m, log_s, stride_c,
                  stride_w, C, W, smoothing, HAS_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr,
                  BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr):  # fmt: skip
    """Loss and weight of each pixel, (BLOCK_W,) float32, 0 where it does not count.

    lse = m + log_s, kept apart: lse − x_c of a confident pixel is about log_s alone.
    """
    label = tl.load(ce_labels_ptr + at, mask=inside, other=-1)
    counted = (label >= 0) & (label < C)
    label = tl.where(counted, label, 0)
    weight = tl.where(counted, 1.0, 0.0)
    if HAS_WEIGHT:
        weight *= tl.load(class_weight_ptr + label, mask=counted, other=0.0)
    x_label = tl.load(x_ptr + label * stride_c + w.to(tl.int64) * stride_w, mask=counted, other=0.0)
    loss = weight * (1.0 - smoothing) * ((m - x_label.to(tl.float32)) + log_s)
    if SMOOTH:
        # e/C Σ w_c (lse − x_c)
        below = tl.zeros((BLOCK_W,), tl.float32)
        weights = 0.0
        for c0 in range(0, C, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            cw = tl.where(c < C, 1.0, 0.0)
            if HAS_WEIGHT:
                cw = tl.load(class_weight_ptr + c, mask=c < C, other=0.0)
            cw *= smoothing / C
            x = m[None, :] - load_logits(x_ptr, c, w, stride_c, stride_w, C, W, BLOCK_C)
            below += tl.sum(tl.where(c[:, None] < C, cw[:, None] * x, 0.0), axis=0)
            weights += tl.sum(cw)
        loss += weights * log_s + below
    return tl.where(counted, loss, 0.0), weight
