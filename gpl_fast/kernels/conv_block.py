"""One step of the network in one program: convolution of both branches, ReLU, pool, code, Σ δ².

An implicit GEMM over NHWC maps. The carried map and δ share every weight tile; what lies outside
the image arrives as zeros, which is the padding. Only what the next step and the backward read is
written (eq. 6 and 7 of docs/math.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpl_fast.kernels.branches import max_window, pack_bits, pack_nibbles, relu_branches
from gpl_fast.kernels.label_conv import listed
from gpl_fast.kernels.launch import cdiv, image_strides, launch
from gpl_fast.kernels.tiles import tile_for
from gpl_fast.precision import tf32_allowed

NO_POOL = 2  # beside launch.MAX and AVG
PLAIN, DIFF, LABELS, TOPK = 0, 1, 2, 3


@triton.jit
def _windows(z, PH: tl.constexpr, PW: tl.constexpr, BLOCK_N: tl.constexpr):
    """(2 PH * 2 PW, BLOCK_N) -> the four positions of each window, (PH * PW, BLOCK_N) each."""
    z = z.reshape(PH, 2, PW, 2, BLOCK_N).permute(0, 2, 4, 1, 3)
    left, right = tl.split(z)
    z0, z2 = tl.split(left)
    z1, z3 = tl.split(right)
    return (z0.reshape(PH * PW, BLOCK_N), z1.reshape(PH * PW, BLOCK_N),
            z2.reshape(PH * PW, BLOCK_N), z3.reshape(PH * PW, BLOCK_N))  # fmt: skip


@triton.jit
def _load_tile(map_ptr, h, w, c, H, W, C):
    """(P, BLOCK_K) of a map (H, W, C), zeros outside; by pointers."""
    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
    at = (h * W + w).to(tl.int64) * C
    return tl.load(map_ptr + at[:, None] + c[None, :],
                   mask=inside[:, None] & (c < C)[None, :], other=0.0)  # fmt: skip


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
    rows, W_OUT, image_rows, row0, pad_h,  # of the convolution: row0 is its first in the image
    code_row0, code_rows,
    H, W, C, k, topk_n, topk_k, taken_row0, taken_rows,  # of the list
    a_n, d_n, y_n, delta_n, code_n,
    K: tl.constexpr, STRIDE: tl.constexpr, FORM: tl.constexpr, RELU: tl.constexpr,
    POOL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_Y: tl.constexpr, HAS_DELTA: tl.constexpr,
    HAS_CODE: tl.constexpr, HAS_PARTIAL: tl.constexpr, HAS_VALID: tl.constexpr,
    HAS_REST: tl.constexpr, DESCRIPTORS: tl.constexpr, EIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
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
    if FORM != 0:
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
            if FORM == 1:
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
            if FORM == 1:
                d = _load_tile(d_ptr, hi, wi, ci, H_IN, W_IN, C_IN)
                dz = tl.dot(d, weight, dz, input_precision=PRECISION)
    inside = (h < rows) & (w < W_OUT) & (row0 + h >= 0) & (row0 + h < image_rows)
    if FORM >= 2:
        z, dz = listed(
            z, n, row0 + h, w, inside, c, from_target, labels_ptr, values_ptr, indices_ptr,
            rest_ptr, valid_ptr, taken_ptr, table_ptr, interior_ptr, rest_table_ptr, H, W, C,
            C_OUT, k, topk_n, topk_k, taken_row0, taken_rows, FORM == 2, HAS_VALID, HAS_REST, K,
        )  # fmt: skip
    if HAS_BIAS:
        z += tl.load(bias_ptr + c, mask=c < C_OUT, other=0.0)[None, :]

    # (2) ReLU, pool, code; rows of a strip outside the image are zeros
    HAS_DIFF: tl.constexpr = FORM != 0
    z = tl.where(inside[:, None], z, 0.0)
    if HAS_DIFF:
        dz = tl.where(inside[:, None], dz, 0.0)
    if POOL == 0:
        PH: tl.constexpr = BLOCK_H // 2
        PW: tl.constexpr = BLOCK_W // 2
        z0, z1, z2, z3 = _windows(z, PH, PW, BLOCK_N)
        d0, d1, d2, d3 = z0, z1, z2, z3
        if HAS_DIFF:
            d0, d1, d2, d3 = _windows(dz, PH, PW, BLOCK_N)
        y, delta, code = max_window(z0, z1, z2, z3, d0, d1, d2, d3, from_target, HAS_DIFF)
        pooled = tl.arange(0, PH * PW)
        i, j = h0 // 2 + pooled // PW, w0 // 2 + pooled % PW
        live = (i < rows // 2) & (j < W_OUT // 2)
        out = (i * (W_OUT // 2) + j).to(tl.int64)
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
        if POOL == 1:
            QH: tl.constexpr = BLOCK_H // 2
            QW: tl.constexpr = BLOCK_W // 2
            z0, z1, z2, z3 = _windows(y, QH, QW, BLOCK_N)
            y = ((z0 + z1) + (z2 + z3)) * 0.25
            if HAS_DIFF:
                d0, d1, d2, d3 = _windows(delta, QH, QW, BLOCK_N)
                delta = ((d0 + d1) + (d2 + d3)) * 0.25
            pooled = tl.arange(0, QH * QW)
            i, j = h0 // 2 + pooled // QW, w0 // 2 + pooled % QW
            live = (i < rows // 2) & (j < W_OUT // 2)
            out = (i * (W_OUT // 2) + j).to(tl.int64)

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


@dataclass(frozen=True)
class Listed:
    """A target that is a list of classes, for the first convolution: as `label_conv`'s launchers.

    ``labels`` (N, H, W) or ``values``, ``indices`` (N, k, H, W) and ``rest`` (N, H, W).
    """

    table: Tensor
    taken: Tensor
    taken_row0: int
    valid: Tensor | None = None
    labels: Tensor | None = None
    interior: Tensor | None = None
    values: Tensor | None = None
    indices: Tensor | None = None
    rest: Tensor | None = None
    rest_table: Tensor | None = None


def conv_block_fwd(
    a: Tensor,
    d: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    from_target: Tensor | None,
    target: Listed | None,
    *,
    kernel_size: int,
    stride: int,
    relu: bool,
    pool: int,
    pad_h: int,
    row0: int,
    image_rows: int,
    y: Tensor | None,
    delta: Tensor | None,
    code: Tensor | None,
    code_row0: int = 0,
    reduce: bool = False,
) -> Tensor | None:
    """One step on a strip of rows, or on whole images.

    Args:
        a: (N, H_in, W_in, C_in), C_in a multiple of 8: the carried map; u with a `target`.
        d: (N, H_in, W_in, C_in): δ; None in the plain form and with a `target`.
        weight: (K² C_in, C_out), rows by tap, then channel.
        bias: (C_out,) float32.
        from_target: (N,) bool, None in the plain form.
        pool: `MAX`, `AVG` or `NO_POOL`.
        pad_h: rows of zeros that the padding adds above and below: 0 where a strip has its halo.
        row0, image_rows: the image's row of the convolution's first one, of how many.
        y, delta: (N, rows // 2, W_out // 2, C_out) with a pool, else (N, rows, W_out, C_out), each
            image contiguous; None = not written.
        code: with a max pool (N, rows // 2, W_out // 2, ⌈C_out/2⌉), else the mask (N, code_rows,
            W_out, ⌈C_out/8⌉) of rows from `code_row0`.
        reduce: return the partial sums of δ², (N, programs) float32, of `delta` as it is stored.
    """
    n, h_in, w_in, c_in = a.shape
    c_out = weight.shape[1]
    rows = (h_in + 2 * pad_h - kernel_size) // stride + 1
    w_out = (w_in + 2 * (kernel_size // 2) - kernel_size) // stride + 1
    form = DIFF if d is not None else PLAIN
    if target is not None:
        form = LABELS if target.labels is not None else TOPK
    if n == 0 or rows <= 0 or w_out <= 0:
        return a.new_zeros((n, 1), dtype=torch.float32) if reduce else None
    tile = tile_for(a, c_in, c_out, stride, form)
    blocks = cdiv(rows, tile.block_h) * cdiv(w_out, tile.block_w) * cdiv(c_out, tile.block_n)
    partial = a.new_empty((n, blocks), dtype=torch.float32) if reduce else None
    pointers, sizes = _list_arguments(target, a)
    launch(
        _conv_block_fwd_kernel,
        (blocks, n),
        a, a if d is None else d, weight,
        *(a if t is None else t for t in (bias, from_target, y, delta, code, partial)),
        *pointers,
        h_in, w_in, c_in, c_out, rows, w_out, image_rows, row0, pad_h, code_row0,
        0 if code is None else code.shape[1],
        *sizes,
        *image_strides(a, d, y, delta, code),
        K=kernel_size, STRIDE=stride, FORM=form, RELU=relu, POOL=pool, HAS_BIAS=bias is not None,
        HAS_Y=y is not None, HAS_DELTA=delta is not None, HAS_CODE=code is not None,
        HAS_PARTIAL=reduce, HAS_VALID=target is not None and target.valid is not None,
        HAS_REST=target is not None and target.rest is not None,
        DESCRIPTORS=tile.descriptors, EIGHTS=c_in % 8 == 0, PRECISION=precision(a.dtype),
        BLOCK_H=tile.block_h, BLOCK_W=tile.block_w, BLOCK_K=tile.block_k, BLOCK_N=tile.block_n,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return partial


def _list_arguments(target: Listed | None, a: Tensor) -> tuple[list[Tensor], list[int]]:
    """The kernel's pointers, `a` for what is missing, and H … taken_rows."""
    if target is None:
        return [a] * 9, [0] * 8
    lists = [target.labels, target.values, target.indices, target.rest, target.valid, target.taken]
    lists += [target.table, target.interior, target.rest_table]
    shape = (target.labels if target.values is None else target.values).shape  # type: ignore[union-attr]
    topk = [0, 0, 0]
    if target.values is not None:
        topk = [target.values.shape[1], *target.values.stride()[:2]]
    sizes = [*shape[-2:], target.table.shape[1], *topk, target.taken_row0, target.taken.shape[1]]
    return [a if t is None else t for t in lists], sizes


def precision(dtype: torch.dtype) -> str:
    """TF32 exactly where PyTorch's own convolutions use it."""
    return "tf32" if dtype != torch.float32 or tf32_allowed() else "ieee"
