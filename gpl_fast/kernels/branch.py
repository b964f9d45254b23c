"""Which images' target is carried beside the difference: a look at a grid of their pixels.

`gpl_fast.fast.branch.carry_target` is the definition.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpl_fast.kernels.class_maps import weight_of
from gpl_fast.kernels.launch import ACTIVATION_NAMES, cdiv, launch

CLASSES, COLUMNS = 64, 16  # of a tile: few columns, that there are programs enough


@triton.jit
def _activate(x, m, factor, inv_t, ACTIVATION: tl.constexpr):
    """m and factor are the pixels' largest logit and 1 / Σ e^((x − m) / T)."""
    y = x * inv_t
    if ACTIVATION == "softmax":
        y = tl.exp((x - m[None, :]) * inv_t) * factor[None, :]
    if ACTIVATION == "sigmoid":
        y = 1.0 / (1.0 + tl.exp(0.0 - y))
    return y


@triton.jit
def _softmax(ptr, at, stride_c, C, inside, inv_t, ACTIVATION: tl.constexpr, BLOCK_C: tl.constexpr,
             BLOCK_W: tl.constexpr):  # fmt: skip
    """What `_activate` takes of each pixel; at (BLOCK_W,) offsets."""
    m, s = tl.full((BLOCK_W,), float("-inf"), tl.float32), tl.zeros((BLOCK_W,), tl.float32)
    if ACTIVATION == "softmax":
        for c0 in range(0, C, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            here = (c[:, None] < C) & inside[None, :]
            x = tl.load(
                ptr + c[:, None].to(tl.int64) * stride_c + at[None, :], mask=here, other=0.0
            )
            x = tl.where(c[:, None] < C, x.to(tl.float32), float("-inf"))
            higher = tl.maximum(m, tl.max(x, axis=0))
            # −inf − −inf where every logit so far is −inf
            s = tl.where(m == float("-inf"), s, s * tl.exp((m - higher) * inv_t))
            e = tl.exp((x - higher[None, :]) * inv_t)
            s += tl.sum(tl.where(x == float("-inf"), 0.0, e), axis=0)
            m = higher
    return m, 1.0 / s


@triton.jit
def _list_tile(values_ptr, indices_ptr, rest, at, plane, k, c, inside, BLOCK_C: tl.constexpr,
               BLOCK_W: tl.constexpr):  # fmt: skip
    """The map that a list stands for, (BLOCK_C, BLOCK_W); rest (BLOCK_W,) of each other class."""
    t = tl.zeros((BLOCK_C, BLOCK_W), tl.float32) + rest[None, :]
    for j in range(0, k):
        index = tl.load(indices_ptr + at + j * plane, mask=inside, other=-1)
        t = tl.where(c[:, None] == index[None, :], 0.0, t)
    for j in range(0, k):
        index = tl.load(indices_ptr + at + j * plane, mask=inside, other=-1)
        value = tl.load(values_ptr + at + j * plane, mask=inside, other=0.0)
        t += tl.where(c[:, None] == index[None, :], value[None, :], 0.0)
    return t


@triton.jit
def _look_kernel(
    # as `carry_target_fwd` takes them
    x_ptr, target_ptr, elements_ptr, indices_ptr, rest_ptr, valid_ptr,
    partial_ptr,  # (N, 3, programs): Σ (y' − y)², Σ y², pixels like their right neighbours
    H, W, step_h, step_w, inv_t, target_inv_t, x_strides, target_strides,  # n, c or rank, h, w
    h, w, ratio_h, ratio_w,  # of a dense target of another size, and its over the prediction's
    ACTIVATION: tl.constexpr, TARGET_ACTIVATION: tl.constexpr,
    KIND: tl.constexpr,  # of the target: "dense", "labels" or "topk"
    C: tl.constexpr, k: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    x_n, x_c, x_h, x_w = x_strides
    t_n, t_c, t_h, t_w = target_strides
    rank = tl.zeros((), tl.int64) + t_c  # k of them may be more than 2^31
    n, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.cdiv(W, step_w)
    blocks = tl.cdiv(columns, BLOCK_W)
    row, j = (program // blocks) * step_h, (program % blocks) * BLOCK_W + tl.arange(0, BLOCK_W)
    inside, column = j < columns, j * step_w
    x_at = n * x_n + row.to(tl.int64) * x_h + column.to(tl.int64) * x_w
    pixel = (n * H + row) * W + column
    near, left, beside_it = row.to(tl.int64), column.to(tl.int64), tl.minimum(column + 1, W - 1)
    if ratio_h is not None:  # the nearest pixels
        near = tl.minimum(((row + 0.5) * ratio_h).to(tl.int64), h - 1)
        left = tl.minimum(((column + 0.5) * ratio_w).to(tl.int64), w - 1)
        beside_it = tl.minimum(left + 1, w - 1)
    at = n * t_n + near * t_h + left * t_w
    beside = n * t_n + near * t_h + beside_it.to(tl.int64) * t_w
    keep = inside
    if valid_ptr is not None:
        keep, _ = weight_of(valid_ptr, pixel, inside)
    m, factor = _softmax(x_ptr, x_at, x_c, C, keep, inv_t, ACTIVATION, BLOCK_C, BLOCK_W)
    tm, t_factor = m, factor
    if KIND == "dense":
        tm, t_factor = _softmax(target_ptr, at, t_c, C, keep, target_inv_t, TARGET_ACTIVATION,
                                BLOCK_C, BLOCK_W)  # fmt: skip
    same = inside
    label = tl.full((BLOCK_W,), -1, tl.int64)
    if KIND == "labels":
        label = tl.load(target_ptr + at, mask=inside, other=-1)
        same = same & (label == tl.load(target_ptr + beside, mask=inside, other=-1))
    rest = tl.zeros((BLOCK_W,), tl.float32)
    if rest_ptr is not None:
        rest = tl.load(rest_ptr + pixel, mask=inside, other=0.0)
    if KIND == "topk":
        for i in range(0, k):
            value = tl.load(target_ptr + at + i * rank, mask=inside, other=0.0)
            same = same & (value == tl.load(target_ptr + beside + i * rank, mask=inside, other=0.0))
            index = tl.load(indices_ptr + at + i * rank, mask=inside, other=-1)
            same = same & (index == tl.load(indices_ptr + beside + i * rank, mask=inside, other=-1))
    difference, size = tl.zeros((BLOCK_W,), tl.float32), tl.zeros((BLOCK_W,), tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        there = (c[:, None] < C) & inside[None, :]
        x = tl.load(x_ptr + c[:, None].to(tl.int64) * x_c + x_at[None, :], mask=there, other=0.0)
        y = _activate(x.to(tl.float32), m, factor, inv_t, ACTIVATION)
        if KIND == "dense":
            plane = target_ptr + c[:, None].to(tl.int64) * t_c
            t = tl.load(plane + at[None, :], mask=there, other=0.0).to(tl.float32)
            right = tl.load(plane + beside[None, :], mask=there, other=0.0).to(tl.float32)
            same = same & (tl.min((t == right).to(tl.int32), axis=0) != 0)
            if target_ptr.dtype.element_ty == tl.uint8:  # labels of elements
                t = tl.where(t == 1.0, 1.0, 0.0)
            t = _activate(t, tm, t_factor, target_inv_t, TARGET_ACTIVATION)
        elif KIND == "labels":
            t = tl.where(c[:, None] == label[None, :], 1.0, 0.0)
        else:
            t = _list_tile(target_ptr, indices_ptr, rest, at, rank, k, c, inside, BLOCK_C, BLOCK_W)
        live = (c[:, None] < C) & keep[None, :]
        if elements_ptr is not None:
            element = ((n * C + c[:, None]) * H + row) * W + column[None, :]
            live = live & (tl.load(elements_ptr + element, mask=live, other=2) < 2)
        t = tl.where(live, t, 0.0)
        d = tl.where(live, y - t, 0.0)
        difference += tl.sum(d * d, axis=0)
        size += tl.sum(t * t, axis=0)
    programs = tl.num_programs(1)
    partial_ptr += n * 3 * programs + program
    tl.store(partial_ptr, tl.sum(difference))
    tl.store(partial_ptr + programs, tl.sum(size))
    tl.store(partial_ptr + 2 * programs, tl.sum(same.to(tl.float32)))


@triton.jit
def _decide_kernel(partial_ptr, from_target_ptr, programs, pixels, near, BLOCK: tl.constexpr):
    n, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    partial_ptr += n * 3 * programs + i
    difference = tl.sum(tl.load(partial_ptr, mask=i < programs, other=0.0))
    size = tl.sum(tl.load(partial_ptr + programs, mask=i < programs, other=0.0))
    same = tl.sum(tl.load(partial_ptr + 2 * programs, mask=i < programs, other=0.0))
    carried = (difference < near * size) & (2 * same > pixels)
    tl.store(from_target_ptr + n, carried.to(tl.uint8))


def carry_target_fwd(
    x: Tensor, *, activation: int, target_activation: int, temperature: float,
    step: tuple[int, int], near: float, from_target: Tensor, dense: Tensor | None = None,
    elements: Tensor | None = None, labels: Tensor | None = None,
    topk_values: Tensor | None = None, topk_indices: Tensor | None = None,
    topk_rest: Tensor | None = None, valid: Tensor | None = None,
) -> None:  # fmt: skip
    """`gpl_fast.stages.TritonStages.carry_target_fwd`."""
    n, channels, height, width = x.shape
    rows, columns = cdiv(height, step[0]), cdiv(width, step[1])
    if n * rows * columns == 0:
        return
    lists = {"dense": dense, "labels": labels, "topk": topk_values}
    kind, target = next((name, t) for name, t in lists.items() if t is not None)
    of_x, of_target = ACTIVATION_NAMES[activation], ACTIVATION_NAMES[target_activation]
    inv_t = 1.0 / min(max(temperature, 2.0**-126), 2.0**128)
    as_it_is = of_target == "none" != of_x
    size: tuple[int | float | None, ...] = (None,) * 4
    if target.shape[-2:] != x.shape[-2:]:
        h, w = target.shape[-2:]
        size = (h, w, h / height, w / width)
    programs = rows * cdiv(columns, COLUMNS)
    partial = x.new_empty((n, 3, programs), dtype=torch.float32)
    launch(
        _look_kernel, (n, programs), x, target, elements, topk_indices, topk_rest, valid, partial,
        height, width, *step, inv_t, 1.0 if as_it_is else inv_t,
        x.stride(), (target.unsqueeze(1) if kind == "labels" else target).stride(), *size,
        ACTIVATION=of_x, TARGET_ACTIVATION=of_target, KIND=kind, C=channels,
        k=0 if topk_values is None else topk_values.shape[1],
        BLOCK_C=min(triton.next_power_of_2(channels), CLASSES), BLOCK_W=COLUMNS, num_warps=4,
    )  # fmt: skip
    launch(
        _decide_kernel, (n,), partial, from_target.view(torch.uint8), programs, rows * columns,
        near, BLOCK=triton.next_power_of_2(programs), num_warps=1,
    )  # fmt: skip
