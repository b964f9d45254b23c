"""What a target that is a list of classes adds to the first convolution (eq. 7): table rows.

Twin of ``csrc/cpu/label_conv.cpp``. `listed` does it on registers, for `conv_block` too.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gpl_fast.kernels.class_maps import weight_of
from gpl_fast.kernels.launch import cdiv, image_strides, launch
from gpl_fast.stages import Listed

PIXELS = 32  # of a program: few enough for all to lie inside one region of labels


@triton.jit
def _neighbour(n, h, w, tap, inside, valid_ptr, taken_ptr, H, W, taken_row0, taken_rows,
               K: tl.constexpr):  # fmt: skip
    """(place in an (N, H, W) tensor, whether it is a valid pixel, its weight, whether its target is
    taken)."""
    y, x = h + tap // K - K // 2, w + tap % K - K // 2
    ok = inside & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    at = (n * H + y) * W + x
    weight = ok
    if valid_ptr is not None:
        ok, weight = weight_of(valid_ptr, at, ok)
    taken = tl.load(taken_ptr + (n * taken_rows + y - taken_row0) * W + x, mask=ok, other=0)
    return at, ok, weight, taken != 0


@triton.jit
def _label_at(n, h, w, tap, inside, labels_ptr, valid_ptr, taken_ptr, H, W, C, taken_row0,
              taken_rows, K: tl.constexpr):  # fmt: skip
    """2 * label + taken of a neighbour, −1 where there is none; its weight, 0 there."""
    at, ok, weight, taken = _neighbour(n, h, w, tap, inside, valid_ptr, taken_ptr, H, W, taken_row0,
                               taken_rows, K)  # fmt: skip
    label = tl.load(labels_ptr + at, mask=ok, other=-1)
    known = ok & (label >= 0) & (label < C)
    return tl.where(known, 2 * label.to(tl.int32) + taken.to(tl.int32), -1), weight


@triton.jit
def _add(z, dz, rows, valid_ptr, weight, taken, from_target):
    """z += rows, each pixel's by its weight, where they are taken, or z is the target's; dz −= rows
    elsewhere."""
    if valid_ptr is not None:  # noqa: SIM102
        if valid_ptr.dtype.element_ty == tl.float32:
            rows *= weight
    z += tl.where(taken | from_target, rows, 0.0)
    dz -= tl.where(taken, 0.0, rows)
    return z, dz


@triton.jit
def listed(
    q,  # (BLOCK_C, P) float32, the convolution of SoftmaxPackFwd's y
    n, h, w, inside,  # image and pixels (P,)
    c,  # channels (BLOCK_C,)
    from_target, list_ptrs,  # as `list_tensors`
    size, k, taken_row0, taken_rows,  # (H, W, C); classes of a list; the rows of `taken`
    C_OUT, LABELS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """(z of the carried branch, dz)."""
    list_ptr, indices_ptr, rest_ptr, valid_ptr, taken_ptr, table_ptr, sums_ptr = list_ptrs
    H, W, C = size
    z = tl.where(from_target, 0.0, q)
    dz = q
    channel = c < C_OUT
    if LABELS:
        lowest, highest = tl.full((), 2**30, tl.int32), tl.full((), -2, tl.int32)
        lightest = tl.full((), float("inf"), tl.float32)
        heaviest = -lightest
        for tap in range(0, K * K):
            e, m = _label_at(n, h, w, tap, inside, list_ptr, valid_ptr, taken_ptr, H, W, C,
                             taken_row0, taken_rows, K)  # fmt: skip
            lowest = tl.minimum(lowest, tl.min(tl.where(inside, e, 2**30)))
            highest = tl.maximum(highest, tl.max(tl.where(inside, e, -2)))
            if valid_ptr is not None:  # noqa: SIM102
                if valid_ptr.dtype.element_ty == tl.float32:
                    lightest = tl.minimum(lightest, tl.min(tl.where(inside, m, float("inf"))))
                    heaviest = tl.maximum(heaviest, tl.max(tl.where(inside, m, float("-inf"))))
        alike = lowest == highest
        if valid_ptr is not None:  # noqa: SIM102
            if valid_ptr.dtype.element_ty == tl.float32:
                alike = alike & (lightest == heaviest)
        if alike:  # one label and weight in the whole neighbourhood, or no label: one row
            row = sums_ptr + tl.maximum(lowest // 2, 0).to(tl.int64) * C_OUT + c
            rows = tl.load(row, mask=channel & (lowest >= 0), other=0.0)[:, None]
            z, dz = _add(z, dz, rows + tl.zeros_like(q), valid_ptr, heaviest, lowest % 2 == 1,
                         from_target)  # fmt: skip
        else:
            for tap in range(0, K * K):
                e, m = _label_at(n, h, w, tap, inside, list_ptr, valid_ptr, taken_ptr, H, W, C,
                                 taken_row0, taken_rows, K)  # fmt: skip
                row = (tap * C + tl.maximum(e // 2, 0)).to(tl.int64) * C_OUT
                rows = tl.load(table_ptr + row[None, :] + c[:, None],
                               mask=(e >= 0)[None, :] & channel[:, None], other=0.0)  # fmt: skip
                z, dz = _add(z, dz, rows.to(tl.float32), valid_ptr, m[None, :],
                             (e % 2 == 1)[None, :], from_target)  # fmt: skip
    else:
        plane = H.to(tl.int64) * W  # of one rank
        for tap in range(0, K * K):
            at, ok, m, taken = _neighbour(n, h, w, tap, inside, valid_ptr, taken_ptr, H, W,
                                          taken_row0, taken_rows, K)  # fmt: skip
            first_rank = at + n * (k - 1) * plane
            rest = tl.zeros(h.shape, tl.float32)
            if rest_ptr is not None:
                rest = tl.load(rest_ptr + at, mask=ok, other=0.0)
                whole = tl.load(sums_ptr + tap * C_OUT + c, mask=channel, other=0.0)
                z, dz = _add(z, dz, rest[None, :] * whole[:, None], valid_ptr, m[None, :],
                             taken[None, :], from_target)  # fmt: skip
            for j in range(0, k):
                of_rank = first_rank + j * plane
                index = tl.load(indices_ptr + of_rank, mask=ok, other=-1)
                known = ok & (index >= 0) & (index < C)
                value = tl.load(list_ptr + of_rank, mask=ok, other=0.0)
                if rest_ptr is not None:  # a listed class has none of the rest, even listed twice
                    first = known
                    for i in range(0, j):
                        earlier = tl.load(indices_ptr + first_rank + i * plane, mask=ok, other=-1)
                        first = first & (earlier != index)
                    value -= tl.where(first, rest, 0.0)
                row = (tap * C + tl.minimum(tl.maximum(index, 0), C - 1)).to(tl.int64) * C_OUT
                rows = tl.load(table_ptr + row[None, :] + c[:, None],
                               mask=known[None, :] & channel[:, None], other=0.0)  # fmt: skip
                z, dz = _add(z, dz, value[None, :] * rows.to(tl.float32), valid_ptr, m[None, :],
                             taken[None, :], from_target)  # fmt: skip
    return z, dz


@triton.jit(
    do_not_specialize=["row0", "rows", "taken_row0", "taken_rows", "H", "W", "k"],
    # Of a chunk of images they begin anywhere, and each alignment would be another kernel.
    do_not_specialize_on_alignment=["from_target_ptr"],
)
def _label_conv_fwd_kernel(
    z_ptr, dz_ptr,  # (N, rows, W, C_OUT)
    from_target_ptr, list_ptrs,  # as `list_tensors`
    H, W, k, taken_row0, taken_rows, row0, rows, z_n, dz_n,
    C: tl.constexpr, C_OUT: tl.constexpr, LABELS: tl.constexpr, K: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_P pixels of a strip; zeros in a row outside the image."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.program_id(2).to(tl.int64)
    h, w = row0 + p // W, p % W
    in_image = (p < rows * W) & (h >= 0) & (h < H)
    in_map = (p < rows * W)[None, :] & (c < C_OUT)[:, None]
    at = p[None, :].to(tl.int64) * C_OUT + c[:, None]
    live = in_map & in_image[None, :]
    q = tl.load(dz_ptr + n * dz_n + at, mask=live, other=0.0).to(tl.float32)
    from_target = tl.load(from_target_ptr + n) != 0
    z, dz = listed(
        q, n, h, w, in_image, c, from_target, list_ptrs, (H, W, C), k, taken_row0, taken_rows,
        C_OUT, LABELS, K,
    )  # fmt: skip
    z, dz = tl.where(live, z, 0.0), tl.where(live, dz, 0.0)
    tl.store(z_ptr + n * z_n + at, z.to(z_ptr.dtype.element_ty), mask=in_map)
    tl.store(dz_ptr + n * dz_n + at, dz.to(dz_ptr.dtype.element_ty), mask=in_map)


def list_tensors(target: Listed) -> tuple[Tensor | None, ...]:
    """`listed`'s: labels, or values, indices and rest; what both have; the sums of the table over
    its taps (C, C_out), or over its classes (K², C_out), float32."""
    of_labels = target.labels is not None
    return (
        target.labels if of_labels else target.values, target.indices, target.rest, target.valid,
        target.taken, target.table, target.interior if of_labels else target.rest_table,
    )  # fmt: skip


def label_conv_fwd(
    labels: Tensor, *, table: Tensor, interior: Tensor, from_target: Tensor, taken: Tensor,
    taken_row0: int, row0: int, z: Tensor, dz: Tensor, valid: Tensor | None = None,
) -> None:  # fmt: skip
    """`gpl_fast.stages.Stages.label_conv_fwd`."""
    target = Listed(table, taken, taken_row0, valid, labels=labels, interior=interior)
    _launch(target, from_target, row0, z, dz)


def topk_conv_fwd(
    topk_values: Tensor, *, topk_indices: Tensor, table: Tensor, from_target: Tensor,
    taken: Tensor, taken_row0: int, row0: int, z: Tensor, dz: Tensor,
    topk_rest: Tensor | None = None, rest_table: Tensor | None = None, valid: Tensor | None = None,
) -> None:  # fmt: skip
    """`gpl_fast.stages.Stages.topk_conv_fwd`."""
    target = Listed(
        table, taken, taken_row0, valid, values=topk_values, indices=topk_indices, rest=topk_rest,
        rest_table=rest_table,
    )  # fmt: skip
    _launch(target, from_target, row0, z, dz)


def _launch(target: Listed, from_target: Tensor, row0: int, z: Tensor, dz: Tensor) -> None:
    n, rows, w, c_out = z.shape
    if z.numel() == 0:
        return
    height, width = next(t.shape[-2:] for t in (target.labels, target.values) if t is not None)
    block_c = min(triton.next_power_of_2(c_out), 64)
    launch(
        _label_conv_fwd_kernel,
        (cdiv(rows * w, PIXELS), cdiv(c_out, block_c), n),
        z, dz, from_target, list_tensors(target), height, width,
        0 if target.values is None else target.values.shape[1], target.taken_row0,
        target.taken.shape[1], row0, rows, *image_strides(z, dz),
        C=target.table.shape[1], C_OUT=c_out, LABELS=target.labels is not None,
        K=round(target.table.shape[0] ** 0.5), BLOCK_P=PIXELS, BLOCK_C=block_c, num_warps=8,
        maxnreg=128,  # of two programs at a time; on its own the assembler spills for more
    )  # fmt: skip
