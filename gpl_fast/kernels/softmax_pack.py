"""Logits -> the maps the network sees, and what the softmax's backward and the cross-entropy need.

Twin of ``csrc/cpu/softmax_pack.cpp``: the same arguments, the same meaning.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gpl_fast.kernels.launch import ACTIVATION_NAMES, image_strides, launch, pointers, ranks
from gpl_fast.kernels.logits import (
    activate,
    blocks,
    cross_entropy,
    inverse_of,
    less_one,
    load_logits,
    log_sum_exp,
)


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
    x_strides, target_strides, topk_strides, map_strides,  # n c h w, n c h w, n k, y delta
    ACTIVATION: tl.constexpr, TARGET_ACTIVATION: tl.constexpr,
    KIND: tl.constexpr,  # of the target: "", "dense", "labels" or "topk"
    HAS_VALID: tl.constexpr, HAS_REST: tl.constexpr, FAR: tl.constexpr,  # ranks beyond 2^31
    HAS_LSE: tl.constexpr, HAS_CE: tl.constexpr, OWN_LSE: tl.constexpr, HAS_CE_LSE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, HAS_MAPS: tl.constexpr,
    C_PAD: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    x_n, x_c, x_h, x_w = x_strides
    t_n, t_c, t_h, t_w = target_strides
    topk_n, topk_k = topk_strides
    y_n, delta_n = map_strides
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
        if ACTIVATION == "softmax":
            m, s = log_sum_exp(x_ptr, w, x_c, x_w, C, width, inv_t, BLOCK_C, BLOCK_W)
        if HAS_LSE:
            tl.store(lse_ptr + at, m + lse_t * tl.log(s), mask=inside & core)
        if HAS_CE:
            cm, cs = m, s
            if OWN_LSE:
                cm, cs = log_sum_exp(x_ptr, w, x_c, x_w, C, width, 1.0, BLOCK_C, BLOCK_W)
            log_s = tl.log(cs)
            if HAS_CE_LSE:
                tl.store(ce_lse_ptr + at, cm + log_s, mask=inside & core)
            loss, weight = cross_entropy(
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
            if KIND == "dense" and TARGET_ACTIVATION == "softmax":
                tm, ts = log_sum_exp(target_ptr, w, t_c, t_w, C, width, target_inv_t, BLOCK_C,
                                     BLOCK_W)  # fmt: skip
                t_factor = 1.0 / ts
            first = n * topk_n + h.to(tl.int64) * W + w
            take = tl.zeros((BLOCK_W,), tl.int1)
            label = tl.full((BLOCK_W,), -1, tl.int64)
            if KIND == "labels":
                label = tl.load(labels_ptr + at, mask=keep, other=-1)
                known = keep & (label >= 0) & (label < C)
                here = tl.where(known, label, 0) * x_c + w.to(tl.int64) * x_w
                x_label = tl.load(x_ptr + here, mask=known, other=0.0).to(tl.float32)
                y_label = activate(x_label, m, inv_t, ACTIVATION)
                if ACTIVATION == "softmax":
                    y_label *= factor
                take = known & (y_label > 0.5)
            if KIND == "topk":
                # |y' − t|² < |y'|², that is Σ t (2y' − t) > 0
                gain = tl.zeros((BLOCK_W,), tl.float32)
                for c0 in range(0, C, BLOCK_C):
                    c = c0 + tl.arange(0, BLOCK_C)
                    x = load_logits(x_ptr, c, w, x_c, x_w, C, width, BLOCK_C)
                    y = activate(x, m[None, :], inv_t, ACTIVATION)
                    if ACTIVATION == "softmax":
                        y *= factor[None, :]
                    t = _topk_tile(values_ptr, indices_ptr, rest_ptr, first, at, c, keep, topk_k,
                                   k, HAS_REST, FAR, BLOCK_C, BLOCK_W)  # fmt: skip
                    gain += tl.sum(tl.where(c[:, None] < C, t * ((y - t) + y), 0.0), axis=0)
                take = keep & (gain > 0)
            if KIND == "labels" or KIND == "topk":
                tl.store(taken_ptr + (n * rows + r) * W + w, take.to(tl.uint8), mask=w < W)
            for c0 in range(0, C_PAD, BLOCK_C):
                c = c0 + tl.arange(0, BLOCK_C)
                x = load_logits(x_ptr, c, w, x_c, x_w, C, width, BLOCK_C)
                y = activate(x, m[None, :], inv_t, ACTIVATION)
                if ACTIVATION == "softmax":
                    y *= factor[None, :]
                live = keep[None, :] & (c[:, None] < C)
                if KIND == "dense":
                    x = load_logits(target_ptr, c, w, t_c, t_w, C, width, BLOCK_C)
                    t = activate(x, tm[None, :], target_inv_t, TARGET_ACTIVATION)
                    if TARGET_ACTIVATION == "softmax":
                        t *= t_factor[None, :]
                    d = tl.where(live, y - t, 0.0)
                    y = tl.where(tl.load(from_target_ptr + n) != 0, t, y)
                    out = (r * W + w[None, :]).to(tl.int64) * C_PAD + c[:, None]
                    inside_map = (w[None, :] < W) & (c[:, None] < C_PAD)
                    tl.store(delta_ptr + n * delta_n + out, d.to(delta_ptr.dtype.element_ty),
                             mask=inside_map)  # fmt: skip
                if KIND == "labels":
                    one = (c[:, None] == label[None, :]) & take[None, :]
                    y = tl.where(one, less_one(y, x, inv_t, ACTIVATION), y)
                if KIND == "topk":
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


def softmax_pack_fwd(
    x: Tensor, *, activation: int, target_activation: int, temperature: float,
    label_smoothing: float = 0.0, row0: int, rows: int, core0: int, core_rows: int,
    valid: Tensor | None = None, target: Tensor | None = None, from_target: Tensor | None = None,
    labels: Tensor | None = None, topk_values: Tensor | None = None,
    topk_indices: Tensor | None = None, topk_rest: Tensor | None = None,
    ce_labels: Tensor | None = None, class_weight: Tensor | None = None, y: Tensor | None = None,
    delta: Tensor | None = None, taken: Tensor | None = None, lse: Tensor | None = None,
    ce_lse: Tensor | None = None, ce_rows: Tensor | None = None,
) -> None:  # fmt: skip
    """`gpl_fast.stages.Stages.softmax_pack_fwd`."""
    n, channels, height, width = x.shape
    if n * channels * width * rows == 0:
        return
    lists = {"dense": target, "labels": labels, "topk": topk_values}
    kind = next((name for name, t in lists.items() if t is not None), "")
    of_x, of_target = ACTIVATION_NAMES[activation], ACTIVATION_NAMES[target_activation]
    inv_t, as_it_is = inverse_of(temperature), of_target == "none" != of_x
    c_pad = channels if y is None else y.shape[3]
    block_c, block_w = blocks(c_pad, width)
    k, topk_strides = ranks(topk_values)
    launch(
        _softmax_pack_fwd_kernel,
        (rows, n),
        x,
        *pointers(x, target, valid, from_target, labels, topk_values, topk_indices, topk_rest),
        *pointers(x, ce_labels, class_weight, ce_rows, y, delta, taken, lse, ce_lse),
        channels, height, width, row0, core0, core_rows, k,
        inv_t, 1.0 if as_it_is else inv_t, min(temperature, 2.0**96), label_smoothing,
        x.stride(), (x if target is None else target).stride(), topk_strides,
        image_strides(y, delta),
        ACTIVATION=of_x, TARGET_ACTIVATION=of_target, KIND=kind,
        HAS_VALID=valid is not None, HAS_REST=topk_rest is not None,
        FAR=k * topk_strides[1] >= 2**31,
        HAS_LSE=lse is not None, HAS_CE=ce_labels is not None,
        OWN_LSE=of_x != "softmax" or temperature != 1.0, HAS_CE_LSE=ce_lse is not None,
        HAS_WEIGHT=class_weight is not None, SMOOTH=label_smoothing != 0.0,
        HAS_MAPS=y is not None, C_PAD=c_pad, BLOCK_C=block_c, BLOCK_W=block_w,
        # A list's tile beside the logits' is too much for the registers of four warps.
        num_warps=8 if kind == "topk" and block_c * block_w >= 4096 else 4, enable_fp_fusion=False,
    )  # fmt: skip
