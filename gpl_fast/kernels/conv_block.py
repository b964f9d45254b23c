"""One step of the network in one program: convolution of both branches, ReLU, pool, code, Σ δ².

An implicit GEMM over NHWC maps. The carried map and δ share every weight tile; what lies outside
the image arrives as zeros, which is the padding. Only what the next step and the backward read is
written (eq. 6 and 7 of docs/math.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpl_fast.kernels.branches import max_window, pack_bits, pack_nibbles, relu_branches, windows
from gpl_fast.kernels.label_conv import list_arguments, listed
from gpl_fast.kernels.launch import POOL_NAMES, cdiv, image_strides, launch, pointers
from gpl_fast.stages import Listed
from gpl_fast.tiles import Tile


@triton.jit
def _load_tile(map_ptr, h, w, c, H, W, C):
    """(P, BLOCK_K) of a map (H, W, C), zeros outside; by pointers."""
    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
    at = (h * W + w).to(tl.int64) * C
    return tl.load(map_ptr + at[:, None] + c[None, :],
                   mask=inside[:, None] & (c < C)[None, :], other=0.0)  # fmt: skip


@triton.jit
def _pooled(h0, w0, rows, W, PH: tl.constexpr, PW: tl.constexpr):
    """Of a tile's windows: whether they are there, and their pixels in the pooled map."""
    pooled = tl.arange(0, PH * PW)
    i, j = h0 // 2 + pooled // PW, w0 // 2 + pooled % PW
    return (i < rows // 2) & (j < W // 2), (i * (W // 2) + j).to(tl.int64)


@triton.jit(
    do_not_specialize=["row0", "code_row0", "taken_row0", "k"],
    # Of a chunk of images they begin anywhere, and each alignment would be another kernel.
    do_not_specialize_on_alignment=["from_target_ptr"],
)
def _conv_block_fwd_kernel(
    a_ptr, d_ptr,  # (N, H_IN, W_IN, C_IN): the carried map and δ; a alone: plain, or u of a list
    weight_ptr, bias_ptr,  # (K² C_IN, C_OUT), (C_OUT,) float32
    from_target_ptr,  # (N,)
    y_ptr, delta_ptr,  # what the step puts out, NHWC
    code_ptr,  # max: (N, rows // 2, W // 2, ⌈C/2⌉), else the mask (N, code_rows, W, ⌈C/8⌉)
    partial_ptr,  # (N, programs of an image): Σ δ²
    labels_ptr, values_ptr, indices_ptr, rest_ptr, valid_ptr, taken_ptr,
    table_ptr, interior_ptr, rest_table_ptr,
    H_IN, W_IN, C_IN, C_OUT,
    rows, W_OUT, image_rows, row0, pad_h, code_row0, code_rows,  # of the convolution, its mask
    list_size, k, list_strides, taken_row0, taken_rows,  # with what is before: as `listed`
    map_strides,  # from one image to the next: of a, d, y, delta, code
    FORM: tl.constexpr,  # "plain": a alone; "diff": a and d; "labels", "topk": a and a list
    K: tl.constexpr, STRIDE: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_Y: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_CODE: tl.constexpr,
    HAS_PARTIAL: tl.constexpr, HAS_VALID: tl.constexpr, HAS_REST: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EIGHTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    a_n, d_n, y_n, delta_n, code_n = map_strides
    if EIGHTS:
        C_IN = C_IN // 8 * 8  # what the compiler has to know of 8 channels to load them at once
    # Programs on the same pixels are neighbours, so that their maps come from the L2 cache.
    n_blocks = tl.cdiv(C_OUT, BLOCK_N)
    n0 = (tl.program_id(0) % n_blocks) * BLOCK_N
    tile = tl.program_id(0) // n_blocks
    tiles_w = tl.cdiv(W_OUT, BLOCK_W)
    h0, w0 = (tile // tiles_w) * BLOCK_H, (tile % tiles_w) * BLOCK_W
    n = tl.program_id(1).to(tl.int64)
    pixel = tl.arange(0, BLOCK_H * BLOCK_W)
    h, w = h0 + pixel // BLOCK_W, w0 + pixel % BLOCK_W
    c = n0 + tl.arange(0, BLOCK_N)
    from_target = tl.zeros((1, 1), tl.int1)
    if FORM != "plain":
        from_target = from_target | (tl.load(from_target_ptr + n) != 0)

    # (1) z = conv(a), dz = conv(δ)
    a_ptr += n * a_n
    d_ptr += n * d_n
    z = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_N), tl.float32)
    dz = z
    k_blocks = tl.cdiv(C_IN, BLOCK_K)
    if DESCRIPTORS:
        a_map = tl.make_tensor_descriptor(
            a_ptr, [H_IN, W_IN, C_IN], [W_IN * C_IN, C_IN, 1], [BLOCK_H, BLOCK_W, BLOCK_K]
        )
        d_map = tl.make_tensor_descriptor(
            d_ptr, [H_IN, W_IN, C_IN], [W_IN * C_IN, C_IN, 1], [BLOCK_H, BLOCK_W, BLOCK_K]
        )
        weights = tl.make_tensor_descriptor(
            weight_ptr, [K * K * C_IN, C_OUT], [C_OUT, 1], [BLOCK_K, BLOCK_N]
        )
        for i in range(0, K * K * k_blocks):
            tap, c0 = i // k_blocks, (i % k_blocks) * BLOCK_K
            at = [h0 + tap // K - pad_h, w0 + tap % K - K // 2, c0]
            weight = weights.load([tap * C_IN + c0, n0])
            a = a_map.load(at).reshape(BLOCK_H * BLOCK_W, BLOCK_K)
            z = tl.dot(a, weight, z, input_precision=PRECISION)
            if FORM == "diff":
                d = d_map.load(at).reshape(BLOCK_H * BLOCK_W, BLOCK_K)
                dz = tl.dot(d, weight, dz, input_precision=PRECISION)
    else:
        for i in range(0, K * K * k_blocks):
            tap, c0 = i // k_blocks, (i % k_blocks) * BLOCK_K
            ci = c0 + tl.arange(0, BLOCK_K)
            hi, wi = h * STRIDE + tap // K - pad_h, w * STRIDE + tap % K - K // 2
            row = (tap * C_IN + ci) * C_OUT
            inside = (ci < C_IN)[:, None] & (c < C_OUT)[None, :]
            weight = tl.load(weight_ptr + row[:, None] + c[None, :], mask=inside, other=0.0)
            a = _load_tile(a_ptr, hi, wi, ci, H_IN, W_IN, C_IN)
            z = tl.dot(a, weight, z, input_precision=PRECISION)
            if FORM == "diff":
                d = _load_tile(d_ptr, hi, wi, ci, H_IN, W_IN, C_IN)
                dz = tl.dot(d, weight, dz, input_precision=PRECISION)
    inside = (h < rows) & (w < W_OUT) & (row0 + h >= 0) & (row0 + h < image_rows)
    if FORM == "labels" or FORM == "topk":
        z, dz = listed(
            z, n, row0 + h, w, inside, c, from_target, labels_ptr, values_ptr, indices_ptr,
            rest_ptr, valid_ptr, taken_ptr, table_ptr, interior_ptr, rest_table_ptr,
            list_size, k, list_strides, taken_row0, taken_rows, C_OUT, FORM == "labels",
            HAS_VALID, HAS_REST, K,
        )  # fmt: skip
    if HAS_BIAS:
        z += tl.load(bias_ptr + c, mask=c < C_OUT, other=0.0)[None, :]

    # (2) ReLU, pool, code; rows of a strip outside the image are zeros
    HAS_DIFF: tl.constexpr = FORM != "plain"
    PH: tl.constexpr = BLOCK_H // 2
    PW: tl.constexpr = BLOCK_W // 2
    z = tl.where(inside[:, None], z, 0.0)
    if HAS_DIFF:
        dz = tl.where(inside[:, None], dz, 0.0)
    if POOL == "max":
        z0, z1, z2, z3 = windows(z, PH, PW, BLOCK_N)
        d0, d1, d2, d3 = z0, z1, z2, z3
        if HAS_DIFF:
            d0, d1, d2, d3 = windows(dz, PH, PW, BLOCK_N)
        y, delta, code = max_window(z0, z1, z2, z3, d0, d1, d2, d3, from_target, HAS_DIFF)
        live, out = _pooled(h0, w0, rows, W_OUT, PH, PW)
        if HAS_CODE:
            width = tl.cdiv(C_OUT, 2)
            byte = n0 // 2 + tl.arange(0, BLOCK_N // 2)
            packed = pack_nibbles(tl.where((c < C_OUT)[None, :], code, 0), PH * PW, BLOCK_N)
            tl.store(code_ptr + n * code_n + out[:, None] * width + byte[None, :], packed,
                     mask=live[:, None] & (byte < width)[None, :])  # fmt: skip
    else:
        y, delta, prediction = z, dz, z
        if RELU:
            y, delta, prediction = relu_branches(z, dz, from_target, HAS_DIFF)
        live = (h < rows) & (w < W_OUT)
        out = (h * W_OUT + w).to(tl.int64)
        if HAS_CODE:
            width = tl.cdiv(C_OUT, 8)
            byte = n0 // 8 + tl.arange(0, BLOCK_N // 8)
            on = ~(prediction <= 0) & (c < C_OUT)[None, :]
            r = h - code_row0
            at = (r * W_OUT + w).to(tl.int64)
            seen = live & (r >= 0) & (r < code_rows)
            tl.store(code_ptr + n * code_n + at[:, None] * width + byte[None, :],
                     pack_bits(on, BLOCK_H * BLOCK_W, BLOCK_N),
                     mask=seen[:, None] & (byte < width)[None, :])  # fmt: skip
        if POOL == "avg":
            z0, z1, z2, z3 = windows(y, PH, PW, BLOCK_N)
            y = ((z0 + z1) + (z2 + z3)) * 0.25
            if HAS_DIFF:
                d0, d1, d2, d3 = windows(delta, PH, PW, BLOCK_N)
                delta = ((d0 + d1) + (d2 + d3)) * 0.25
            live, out = _pooled(h0, w0, rows, W_OUT, PH, PW)

    # (3) what the next step and the backward read
    store = live[:, None] & (c < C_OUT)[None, :]
    if HAS_Y:
        tl.store(y_ptr + n * y_n + out[:, None] * C_OUT + c[None, :],
                 y.to(y_ptr.dtype.element_ty), mask=store)  # fmt: skip
    if HAS_DIFF:
        stored = delta.to(d_ptr.dtype.element_ty)
        if HAS_DELTA:
            tl.store(
                delta_ptr + n * delta_n + out[:, None] * C_OUT + c[None, :], stored, mask=store
            )
        if HAS_PARTIAL:
            d = tl.where(store, stored.to(tl.float32), 0.0)
            at = n * tl.num_programs(0) + tl.program_id(0)
            tl.store(partial_ptr + at, tl.sum(d * d))


def conv_block_fwd(
    a: Tensor, *, weight: Tensor, kernel_size: int, stride: int, relu: bool, pool: int, pad_h: int,
    row0: int, image_rows: int, tile: Tile, d: Tensor | None = None, bias: Tensor | None = None,
    from_target: Tensor | None = None, target: Listed | None = None, y: Tensor | None = None,
    delta: Tensor | None = None, code: Tensor | None = None, code_row0: int = 0,
    reduce: bool = False, allow_tf32: bool = True,
) -> Tensor | None:  # fmt: skip
    """`gpl_fast.stages.TritonStages.conv_block_fwd`."""
    n, h_in, w_in, c_in = a.shape
    c_out = weight.shape[1]
    rows = (h_in + 2 * pad_h - kernel_size) // stride + 1
    w_out = (w_in + 2 * (kernel_size // 2) - kernel_size) // stride + 1
    if n == 0 or rows <= 0 or w_out <= 0:
        return a.new_zeros((n, 1), dtype=torch.float32) if reduce else None
    form = "plain" if d is None else "diff"
    if target is not None:
        form = "topk" if target.labels is None else "labels"
    lists, numbers = list_arguments(target, a)
    blocks = cdiv(rows, tile.block_h) * cdiv(w_out, tile.block_w) * cdiv(c_out, tile.block_n)
    partial = a.new_empty((n, blocks), dtype=torch.float32) if reduce else None
    launch(
        _conv_block_fwd_kernel,
        (blocks, n),
        a, a if d is None else d, weight,
        *pointers(a, bias, from_target, y, delta, code, partial),
        *lists,
        h_in, w_in, c_in, c_out, rows, w_out, image_rows, row0, pad_h, code_row0,
        0 if code is None else code.shape[1], *numbers, image_strides(a, d, y, delta, code),
        K=kernel_size, STRIDE=stride, FORM=form, RELU=relu, POOL=POOL_NAMES[pool],
        HAS_BIAS=bias is not None, HAS_Y=y is not None, HAS_DELTA=delta is not None,
        HAS_CODE=code is not None, HAS_PARTIAL=reduce,
        HAS_VALID=target is not None and target.valid is not None,
        HAS_REST=target is not None and target.rest is not None,
        DESCRIPTORS=tile.descriptors, EIGHTS=c_in % 8 == 0,
        PRECISION="tf32" if a.dtype != torch.float32 or allow_tf32 else "ieee",
        BLOCK_H=tile.block_h, BLOCK_W=tile.block_w, BLOCK_K=tile.block_k, BLOCK_N=tile.block_n,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return partial
