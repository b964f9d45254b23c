"""Logits -> the maps the network sees, and what the softmax's backward and the cross-entropy need.

Twin of ``csrc/cpu/softmax_pack.cpp``: the same arguments, the same meaning.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gpl_fast.kernels.launch import CLASSES, NONE, SOFTMAX, image_strides, launch


@triton.jit
def _activate(x, m, inv_t, ACTIVATION: tl.constexpr):
    """e^((x − m) / T) for softmax, sigmoid of x / T, or x / T itself; x in float32."""
    if ACTIVATION == 1:
        return tl.exp((x - m) * inv_t)
    if ACTIVATION == 2:
        return 1.0 / (1.0 + tl.exp(-(x * inv_t)))
    return x * inv_t


@triton.jit
def _load_logits(x_ptr, c, w, stride_c, stride_w, C, W, BLOCK_C: tl.constexpr):
    """A tile, (BLOCK_C, BLOCK_W) float32; −inf beyond the last class."""
    at = c[:, None].to(tl.int64) * stride_c + w[None, :].to(tl.int64) * stride_w
    inside = (c[:, None] < C) & (w[None, :] < W)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return tl.where(c[:, None] < C, x, float("-inf"))


@triton.jit
def _log_sum_exp(x_ptr, w, stride_c, stride_w, C, W, inv_t, BLOCK_C: tl.constexpr,
                 BLOCK_W: tl.constexpr):  # fmt: skip
    """(max, Σ e^((x − max) / T)) over the classes, (BLOCK_W,) each."""
    m = tl.full((BLOCK_W,), float("-inf"), tl.float32)
    s = tl.zeros((BLOCK_W,), tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        x = _load_logits(x_ptr, c, w, stride_c, stride_w, C, W, BLOCK_C)
        higher = tl.maximum(m, tl.max(x, axis=0))
        # −inf − −inf where every logit so far is −inf: s is 0 then, or NaN
        s = tl.where(m == float("-inf"), s, s * tl.exp((m - higher) * inv_t))
        e = tl.exp((x - higher[None, :]) * inv_t)
        s += tl.sum(tl.where(x == float("-inf"), 0.0, e), axis=0)
        m = higher
    return m, s


@triton.jit
def _cross_entropy(x_ptr, ce_labels_ptr, class_weight_ptr, at, w, inside, m, log_s, stride_c,
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
            x = m[None, :] - _load_logits(x_ptr, c, w, stride_c, stride_w, C, W, BLOCK_C)
            below += tl.sum(tl.where(c[:, None] < C, cw[:, None] * x, 0.0), axis=0)
            weights += tl.sum(cw)
        loss += weights * log_s + below
    return tl.where(counted, loss, 0.0), weight


@triton.jit
def _topk_tile(values_ptr, indices_ptr, rest_ptr, first, at, c, inside, plane, k,
               HAS_REST: tl.constexpr, FAR: tl.constexpr, BLOCK_C: tl.constexpr,
               BLOCK_W: tl.constexpr):  # fmt: skip
    """The target's map from its listed classes, (BLOCK_C, BLOCK_W)."""
    if FAR:  # in 32 bits the list's registers are fewer
        plane += tl.zeros((), tl.int64)
    t = tl.zeros((BLOCK_C, BLOCK_W), tl.float32)
    if HAS_REST:
        t += tl.load(rest_ptr + at, mask=inside, other=0.0)[None, :]
        for j in range(0, k):
            index = tl.load(indices_ptr + first + j * plane, mask=inside, other=-1)
            t = tl.where(c[:, None] == index[None, :], 0.0, t)
    for j in range(0, k):
        index = tl.load(indices_ptr + first + j * plane, mask=inside, other=-1)
        value = tl.load(values_ptr + first + j * plane, mask=inside, other=0.0)
        t += tl.where(c[:, None] == index[None, :], value[None, :], 0.0)
    return t


@triton.jit(
    do_not_specialize=["row0", "core0", "core_rows", "k"],
    # Of a chunk of images they begin anywhere, and each alignment would be another kernel.
    do_not_specialize_on_alignment=["from_target_ptr"],
)
def _softmax_pack_fwd_kernel(
    x_ptr,  # (N, C, H, W), any strides
    target_ptr,  # (N, C, H, W) or the same as x
    valid_ptr, from_target_ptr, labels_ptr,  # (N, H, W), (N,), (N, H, W)
    values_ptr, indices_ptr, rest_ptr,  # (N, k, H, W), (N, k, H, W), (N, H, W)
    ce_labels_ptr, class_weight_ptr, ce_rows_ptr,  # (N, H, W), (C,), (N, H, 2) float64
    y_ptr, delta_ptr, taken_ptr,  # (N, rows, W, C_PAD) twice, (N, rows, W)
    lse_ptr, ce_lse_ptr,  # (N, H, W)
    C, H, W, row0, core0, core_rows, k, inv_t, target_inv_t, lse_t, smoothing,
    x_n, x_c, x_h, x_w, t_n, t_c, t_h, t_w, topk_n, topk_k, y_n, delta_n,
    ACTIVATION: tl.constexpr, TARGET_ACTIVATION: tl.constexpr,
    KIND: tl.constexpr,  # 0 none, 1 dense, 2 labels, 3 top-k
    HAS_VALID: tl.constexpr, HAS_REST: tl.constexpr, FAR: tl.constexpr,  # ranks beyond 2^31
    HAS_LSE: tl.constexpr, HAS_CE: tl.constexpr, OWN_LSE: tl.constexpr, HAS_CE_LSE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, HAS_MAPS: tl.constexpr,
    C_PAD: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    r, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    h = row0 + r
    rows = tl.num_programs(0)
    in_image = (h >= 0) & (h < H)
    core = in_image & (h >= core0) & (h < core0 + core_rows)
    x_ptr += n * x_n + h.to(tl.int64) * x_h
    target_ptr += n * t_n + h.to(tl.int64) * t_h
    ce_sum = tl.zeros((BLOCK_W,), tl.float64)
    ce_weight = tl.zeros((BLOCK_W,), tl.float64)
    for w0 in range(0, W, BLOCK_W):
        w = w0 + tl.arange(0, BLOCK_W)
        inside = (w < W) & in_image
        width = tl.where(in_image, W, 0)  # nothing is read in a row outside the image
        at = (n * H + h) * W + w
        # (1) log-sum-exp, cross-entropy
        m, s = tl.zeros((BLOCK_W,), tl.float32), tl.full((BLOCK_W,), 1.0, tl.float32)
        if ACTIVATION == 1:
            m, s = _log_sum_exp(x_ptr, w, x_c, x_w, C, width, inv_t, BLOCK_C, BLOCK_W)
        if HAS_LSE:
            tl.store(lse_ptr + at, m + lse_t * tl.log(s), mask=inside & core)
        if HAS_CE:
            cm, cs = m, s
            if OWN_LSE:
                cm, cs = _log_sum_exp(x_ptr, w, x_c, x_w, C, width, 1.0, BLOCK_C, BLOCK_W)
            log_s = tl.log(cs)
            if HAS_CE_LSE:
                tl.store(ce_lse_ptr + at, cm + log_s, mask=inside & core)
            loss, weight = _cross_entropy(
                x_ptr, ce_labels_ptr, class_weight_ptr, at, w, inside & core, cm, log_s, x_c, x_w,
                C, width, smoothing, HAS_WEIGHT, SMOOTH, BLOCK_C, BLOCK_W,
            )  # fmt: skip
            ce_sum += loss.to(tl.float64)
            ce_weight += weight.to(tl.float64)
        if HAS_MAPS:
            # (2) y', the target, their difference                                            (6)
            keep = inside
            if HAS_VALID:
                keep = keep & (tl.load(valid_ptr + at, mask=inside, other=0) != 0)
            factor = 1.0 / s
            tm, t_factor = m, factor
            if KIND == 1 and TARGET_ACTIVATION == 1:
                tm, ts = _log_sum_exp(target_ptr, w, t_c, t_w, C, width, target_inv_t, BLOCK_C,
                                      BLOCK_W)  # fmt: skip
                t_factor = 1.0 / ts
            first = n * topk_n + h.to(tl.int64) * W + w
            take = tl.zeros((BLOCK_W,), tl.int1)
            label = tl.full((BLOCK_W,), -1, tl.int64)
            if KIND == 2:
                label = tl.load(labels_ptr + at, mask=keep, other=-1)
                known = keep & (label >= 0) & (label < C)
                here = tl.where(known, label, 0) * x_c + w.to(tl.int64) * x_w
                x_label = tl.load(x_ptr + here, mask=known, other=0.0).to(tl.float32)
                y_label = _activate(x_label, m, inv_t, ACTIVATION)
                if ACTIVATION == 1:
                    y_label *= factor
                take = known & (y_label > 0.5)
            if KIND == 3:
                # |y' − t|² < |y'|², that is Σ t (2y' − t) > 0
                gain = tl.zeros((BLOCK_W,), tl.float32)
                for c0 in range(0, C, BLOCK_C):
                    c = c0 + tl.arange(0, BLOCK_C)
                    x = _load_logits(x_ptr, c, w, x_c, x_w, C, width, BLOCK_C)
                    y = _activate(x, m[None, :], inv_t, ACTIVATION)
                    if ACTIVATION == 1:
                        y *= factor[None, :]
                    t = _topk_tile(values_ptr, indices_ptr, rest_ptr, first, at, c, keep, topk_k,
                                   k, HAS_REST, FAR, BLOCK_C, BLOCK_W)  # fmt: skip
                    gain += tl.sum(tl.where(c[:, None] < C, t * ((y - t) + y), 0.0), axis=0)
                take = keep & (gain > 0)
            if KIND >= 2:
                tl.store(taken_ptr + (n * rows + r) * W + w, take.to(tl.uint8), mask=w < W)
            for c0 in range(0, C_PAD, BLOCK_C):
                c = c0 + tl.arange(0, BLOCK_C)
                x = _load_logits(x_ptr, c, w, x_c, x_w, C, width, BLOCK_C)
                y = _activate(x, m[None, :], inv_t, ACTIVATION)
                if ACTIVATION == 1:
                    y *= factor[None, :]
                live = keep[None, :] & (c[:, None] < C)
                if KIND == 1:
                    x = _load_logits(target_ptr, c, w, t_c, t_w, C, width, BLOCK_C)
                    t = _activate(x, tm[None, :], target_inv_t, TARGET_ACTIVATION)
                    if TARGET_ACTIVATION == 1:
                        t *= t_factor[None, :]
                    d = tl.where(live, y - t, 0.0)
                    y = tl.where(tl.load(from_target_ptr + n) != 0, t, y)
                    out = (r * W + w[None, :]).to(tl.int64) * C_PAD + c[:, None]
                    inside_map = (w[None, :] < W) & (c[:, None] < C_PAD)
                    tl.store(delta_ptr + n * delta_n + out, d.to(delta_ptr.dtype.element_ty),
                             mask=inside_map)  # fmt: skip
                if KIND == 2:
                    one = (c[:, None] == label[None, :]) & take[None, :]
                    less = y - 1.0
                    if ACTIVATION == 2:  # where x is large, nothing of 1 − y' is left in y'
                        less = -_activate(-x, m[None, :], inv_t, ACTIVATION)
                    y = tl.where(one, less, y)
                if KIND == 3:
                    t = _topk_tile(values_ptr, indices_ptr, rest_ptr, first, at, c, keep, topk_k,
                                   k, HAS_REST, FAR, BLOCK_C, BLOCK_W)  # fmt: skip
                    y = tl.where(take[None, :], y - t, y)
                y = tl.where(live, y, 0.0)
                out = (r * W + w[None, :]).to(tl.int64) * C_PAD + c[:, None]
                tl.store(y_ptr + n * y_n + out, y.to(y_ptr.dtype.element_ty),
                         mask=(w[None, :] < W) & (c[:, None] < C_PAD))  # fmt: skip
    if HAS_CE and core:
        row = ce_rows_ptr + (n * H + h) * 2
        tl.store(row, tl.sum(ce_sum))
        tl.store(row + 1, tl.sum(ce_weight))


def inverse_of(temperature: float) -> float:
    """1 / T, in float32 finite and positive whatever T is: times 0 it is 0."""
    return 1.0 / min(max(temperature, 2.0**-126), 2.0**128)


def softmax_pack_fwd(
    x: Tensor,
    valid: Tensor | None,
    target: Tensor | None,
    from_target: Tensor | None,
    labels: Tensor | None,
    topk_values: Tensor | None,
    topk_indices: Tensor | None,
    topk_rest: Tensor | None,
    activation: int,
    target_activation: int,
    temperature: float,
    ce_labels: Tensor | None,
    class_weight: Tensor | None,
    label_smoothing: float,
    row0: int,
    rows: int,
    core0: int,
    core_rows: int,
    y: Tensor | None,
    delta: Tensor | None,
    taken: Tensor | None,
    lse: Tensor | None,
    ce_lse: Tensor | None,
    ce_rows: Tensor | None,
) -> None:
    """As the operator of this name in ``csrc/ops.cpp``."""
    n, channels, height, width = x.shape
    if n * channels * width * rows == 0:
        return
    kind = (
        1
        if target is not None
        else 2
        if labels is not None
        else 3
        if topk_values is not None
        else 0
    )
    c_pad = channels if y is None else y.shape[3]
    block_c = min(triton.next_power_of_2(c_pad), CLASSES)
    block_w = min(triton.next_power_of_2(width), 64 if block_c >= 32 else 256)
    own_lse = activation != SOFTMAX or temperature != 1.0
    inv_t = inverse_of(temperature)
    as_it_is = target_activation == NONE != activation
    topk_strides = (0, 0) if topk_values is None else topk_values.stride()[:2]
    launch(
        _softmax_pack_fwd_kernel,
        (rows, n),
        x,
        x if target is None else target,
        *(x if t is None else t for t in (valid, from_target, labels)),
        *(x if t is None else t for t in (topk_values, topk_indices, topk_rest)),
        *(x if t is None else t for t in (ce_labels, class_weight, ce_rows)),
        *(x if t is None else t for t in (y, delta, taken, lse, ce_lse)),
        channels, height, width, row0, core0, core_rows,
        0 if topk_values is None else topk_values.shape[1],
        inv_t, 1.0 if as_it_is else inv_t, min(temperature, 2.0**96), label_smoothing,
        *x.stride(), *(x if target is None else target).stride(), *topk_strides,
        *image_strides(y, delta),
        ACTIVATION=activation, TARGET_ACTIVATION=target_activation, KIND=kind,
        HAS_VALID=valid is not None, HAS_REST=topk_rest is not None,
        FAR=topk_values is not None and topk_values.shape[1] * topk_strides[1] >= 2**31,
        HAS_LSE=lse is not None, HAS_CE=ce_labels is not None,
        OWN_LSE=own_lse, HAS_CE_LSE=ce_lse is not None, HAS_WEIGHT=class_weight is not None,
        SMOOTH=label_smoothing != 0.0, HAS_MAPS=y is not None,
        C_PAD=c_pad, BLOCK_C=block_c, BLOCK_W=block_w,
        # A list's tile beside the logits' is too much for the registers of four warps.
        num_warps=8 if kind == 3 and block_c * block_w >= 4096 else 4, enable_fp_fusion=False,
    )  # fmt: skip
