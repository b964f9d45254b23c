"""One step of the network in one program: convolution of both branches, ReLU, pool, code, Σ δ².

An implicit GEMM over NHWC maps, weightᵀ · mapᵀ: output channels by pixels, so that both operands
are read from shared memory and a thread holds whole windows of the pool. The carried map and δ
share every weight tile; what lies outside the image arrives as zeros, which is the padding. Only
what the next step and the backward read is written (eq. 6 and 7 of docs/math.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpl_fast.kernels.branches import max_window, pack_bits, pack_nibbles, relu_branches, windows
from gpl_fast.kernels.label_conv import list_tensors, listed
from gpl_fast.kernels.launch import POOL_NAMES, cdiv, launch, pair, rows_apart
from gpl_fast.stages import Listed
from gpl_fast.tiles import Tile


@triton.jit
def _load_tile(map_ptr, h, w, c, H, W, C):
    """(BLOCK_K, P) of a map (H, W, C), zeros outside; by pointers."""
    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
    at = (h * W + w).to(tl.int64) * C
    return tl.load(map_ptr + at[None, :] + c[:, None],
                   mask=inside[None, :] & (c < C)[:, None], other=0.0)  # fmt: skip


@triton.jit
def _pooled(h0, w0, rows, W, PH: tl.constexpr, PW: tl.constexpr):
    """Of a tile's windows: whether they are there, and their pixels in the pooled map."""
    pooled = tl.arange(0, PH * PW)
    i, j = h0 // 2 + pooled // PW, w0 // 2 + pooled % PW
    return (i < rows // 2) & (j < W // 2), (i * (W // 2) + j).to(tl.int64)


@triton.jit(
    do_not_specialize=[
        "a_size", "place", "a_rows", "d_rows", "y_rows", "delta_rows", "code_rows",
    ],
    # Of a chunk of images they begin anywhere, and each alignment would be another kernel.
    do_not_specialize_on_alignment=["from_target_ptr"],
)  # fmt: skip
def _conv_block_fwd_kernel(
    a_ptr, weight_ptr, bias_ptr,  # the carried map, or u; (K² C_IN, C_OUT); (C_OUT,) float32
    y_ptr, code_ptr,  # what the step puts out, NHWC; max: 4-bit codes, else 1-bit masks
    a_size, place,  # pairs: H_IN, W_IN; the image's row of the convolution's first, its rows
    a_rows, y_rows, code_rows,  # from one image to the next; of a list `a` has no others
    d_ptr, from_target_ptr, delta_ptr, d_rows, delta_rows,  # both branches: δ, (N,), δ
    partial_ptr,  # (N, programs of an image): Σ δ²
    list_ptrs,  # as `listed`
    FORM: tl.constexpr,  # "plain": a alone; "diff": a and d; "labels", "topk": a and a list
    C_IN: tl.constexpr, C_OUT: tl.constexpr, CLASSES: tl.constexpr, LISTED: tl.constexpr,
    K: tl.constexpr, STRIDE: tl.constexpr, PAD_H: tl.constexpr,
    RELU: tl.constexpr, POOL: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    H_IN, W_IN = a_size.to(tl.int32), (a_size >> 32).to(tl.int32)
    row0, image_rows = place.to(tl.int32), (place >> 32).to(tl.int32)
    rows = (H_IN + 2 * PAD_H - K) // STRIDE + 1
    W_OUT = (W_IN - 1) // STRIDE + 1
    # Programs on the same pixels are neighbours, so that their maps come from the L2 cache.
    n_blocks: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    n0 = (tl.program_id(0) % n_blocks) * BLOCK_N
    tile = tl.program_id(0) // n_blocks
    tiles_w = tl.cdiv(W_OUT, BLOCK_W)
    h0, w0 = (tile // tiles_w) * BLOCK_H, (tile % tiles_w) * BLOCK_W
    n = tl.program_id(1).to(tl.int64)
    pixel = tl.arange(0, BLOCK_H * BLOCK_W)
    h, w = h0 + pixel // BLOCK_W, w0 + pixel % BLOCK_W
    c = n0 + tl.arange(0, BLOCK_N)
    HAS_DIFF: tl.constexpr = FORM != "plain"
    HAS_LIST: tl.constexpr = FORM == "labels" or FORM == "topk"
    from_target = tl.zeros((1, 1), tl.int1)
    if HAS_DIFF:
        from_target = from_target | (tl.load(from_target_ptr + n) != 0)

    # (1) z = conv(a), dz = conv(δ)
    a_ptr += n * (H_IN if HAS_LIST else a_rows) * W_IN * C_IN
    if FORM == "diff":
        d_ptr += n * d_rows * W_IN * C_IN
    z = tl.zeros((BLOCK_N, BLOCK_H * BLOCK_W), tl.float32)
    dz = z
    k_blocks: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K
    if DESCRIPTORS:
        a_map = tl.make_tensor_descriptor(
            a_ptr, [H_IN, W_IN, C_IN], [W_IN * C_IN, C_IN, 1], [BLOCK_H, BLOCK_W, BLOCK_K]
        )
        d_map = a_map
        if FORM == "diff":
            d_map = tl.make_tensor_descriptor(
                d_ptr, [H_IN, W_IN, C_IN], [W_IN * C_IN, C_IN, 1], [BLOCK_H, BLOCK_W, BLOCK_K]
            )
        weights = tl.make_tensor_descriptor(
            weight_ptr, [K * K * C_IN, C_OUT], [C_OUT, 1], [BLOCK_K, BLOCK_N]
        )
        for i in range(0, K * K * k_blocks):
            tap, c0 = i // k_blocks, (i % k_blocks) * BLOCK_K
            at = [h0 + tap // K - PAD_H, w0 + tap % K - K // 2, c0]
            weight = weights.load([tap * C_IN + c0, n0]).T
            a = a_map.load(at).reshape(BLOCK_H * BLOCK_W, BLOCK_K).T
            z = tl.dot(weight, a, z, input_precision=PRECISION)
            if FORM == "diff":
                d = d_map.load(at).reshape(BLOCK_H * BLOCK_W, BLOCK_K).T
                dz = tl.dot(weight, d, dz, input_precision=PRECISION)
    else:
        for i in range(0, K * K * k_blocks):
            tap, c0 = i // k_blocks, (i % k_blocks) * BLOCK_K
            ci = c0 + tl.arange(0, BLOCK_K)
            hi, wi = h * STRIDE + tap // K - PAD_H, w * STRIDE + tap % K - K // 2
            row = (tap * C_IN + ci) * C_OUT
            inside = (c < C_OUT)[:, None] & (ci < C_IN)[None, :]
            weight = tl.load(weight_ptr + row[None, :] + c[:, None], mask=inside, other=0.0)
            a = _load_tile(a_ptr, hi, wi, ci, H_IN, W_IN, C_IN)
            z = tl.dot(weight, a, z, input_precision=PRECISION)
            if FORM == "diff":
                d = _load_tile(d_ptr, hi, wi, ci, H_IN, W_IN, C_IN)
                dz = tl.dot(weight, d, dz, input_precision=PRECISION)
    inside = (h < rows) & (w < W_OUT) & (row0 + h >= 0) & (row0 + h < image_rows)
    if HAS_LIST:
        z, dz = listed(
            z, n, row0 + h, w, inside, c, from_target, list_ptrs, (image_rows, W_OUT, CLASSES),
            LISTED, row0 + PAD_H - K // 2, H_IN, C_OUT, FORM == "labels", K,
        )  # fmt: skip
    if bias_ptr is not None:
        z += tl.load(bias_ptr + c, mask=c < C_OUT, other=0.0)[:, None]

    # (2) ReLU, pool, code; rows of a strip outside the image are zeros
    PH: tl.constexpr = BLOCK_H // 2
    PW: tl.constexpr = BLOCK_W // 2
    z = tl.where(inside[None, :], z, 0.0)
    if HAS_DIFF:
        dz = tl.where(inside[None, :], dz, 0.0)
    width = W_OUT
    if POOL == "max":
        z0, z1, z2, z3 = windows(z, BLOCK_N, PH, PW)
        d0, d1, d2, d3 = z0, z1, z2, z3
        if HAS_DIFF:
            d0, d1, d2, d3 = windows(dz, BLOCK_N, PH, PW)
        y, delta, code = max_window(z0, z1, z2, z3, d0, d1, d2, d3, from_target, HAS_DIFF)
        live, out = _pooled(h0, w0, rows, W_OUT, PH, PW)
        width = W_OUT // 2
        if code_ptr is not None:
            code_ptr += n * code_rows * width * ((C_OUT + 1) // 2)
            byte = n0 // 2 + tl.arange(0, BLOCK_N // 2)
            packed = pack_nibbles(tl.where((c < C_OUT)[:, None], code, 0), BLOCK_N, PH * PW)
            tl.store(code_ptr + out[None, :] * ((C_OUT + 1) // 2) + byte[:, None], packed,
                     mask=live[None, :] & (byte < (C_OUT + 1) // 2)[:, None])  # fmt: skip
    else:
        y, delta, prediction = z, dz, z
        if RELU:
            y, delta, prediction = relu_branches(z, dz, from_target, HAS_DIFF)
        live = (h < rows) & (w < W_OUT)
        out = (h * W_OUT + w).to(tl.int64)
        if code_ptr is not None:  # its first row is the strip's first inside the image
            code_ptr += n * code_rows * width * ((C_OUT + 7) // 8)
            byte = n0 // 8 + tl.arange(0, BLOCK_N // 8)
            on = ~(prediction <= 0) & (c < C_OUT)[:, None]
            at = ((h + tl.minimum(row0, 0)) * W_OUT + w).to(tl.int64)
            tl.store(code_ptr + at[None, :] * ((C_OUT + 7) // 8) + byte[:, None],
                     pack_bits(on, BLOCK_N, BLOCK_H * BLOCK_W),
                     mask=inside[None, :] & (byte < (C_OUT + 7) // 8)[:, None])  # fmt: skip
        if POOL == "avg":
            z0, z1, z2, z3 = windows(y, BLOCK_N, PH, PW)
            y = ((z0 + z1) + (z2 + z3)) * 0.25
            if HAS_DIFF:
                d0, d1, d2, d3 = windows(delta, BLOCK_N, PH, PW)
                delta = ((d0 + d1) + (d2 + d3)) * 0.25
            live, out = _pooled(h0, w0, rows, W_OUT, PH, PW)
            width = W_OUT // 2

    # (3) what the next step and the backward read
    store = live[None, :] & (c < C_OUT)[:, None]
    at = out[None, :] * C_OUT + c[:, None]
    if y_ptr is not None:
        y_ptr += n * y_rows * width * C_OUT
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=store)
    if HAS_DIFF:
        stored = delta.to(a_ptr.dtype.element_ty)
        if delta_ptr is not None:
            tl.store(delta_ptr + n * delta_rows * width * C_OUT + at, stored, mask=store)
        if partial_ptr is not None:
            d = tl.where(store, stored.to(tl.float32), 0.0)
            at = n * tl.num_programs(0) + tl.program_id(0)
            tl.store(partial_ptr + at, tl.sum(d * d))


def conv_block_fwd(
    a: Tensor, *, weight: Tensor, kernel_size: int, stride: int, relu: bool, pool: int, pad_h: int,
    row0: int, image_rows: int, tile: Tile, d: Tensor | None = None, bias: Tensor | None = None,
    from_target: Tensor | None = None, target: Listed | None = None, y: Tensor | None = None,
    delta: Tensor | None = None, code: Tensor | None = None, reduce: bool = False,
    allow_tf32: bool = True,
) -> Tensor | None:  # fmt: skip
    """`gpl_fast.stages.TritonStages.conv_block_fwd`."""
    n, h_in, w_in, c_in = a.shape
    c_out = weight.shape[1]
    rows = (h_in + 2 * pad_h - kernel_size) // stride + 1
    w_out = (w_in - 1) // stride + 1
    if n == 0 or rows <= 0 or w_out <= 0:
        return a.new_zeros((n, 1), dtype=torch.float32) if reduce else None
    blocks = cdiv(rows, tile.block_h) * cdiv(w_out, tile.block_w) * cdiv(c_out, tile.block_n)
    partial = a.new_empty((n, blocks), dtype=torch.float32) if reduce else None
    form = "plain" if d is None else "diff"
    if target is not None:
        form = "topk" if target.labels is None else "labels"
    launch(
        _conv_block_fwd_kernel,
        (blocks, n),
        a, weight, bias, y, code, pair(h_in, w_in), pair(row0, image_rows),
        rows_apart(a if target is None else None), rows_apart(y), rows_apart(code),
        d, from_target, delta, rows_apart(d), rows_apart(delta), partial,
        None if target is None else list_tensors(target),
        FORM=form, C_IN=c_in, C_OUT=c_out,
        CLASSES=None if target is None else target.table.shape[1],
        LISTED=None if target is None or target.values is None else target.values.shape[1],
        K=kernel_size, STRIDE=stride, PAD_H=pad_h, RELU=relu, POOL=POOL_NAMES[pool],
        DESCRIPTORS=tile.descriptors,
        PRECISION="tf32" if a.dtype != torch.float32 or allow_tf32 else "ieee",
        BLOCK_H=tile.block_h, BLOCK_W=tile.block_w, BLOCK_K=tile.block_k, BLOCK_N=tile.block_n,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return partial
