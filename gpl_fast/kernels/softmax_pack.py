"""Logits -> the maps the network sees, and what the softmax's backward and the cross-entropy need.

Twin of ``csrc/cpu/softmax_pack.cpp``: the same arguments, the same meaning.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpl_fast.kernels.class_maps import (
    load_elements,
    store_map,
    store_zeros,
    topk_tile,
    weight_of,
    zeroed,
)
from gpl_fast.kernels.launch import ACTIVATION_NAMES, cdiv, launch
from gpl_fast.kernels.logits import (
    hold_logits,
    inverse_of,
    layout_of,
    logits_of,
    row_of,
    tiling,
)
from gpl_fast.kernels.row_sums import row_sums
from gpl_fast.kernels.softmax import activate, cross_entropy, less_one, log_sum_exp

MOST_LSE_T = tl.constexpr(2.0**96)


@triton.jit
def _activated(x, m, factor, inv_t, ACTIVATION: tl.constexpr):
    """y' of a tile."""
    y = activate(x, m[None, :], inv_t, ACTIVATION)
    if ACTIVATION == "softmax":
        y *= factor[None, :]
    return y


@triton.jit(
    do_not_specialize=["H", "row0", "core0", "core_rows"],
    # Of a chunk of images they begin anywhere, and each alignment would be another kernel.
    do_not_specialize_on_alignment=["from_target_ptr"],
)
def _softmax_pack_fwd_kernel(
    x_ptr, target_ptr, elements_ptr,  # (N, C, H, W), any strides; the last's rows contiguous
    valid_ptr, from_target_ptr, labels_ptr,  # (N, H, W), (N,), (N, H, W)
    values_ptr, indices_ptr, rest_ptr,  # (N, K, H, W), (N, K, H, W), (N, H, W)
    ce_labels_ptr, ce_mask_ptr, class_weight_ptr,  # (N, H, W) twice, (C,)
    ce_ptr,  # (N, H, tiles, 2) float64
    y_ptr, delta_ptr, taken_ptr,  # (N, rows, W, C_PAD) twice, (N, rows, W)
    lse_ptr, ce_lse_ptr,  # (N, H, W)
    H, W, row0, core0, core_rows, inv_t, y_n, delta_n, topk_n, topk_k, elements_n, elements_c,
    x_strides, target_strides,
    C: tl.constexpr, K: tl.constexpr, SMOOTHING: tl.constexpr,
    ACTIVATION: tl.constexpr, TARGET_ACTIVATION: tl.constexpr, AS_IT_IS: tl.constexpr,
    OWN_LSE: tl.constexpr, FAR: tl.constexpr,  # ranks beyond 2^31
    LAYOUT: tl.constexpr, TARGET_LAYOUT: tl.constexpr, HELD: tl.constexpr, TILES: tl.constexpr,
    WHOLE: tl.constexpr, C_PAD: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(W, BLOCK_W)
    r, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    n = tl.program_id(1).to(tl.int64)
    h = row0 + r
    w = tile * BLOCK_W + tl.arange(0, BLOCK_W)
    on_map = w < W
    out = (r * W + w).to(tl.int64) * C_PAD
    if y_ptr is not None:
        y_ptr += n * y_n
    if delta_ptr is not None:
        delta_ptr += n * (y_n if delta_n is None else delta_n)
    if taken_ptr is not None:
        taken_ptr += n * (y_n // C_PAD) + r * W + w
    if (h < 0) | (h >= H):
        if y_ptr is not None:
            store_zeros(y_ptr, out, on_map, C_PAD, BLOCK_C, BLOCK_W)
        if delta_ptr is not None:
            store_zeros(delta_ptr, out, on_map, C_PAD, BLOCK_C, BLOCK_W)
        if taken_ptr is not None:
            tl.store(taken_ptr, tl.zeros((BLOCK_W,), tl.uint8), mask=on_map)
        return
    at = (n * H + h) * W + w
    in_core = h == h
    if core0 is not None:
        in_core = (h >= core0) & (h < core0 + core_rows)
    core = on_map & in_core
    x_row, x_c, x_w = row_of(x_ptr, x_strides, n, h, C, W, LAYOUT)
    xs = hold_logits(x_row, w, on_map, x_c, x_w, C, LAYOUT, HELD, TILES, WHOLE,
                     BLOCK_C)  # fmt: skip
    # (1) log-sum-exp, cross-entropy
    by = 1.0 if inv_t is None else inv_t
    m, s = tl.zeros((BLOCK_W,), tl.float32), tl.full((BLOCK_W,), 1.0, tl.float32)
    if ACTIVATION == "softmax":
        m, s = log_sum_exp(xs, x_row, w, on_map, x_c, x_w, by, C, LAYOUT, HELD, TILES, BLOCK_C)
    if lse_ptr is not None:
        # Times any log sum it is less than half an ulp of float's largest number.
        lse_t = 1.0 if inv_t is None else tl.minimum(tl.div_rn(1.0, inv_t), MOST_LSE_T)
        tl.store(lse_ptr + at, m + lse_t * tl.log(s), mask=core)
    if ce_labels_ptr is not None:
        cm, cs = m, s
        if OWN_LSE:
            cm, cs = log_sum_exp(xs, x_row, w, on_map, x_c, x_w, 1.0, C, LAYOUT, HELD, TILES,
                                 BLOCK_C)  # fmt: skip
        log_s = tl.log(cs)
        if ce_lse_ptr is not None:
            tl.store(ce_lse_ptr + at, cm + log_s, mask=core)
        loss, weight = cross_entropy(
            xs, x_row, ce_labels_ptr, ce_mask_ptr, class_weight_ptr, at, w, core, cm, log_s, x_c,
            x_w, SMOOTHING, C, LAYOUT, HELD, TILES, BLOCK_C,
        )  # fmt: skip
        part = ce_ptr + ((n * H + h) * tiles + tile) * 2
        tl.store(part, tl.sum(loss.to(tl.float64)), mask=in_core)
        tl.store(part + 1, tl.sum(weight.to(tl.float64)), mask=in_core)
    if y_ptr is None:
        return
    # (2) y', the target, their difference, eq. (6)
    keep, of_pixel = on_map, s
    if valid_ptr is not None:
        keep, of_pixel = weight_of(valid_ptr, at, on_map)
    factor = 1.0 / s
    ts = ()
    if target_ptr is not None:
        t_row, t_c, t_w = row_of(target_ptr, x_strides if target_strides is None else
                                 target_strides, n, h, C, W, TARGET_LAYOUT)  # fmt: skip
        ts = hold_logits(t_row, w, on_map, t_c, t_w, C, TARGET_LAYOUT, HELD, TILES, WHOLE,
                         BLOCK_C)  # fmt: skip
        t_by = 1.0 if AS_IT_IS else by
        tm, t_factor = m, factor
        if TARGET_ACTIVATION == "softmax":
            tm, t_s = log_sum_exp(ts, t_row, w, on_map, t_c, t_w, t_by, C, TARGET_LAYOUT, HELD,
                                  TILES, BLOCK_C)  # fmt: skip
            t_factor = 1.0 / t_s
        carried = tl.load(from_target_ptr + n) != 0
    if labels_ptr is not None:
        label = tl.load(labels_ptr + at, mask=keep, other=-1)
        known = keep & (label >= 0) & (label < C)
        of_label = x_row + tl.where(known, label, 0) * x_c + w.to(tl.int64) * x_w
        x_label = tl.load(of_label, mask=known, other=0.0).to(tl.float32)
        y_label = activate(x_label, m, by, ACTIVATION)
        if ACTIVATION == "softmax":
            y_label *= factor
        take = known & (y_label > 0.5)
        y_label = less_one(y_label, x_label, by, ACTIVATION)
    if values_ptr is not None:
        # |y' − t|² < |y'|², that is Σ t (2y' − t) > 0
        gain = tl.zeros((BLOCK_W,), tl.float32)
        first = (n * K * topk_k if topk_n is None else n * topk_n) + h.to(tl.int64) * W + w
        for c0 in range(0, C, TILES * BLOCK_C):
            for i in tl.static_range(TILES):
                c = c0 + i * BLOCK_C + tl.arange(0, BLOCK_C)
                x = logits_of(xs, i, x_row, c0, w, on_map, x_c, x_w, C, LAYOUT, HELD, BLOCK_C)
                y = _activated(x, m, factor, by, ACTIVATION)
                t = topk_tile(values_ptr, indices_ptr, rest_ptr, first, at, c, keep, topk_k, K,
                               FAR, BLOCK_C, BLOCK_W)  # fmt: skip
                gain += tl.sum(tl.where(c[:, None] < C, t * ((y - t) + y), 0.0), axis=0)
        take = keep & (gain > 0)
    if taken_ptr is not None:
        tl.store(taken_ptr, take.to(tl.uint8), mask=on_map)
    for c0 in range(0, C_PAD, TILES * BLOCK_C):
        for i in tl.static_range(TILES):
            c = c0 + i * BLOCK_C + tl.arange(0, BLOCK_C)
            x = logits_of(xs, i, x_row, c0, w, on_map, x_c, x_w, C, LAYOUT, HELD, BLOCK_C)
            y = _activated(x, m, factor, by, ACTIVATION)
            if target_ptr is not None:
                x = logits_of(ts, i, t_row, c0, w, on_map, t_c, t_w, C, TARGET_LAYOUT, HELD,
                              BLOCK_C)  # fmt: skip
                t = _activated(x, tm, t_factor, t_by, TARGET_ACTIVATION)
                if elements_ptr is not None:
                    row = elements_ptr + n * elements_n + h.to(tl.int64) * W
                    there = load_elements(row, c, w, on_map, elements_c, C) < 2
                    y, t = tl.where(there, y, 0.0), tl.where(there, t, 0.0)
                d = zeroed(y - t, c, valid_ptr, keep, of_pixel, C, i < WHOLE)
                y = tl.where(carried, t, y)
                store_map(delta_ptr, out, d, c, on_map, C_PAD, i < WHOLE)
            if labels_ptr is not None:
                one = (c[:, None] == label[None, :]) & take[None, :]
                y = tl.where(one, y_label[None, :], y)
            if values_ptr is not None:
                t = topk_tile(values_ptr, indices_ptr, rest_ptr, first, at, c, keep, topk_k, K,
                               FAR, BLOCK_C, BLOCK_W)  # fmt: skip
                y = tl.where(take[None, :], y - t, y)
            y = zeroed(y, c, valid_ptr, keep, of_pixel, C, i < WHOLE)
            store_map(y_ptr, out, y, c, on_map, C_PAD, i < WHOLE)


def softmax_pack_fwd(
    x: Tensor, *, activation: int, target_activation: int, temperature: float,
    label_smoothing: float = 0.0, row0: int, rows: int, core0: int, core_rows: int,
    valid: Tensor | None = None, target: Tensor | None = None, elements: Tensor | None = None,
    from_target: Tensor | None = None, labels: Tensor | None = None,
    topk_values: Tensor | None = None, topk_indices: Tensor | None = None,
    topk_rest: Tensor | None = None, ce_labels: Tensor | None = None,
    ce_mask: Tensor | None = None, class_weight: Tensor | None = None, y: Tensor | None = None,
    delta: Tensor | None = None, taken: Tensor | None = None, lse: Tensor | None = None,
    ce_lse: Tensor | None = None, ce_rows: Tensor | None = None,
) -> None:  # fmt: skip
    """`gpl_fast.stages.Stages.softmax_pack_fwd`."""
    n, channels, height, width = x.shape
    if n * channels * width * rows == 0:
        return
    of_x, of_target = ACTIVATION_NAMES[activation], ACTIVATION_NAMES[target_activation]
    c_pad = channels if y is None else y.shape[3]
    how = tiling(channels, c_pad, width)
    tiles = cdiv(width, how["BLOCK_W"])
    strip = max(row0, 0), min(row0 + rows, height)
    core = max(strip[0], core0), min(strip[1], core0 + core_rows)
    whole = core == strip or (ce_labels is None and lse is None)
    parts = ce_rows
    if ce_labels is not None and tiles > 1:
        parts = torch.empty((n, height, tiles, 2), dtype=torch.float64, device=x.device)
    layout, strides = layout_of(x)
    of_list: dict[str, int | None] = {"K": 0, "topk_n": None, "topk_k": None, "FAR": False}
    if topk_values is not None:
        k, (image, rank) = topk_values.shape[1], topk_values.stride()[:2]
        of_list = {"K": k, "topk_n": image, "topk_k": rank, "FAR": k * rank >= 2**31}
        if n == 1 or image == k * rank:
            of_list["topk_n"] = None
    y_n, delta_n = (None if t is None else t.stride(0) for t in (y, delta))
    if delta_n == y_n:
        delta_n = None
    target_layout, target_strides = layout_of(x if target is None else target)
    launch(
        _softmax_pack_fwd_kernel,
        (rows * tiles, n),
        x, target, elements, valid, from_target, labels, topk_values, topk_indices, topk_rest,
        ce_labels, ce_mask, class_weight, parts, y, delta, taken, lse, ce_lse, height, width, row0,
        None if whole else core0, None if whole else core_rows,
        inv_t=None if temperature == 1.0 else inverse_of(temperature),
        y_n=y_n, delta_n=delta_n,
        elements_n=None if elements is None else elements.stride(0),
        elements_c=None if elements is None else elements.stride(1),
        x_strides=strides,
        target_strides=None if target_strides == strides else target_strides,
        C=channels, SMOOTHING=label_smoothing, **of_list,
        ACTIVATION=of_x, TARGET_ACTIVATION=of_target, AS_IT_IS=of_target == "none" != of_x,
        OWN_LSE=of_x != "softmax" or temperature != 1.0, LAYOUT=layout,
        TARGET_LAYOUT=target_layout, C_PAD=c_pad, **how, enable_fp_fusion=False,
    )  # fmt: skip
    if parts is not None and ce_rows is not None and parts is not ce_rows and core[0] < core[1]:
        row_sums(parts, ce_rows, core[0], core[1] - core[0])
