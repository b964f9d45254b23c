"""Every compiled operator against plain PyTorch in float64, on buffers poisoned beforehand.

The bound is err(ours, float64) <= 2 err(PyTorch in the same dtype, float64) + atol; what must be
exact (strips, threads, zeros, routing) is compared bit for bit.
"""

from __future__ import annotations

import functools
import os
import platform
import resource
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cases import error
from extremes import KINDS, LOWEST, TEMPERATURES, by_kind, logits_of_every_kind
from saved import log_sum_exp

from gpl_fast import ops

if (reason := ops.load()) is not None:
    pytest.skip(reason, allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ATOL = {torch.float32: 1e-6, torch.bfloat16: 1e-5, torch.float16: 1e-6}
# odd rows and columns, one row, a row of more than one tile of pixels
SIZES = [(13, 27), (1, 5), (7, 33), (2, 300)]
NONE, SOFTMAX, SIGMOID = 0, 1, 2
MAX, AVG = 0, 1


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def poisoned(*shape, dtype=torch.float32):
    if dtype.is_floating_point:
        return torch.full(shape, float("nan"), dtype=dtype)
    return torch.full(shape, 255, dtype=dtype)


def nhwc(x):
    return x.permute(0, 2, 3, 1)


def nchw(x):
    return x.permute(0, 3, 1, 2)


def check(ours, plain, truth, dtype):
    """err(ours) <= 2 err(plain) + atol, in the largest error; NaN anywhere fails."""
    bound = 2 * (plain.double() - truth).abs().max() + ATOL[dtype] * max(1, truth.abs().max())
    assert (ours.double() - truth).abs().max() <= bound


def layout(x, kind):
    if kind == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if kind == "sliced":  # no stride is 1
        big = torch.full((x.shape[0], x.shape[1] * 2, x.shape[2], x.shape[3] * 2), 9.0)
        view = big.to(x.dtype)[:, ::2, :, ::2]
        view.copy_(x)
        return view
    return x


def activate(x, kind, temperature=1.0):
    x = x / temperature
    return x.softmax(1) if kind == SOFTMAX else x.sigmoid() if kind == SIGMOID else x


def odd_images(n):
    """`from_target`: every other image carries the target's map."""
    return torch.arange(n) % 2 == 1


def carried(prediction, target):
    return torch.where(odd_images(len(target)).view(-1, 1, 1, 1), target, prediction)


def pack(x, *, target=None, labels=None, topk=(None, None, None), valid=None, activation=SOFTMAX,
         temperature=1.0, ce=(None, None, 0.0), strip=None, core=None, c_pad=None,
         dtype=torch.float32, target_activation=None):  # fmt: skip
    """(y, delta, lse, ce_lse, ce_rows), the maps (N, rows, W, c_pad).

    A listed target leaves `taken` in delta's place, no target nothing.
    """
    N, C, H, W = x.shape
    row0, rows = strip or (0, H)
    core0, core_rows = core or (row0, rows)
    own_lse = activation != SOFTMAX or temperature != 1.0
    shape = (N, rows, W, c_pad or C)
    listed = labels is not None or topk[0] is not None
    y = poisoned(*shape, dtype=dtype)
    delta = poisoned(*shape, dtype=dtype) if target is not None else None
    taken = poisoned(N, rows, W, dtype=torch.uint8) if listed else None
    lse, ce_lse = poisoned(N, H, W), poisoned(N, H, W)
    ce_rows = poisoned(N, H, 2, dtype=torch.float64)
    ops.softmax_pack_fwd(
        x, valid=valid, target=target, from_target=odd_images(N), labels=labels,
        topk_values=topk[0], topk_indices=topk[1], topk_rest=topk[2], activation=activation,
        target_activation=activation if target_activation is None else target_activation,
        temperature=temperature, ce_labels=ce[0], class_weight=ce[1], label_smoothing=ce[2],
        row0=row0, rows=rows, core0=core0, core_rows=core_rows, y=y, delta=delta, taken=taken,
        lse=lse, ce_lse=ce_lse if own_lse else None, ce_rows=ce_rows,
    )  # fmt: skip
    return y, taken if listed else delta, lse, ce_lse, ce_rows


# What a softmax_pack_fwd is given that puts out the cross-entropy alone.
UNUSED = dict.fromkeys((
    "valid", "target", "from_target", "labels", "topk_values", "topk_indices", "topk_rest", "y",
    "delta", "taken", "lse", "ce_lse",
))  # fmt: skip


# -- softmax_pack_fwd --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("C", "size"), [*((C, size) for C in (1, 3, 19) for size in SIZES), (150, (3, 27))]
)
def test_softmax_pack_dense(C, size, dtype):
    for activation, temperature, kind, x_dtype in [
        (SOFTMAX, 1.0, "nchw", torch.float32),
        (SOFTMAX, 2.5, "channels_last", torch.bfloat16),
        (SIGMOID, 1.0, "sliced", torch.float16),
        (NONE, 3.0, "channels_last", torch.float32),
        (SIGMOID, 0.5, "nchw", torch.bfloat16),
        (SOFTMAX, 1.0, "sliced", torch.float32),
    ]:
        x = layout((3 * torch.randn(2, C, *size)).to(x_dtype), kind)
        t = layout((3 * torch.randn(2, C, *size)).to(x_dtype), kind)
        c_pad = C + 5 if temperature != 1.0 else C
        y, delta, lse, _, _ = pack(
            x, target=t, activation=activation, temperature=temperature, c_pad=c_pad, dtype=dtype
        )
        y64, p64 = (activate(v.double(), activation, temperature) for v in (t, x))
        y32, p32 = (activate(v.float(), activation, temperature) for v in (t, x))
        plain = carried(nhwc(p32), nhwc(y32)).to(dtype)
        check(y[..., :C], plain, carried(nhwc(p64), nhwc(y64)), dtype)
        check(delta[..., :C], nhwc(p32 - y32).to(dtype), nhwc(p64 - y64), dtype)
        assert not y[..., C:].any()
        assert not delta[..., C:].any()
        if activation == SOFTMAX:
            plain = temperature * (x.float() / temperature).logsumexp(1)
            check(lse, plain, log_sum_exp(x, temperature), torch.float32)


@pytest.mark.parametrize("activation", [NONE, SOFTMAX, SIGMOID])
def test_softmax_pack_equal_inputs_give_zero(activation):
    x = 20 * torch.randn(2, 19, 7, 33)
    for temperature in (1.0, 0.7):
        _, delta, *_ = pack(x, target=x.clone(), activation=activation, temperature=temperature)
        assert not delta.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_pack_mixed_activations(dtype):
    x, t = torch.randn(2, 3, 7, 9), torch.rand(2, 3, 7, 9)
    y, delta, *_ = pack(x, target=t, target_activation=NONE, dtype=dtype)
    assert torch.equal(y[1], nhwc(t)[1].to(dtype))
    check(y[0], nhwc(x.softmax(1))[0].to(dtype), nhwc(x.double().softmax(1))[0], dtype)
    truth = nhwc(x.double().softmax(1) - t)
    check(delta, nhwc(x.softmax(1) - t).to(dtype), truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [3, 19, 150])
def test_softmax_pack_labels(C, dtype):
    x, labels = 3 * torch.randn(2, C, 13, 27), torch.randint(-1, C, (2, 13, 27))
    labels[0, 0, 0] = C + 7  # out of range: like no class
    y, taken, *_ = pack(x, labels=labels, dtype=dtype)
    known = (labels >= 0) & (labels < C)
    onehot = F.one_hot(labels.where(known, 0), C) * known[..., None]
    truth, plain = nhwc(x.double().softmax(1)), nhwc(x.softmax(1))
    assert torch.equal(taken.bool(), (truth * onehot).sum(-1) > 0.5)
    assert taken.any()
    assert known[taken == 0].any()
    taken = taken[..., None] * onehot
    check(y, (plain - taken).to(dtype), truth - taken, dtype)


def topk_case(C, k, rest):
    """values, indices with repeats, rest, and the dense map (N, C, H, W) they stand for."""
    values = torch.rand(2, k, 13, 27) / k
    indices = torch.randint(0, C, (2, k, 13, 27))
    if k > 1:
        indices[:, 1, :4] = indices[:, 0, :4]
    per_class = torch.rand(2, 13, 27) / C if rest else None
    dense = torch.zeros(2, C, 13, 27, dtype=torch.float64)
    listed = dense.scatter(1, indices, 1.0)
    dense.scatter_add_(1, indices, values.double())
    if rest:
        dense += (1 - listed) * per_class[:, None]
    return values, indices, per_class, dense


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize(("C", "k"), [(3, 1), (19, 4), (150, 5)])
def test_softmax_pack_topk(C, k, rest):
    x = 3 * torch.randn(2, C, 13, 27)
    values, indices, per_class, dense = topk_case(C, k, rest)
    for dtype in DTYPES:
        y, taken, *_ = pack(x, topk=(values, indices, per_class), dtype=dtype)
        truth = x.double().softmax(1)
        nearer = (truth - dense).square().sum(1) - truth.square().sum(1)
        sure = nearer.abs() > 1e-6
        assert torch.equal(taken.bool()[sure], nearer[sure] < 0)
        assert 0 < taken.sum() < taken.numel()
        part = taken[:, None] * dense
        plain = nhwc(x.softmax(1) - part.float()).to(dtype)
        check(y, plain, nhwc(truth - part), dtype)


def test_softmax_pack_without_target_is_the_activation():
    x = torch.randn(2, 19, 5, 17)
    y, *_ = pack(x)
    check(y, nhwc(x.softmax(1)), nhwc(x.double().softmax(1)), torch.float32)


def test_invalid_pixels_are_exactly_zero():
    x, t = torch.randn(2, 19, 13, 27), torch.randn(2, 19, 13, 27)
    valid = torch.rand(2, 13, 27) > 0.3
    bad = ~valid[:, None].expand_as(x)
    x[bad], t[bad] = float("nan"), float("nan")
    for target in ({"target": t}, {"labels": torch.randint(0, 19, (2, 13, 27))}, {}):
        for out in pack(x, valid=valid, **target)[:2]:
            assert out is None or (not out[~valid].any() and out.isfinite().all())


def test_nan_in_a_valid_pixel_stays():
    x = torch.randn(1, 19, 3, 17)
    x[0, 4, 1, 9] = float("nan")
    y, _, lse, *_ = pack(x)
    assert y[0, 1, 9].isnan().all()
    assert y.isnan().sum() == 19
    assert lse[0, 1, 9].isnan()


@pytest.mark.parametrize("scale", [100.0, 1e4, 1e30])
def test_softmax_pack_extreme_logits(scale):
    x = scale * torch.randn(1, 19, 3, 17)
    x[0, 3, 0, 0] = -float("inf")
    y, _, lse, *_ = pack(x)
    torch.testing.assert_close(y, nhwc(x.softmax(1)), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(lse, x.logsumexp(1))


# -- any temperature, any logits ---------------------------------------------------------------


def check_kinds(ours, plain, truth):
    """`check` of each kind of pixels, (N, H, W, C)."""
    for o, p, t in by_kind(nchw(ours), nchw(plain), nchw(truth)):
        check(o, p, t, torch.float32)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("C", [3, 19])
def test_any_temperature_forward(C, temperature):
    x, t = (logits_of_every_kind(2, C, 3, 36) for _ in range(2))
    y, delta, lse, *_ = pack(x, target=t, temperature=temperature)
    p64, t64 = (activate(v.double(), SOFTMAX, temperature) for v in (x, t))
    p32, t32 = (activate(v, SOFTMAX, temperature) for v in (x, t))
    check_kinds(y, carried(nhwc(p32), nhwc(t32)), carried(nhwc(p64), nhwc(t64)))
    check_kinds(delta, nhwc(p32 - t32), nhwc(p64 - t64))
    assert (delta[:, :, 2::4] == 0).all()  # uniform minus uniform
    if temperature < 1e30:  # beyond, it stops where sums would overflow
        torch.testing.assert_close(lse.double(), log_sum_exp(x, temperature), rtol=1e-6, atol=1e-6)
    assert (lse >= x.amax(1)).all()
    assert lse.isfinite().all()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("C", [3, 19])
def test_any_temperature_backward(C, temperature):
    x, dy = logits_of_every_kind(2, C, 3, 36), torch.randn(2, 3, 36, C)
    scale = torch.tensor([0.5, 3.0])
    _, _, lse, *_ = pack(x, temperature=temperature)
    dx = softmax_bwd(x, lse, dy, scale, temperature=temperature)
    grads = []
    for work in (torch.float64, torch.float32):
        v = x.to(work).requires_grad_()
        g = nchw(dy).to(work) * scale.to(work)[:, None, None, None]
        activate(v, SOFTMAX, temperature).backward(g)
        grads.append(nhwc(v.grad))
    check_kinds(nhwc(dx), grads[1], grads[0])


@pytest.mark.parametrize("temperature", [1e-46, 1e-30, 0.3, 3.0])
def test_any_temperature_of_listed_targets(temperature):
    C = 19
    x = logits_of_every_kind(2, C, 3, 36)
    labels = torch.randint(0, C, (2, 3, 36))
    values, indices = torch.rand(2, 2, 3, 36), torch.randint(0, C, (2, 2, 3, 36))
    onehot = F.one_hot(labels, C)
    listed = nhwc(torch.zeros(2, C, 3, 36).scatter_add_(1, indices, values))
    truth, plain = (nhwc(activate(v, SOFTMAX, temperature)) for v in (x.double(), x))
    for target, dense in (
        ({"labels": labels}, onehot),
        ({"topk": (values, indices, None)}, listed),
    ):
        y, taken, *_ = pack(x, temperature=temperature, **target)
        part = taken[..., None] * dense
        check_kinds(y, plain - part, truth - part)
        nearer = (truth - dense).square().sum(-1) < truth.square().sum(-1) - 1e-4
        assert taken.bool()[nearer].all()


@pytest.mark.parametrize("temperature", [1e-46, 1e-30, 0.3])
@pytest.mark.parametrize("activation", [NONE, SIGMOID])
def test_any_temperature_of_the_other_activations(activation, temperature):
    x = 3 * torch.randn(1, 3, 5, 16)
    x[0, :, 0] = torch.tensor([0.0, LOWEST, -LOWEST])[:, None]
    dy, one = torch.randn(1, 5, 16, 3), torch.ones(1)
    y, *_ = pack(x, activation=activation, temperature=temperature)
    dx = softmax_bwd(x, None, dy, one, activation=activation, temperature=temperature)
    assert not y.isnan().any()
    assert not dx.isnan().any()
    assert (y[0, 0, :, 0] == (0.5 if activation == SIGMOID else 0)).all()
    if activation == SIGMOID:
        check(y, y, nhwc(activate(x.double(), SIGMOID, temperature)), torch.float32)
        assert not dx[0, 1:, 0].any()  # saturated: 0 · 1 / T


def test_a_target_that_is_taken_as_it_is_has_no_temperature():
    x, t = torch.randn(2, 3, 5, 17), torch.rand(2, 3, 5, 17)
    for activation in (SOFTMAX, SIGMOID):
        how = {"target": t, "target_activation": NONE, "temperature": 3.0}
        y, delta, *_ = pack(x, activation=activation, **how)
        assert torch.equal(y[1], nhwc(t)[1])
        truth = nhwc(activate(x.double(), activation, 3.0) - t)
        check(delta, truth.float(), truth, torch.float32)
    # without activations both are divided
    _, delta, *_ = pack(x, target=t, activation=NONE, temperature=3.0)
    check(delta, nhwc((x - t) / 3), nhwc((x.double() - t) / 3), torch.float32)


# -- cross-entropy -----------------------------------------------------------------------------


@pytest.mark.parametrize(("weighted", "smoothing"), [(False, 0.0), (True, 0.0), (True, 0.2)])
@pytest.mark.parametrize(("activation", "temperature"), [(SOFTMAX, 1.0), (SOFTMAX, 2.0), (NONE, 1)])
def test_cross_entropy(activation, temperature, weighted, smoothing):
    C = 19
    x, labels = 3 * torch.randn(2, C, 13, 27), torch.randint(-1, C, (2, 13, 27))
    x[:, :, 4, 4], labels[:, 4, 4] = float("nan"), -1  # not counted: harmless
    weight = torch.rand(C) if weighted else None
    *_, lse, ce_lse, rows = pack(
        x, activation=activation, temperature=temperature, ce=(labels, weight, smoothing)
    )
    x64 = x.double().requires_grad_()
    w64 = weight.double() if weighted else None
    kw = {"ignore_index": -1, "label_smoothing": smoothing, "reduction": "none"}
    truth = F.cross_entropy(x64, labels, w64, **kw)
    counted = labels >= 0
    torch.testing.assert_close(rows[..., 0], truth.sum(-1), rtol=1e-6, atol=1e-5)
    each = weight[labels.clamp(min=0)].double() if weighted else torch.ones(labels.shape).double()
    torch.testing.assert_close(rows[..., 1], (each * counted).sum(-1))

    (truth.sum((1, 2)) * torch.tensor([0.5, 2.0])).sum().backward()
    dx, ce_scale = poisoned(*x.shape), torch.tensor([0.5, 2.0])
    own = activation != SOFTMAX or temperature != 1.0
    ops.softmax_bwd(
        x, lse=lse, dy=None, scale=None, valid=None, activation=activation, temperature=temperature,
        ce_labels=labels, ce_lse=ce_lse if own else None, ce_scale=ce_scale, class_weight=weight,
        label_smoothing=smoothing, row0=0, rows=13, dx=dx,
    )  # fmt: skip
    assert not dx[:, :, 4, 4].any()
    torch.testing.assert_close(dx.double(), x64.grad.nan_to_num(), rtol=1e-5, atol=1e-6)


def test_cross_entropy_of_padded_and_large_logits():
    """Of a pixel without any class it is log C; smoothing meets no sum of lowest numbers."""
    C = 19
    x = logits_of_every_kind(2, C, 3, 36)
    labels = torch.randint(0, C, (2, 3, 36))
    labels[:, :, 1::4] = 0  # a class that is not padded
    for smoothing in (0.0, 0.1):
        ce = (labels, None, smoothing)
        kw = {"label_smoothing": smoothing, "reduction": "none"}
        for first, kind in enumerate(KINDS):
            one = x[..., first::4].contiguous()
            *_, rows = pack(one, ce=(labels[..., first::4].contiguous(), *ce[1:]))
            truth = F.cross_entropy(one.double(), labels[..., first::4], **kw)
            torch.testing.assert_close(rows[..., 0], truth.sum(-1), rtol=1e-6, atol=1e-5)
            if kind == "all classes padded":
                torch.testing.assert_close(truth, torch.full_like(truth, C).log())


@pytest.mark.parametrize(
    ("activation", "temperature"), [(SOFTMAX, 1.0), (SOFTMAX, 3.0), (NONE, 1.0)]
)
def test_without_a_backward_the_cross_entropy_leaves_no_lse(activation, temperature):
    x, labels = torch.randn(2, 19, 5, 17), torch.randint(0, 19, (2, 5, 17))
    ce = (labels, None, 0.1)
    want = pack(x, activation=activation, temperature=temperature, ce=ce)[-1]
    rows = poisoned(2, 5, 2, dtype=torch.float64)
    ops.softmax_pack_fwd(
        x, activation=activation, target_activation=activation, temperature=temperature,
        ce_labels=labels, class_weight=None, label_smoothing=0.1, row0=0, rows=5, core0=0,
        core_rows=5, ce_rows=rows, **UNUSED,
    )  # fmt: skip
    assert torch.equal(rows, want)


def test_a_cross_entropy_of_weight_0_has_no_gradient():
    x, labels = logits_of_every_kind(2, 19, 3, 36), torch.randint(0, 19, (2, 3, 36))
    *_, lse, _, _ = pack(x)
    scale = torch.tensor([0.0, 1.0])
    dx = softmax_bwd(x, lse, None, None, ce=(labels, None, scale, None), smoothing=0.1)
    assert (dx[0] == 0).all()
    assert dx[1].any()


# -- softmax_bwd -------------------------------------------------------------------------------


def softmax_bwd(x, lse, dy, scale, *, valid=None, activation=SOFTMAX, temperature=1.0,
                ce=(None,) * 4, smoothing=0.0, strip=None, dx=None):  # fmt: skip
    row0, rows = strip or (0, x.shape[2])
    dx = torch.full_like(x, float("nan")) if dx is None else dx
    ops.softmax_bwd(
        x, lse=lse, dy=dy, scale=scale, valid=valid, activation=activation,
        temperature=temperature, ce_labels=ce[0], ce_lse=ce[1], ce_scale=ce[2],
        class_weight=ce[3], label_smoothing=smoothing, row0=row0, rows=rows, dx=dx,
    )  # fmt: skip
    return dx


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("C", "size"), [*((C, size) for C in (1, 3, 19) for size in SIZES), (150, (3, 27))]
)
def test_softmax_bwd(C, size, dtype):
    scale = torch.tensor([0.5, 3.0])
    for activation, temperature, kind, x_dtype in [
        (SOFTMAX, 1.0, "nchw", torch.float32),
        (SOFTMAX, 2.5, "channels_last", torch.bfloat16),
        (SIGMOID, 2.0, "sliced", torch.float16),
        (NONE, 3.0, "channels_last", torch.float32),
        (SOFTMAX, 0.5, "sliced", torch.float32),
    ]:
        x = layout((3 * torch.randn(2, C, *size)).to(x_dtype), kind)
        dy = torch.randn(2, *size, C + 3).to(dtype)
        _, _, lse, _, _ = pack(x, activation=activation, temperature=temperature)
        dx = layout(torch.full_like(x, float("nan")), kind)
        softmax_bwd(x, lse, dy, scale, activation=activation, temperature=temperature, dx=dx)
        grads = []
        for work in (torch.float64, torch.float32):
            v = x.to(work).requires_grad_()
            g = nchw(dy[..., :C]).to(work) * scale.to(work)[:, None, None, None]
            activate(v, activation, temperature).backward(g)
            grads.append(v.grad)
        check(dx, grads[1].to(x_dtype), grads[0], torch.float32)


def test_softmax_bwd_with_cross_entropy_and_invalid_pixels():
    C, scale, ce_scale = 19, torch.tensor([0.5, 3.0]), torch.tensor([1.0, 0.25])
    x, labels = 3 * torch.randn(2, C, 13, 27), torch.randint(-1, C, (2, 13, 27))
    valid, dy = torch.rand(2, 13, 27) > 0.3, torch.randn(2, 13, 27, C)
    labels[~valid & (torch.rand(2, 13, 27) > 0.5)] = -1
    dead = (~valid & (labels < 0))[:, None].expand_as(x)
    x[dead] = float("nan")
    dy[~valid] = float("nan")
    for temperature in (1.0, 2.0):
        _, _, lse, ce_lse, _ = pack(x, temperature=temperature, ce=(labels, None, 0.1))
        own = ce_lse if temperature != 1.0 else None
        dx = softmax_bwd(
            x, lse, dy, scale, valid=valid, temperature=temperature,
            ce=(labels, own, ce_scale, None), smoothing=0.1,
        )  # fmt: skip
        v = x.double().nan_to_num().requires_grad_()
        g = (dy.nan_to_num() * valid[..., None]).double() * scale.double()[:, None, None, None]
        loss = F.cross_entropy(v, labels, ignore_index=-1, label_smoothing=0.1, reduction="none")
        value = (activate(v, SOFTMAX, temperature) * nchw(g)).sum()
        (value + (loss.sum((1, 2)) * ce_scale).sum()).backward()
        assert not dx[dead].any()
        torch.testing.assert_close(dx.double(), v.grad, rtol=1e-5, atol=1e-6)


# -- strips, threads, layouts: bit for bit -----------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_strips_equal_the_whole(dtype):
    C, H = 19, 13
    x, t = torch.randn(2, C, H, 27), torch.randn(2, C, H, 27)
    labels, valid = torch.randint(-1, C, (2, H, 27)), torch.rand(2, H, 27) > 0.2
    ce = (labels, None, 0.1)
    whole = pack(x, target=t, valid=valid, ce=ce, dtype=dtype)
    dy, scale = torch.randn(2, H, 27, C).to(dtype), torch.rand(2)
    dx = softmax_bwd(x, whole[2], dy, scale, valid=valid, ce=(labels, None, scale, None))
    parts = torch.full_like(dx, float("nan"))
    for core0, core_rows in ((0, 5), (5, 4), (9, 4)):
        row0, rows = core0 - 2, core_rows + 4
        part = pack(
            x,
            target=t,
            valid=valid,
            ce=ce,
            dtype=dtype,
            strip=(row0, rows),
            core=(core0, core_rows),
        )
        for r in range(rows):
            for a, b in zip(whole[:2], part[:2], strict=True):
                inside = 0 <= row0 + r < H
                expected = a[:, row0 + r] if inside else torch.zeros_like(b[:, r])
                assert torch.equal(b[:, r], expected)
        core = slice(core0, core0 + core_rows)
        assert torch.equal(part[2][:, core], whole[2][:, core])
        assert torch.equal(part[4][:, core], whole[4][:, core])
        outside = torch.cat([part[2][:, :core0], part[2][:, core0 + core_rows :]], 1)
        assert outside.isnan().all()
        softmax_bwd(
            x, whole[2], dy[:, core].contiguous(), scale, valid=valid,
            ce=(labels, None, scale, None), strip=(core0, core_rows), dx=parts,
        )  # fmt: skip
    assert torch.equal(parts, dx)


def test_layouts_give_the_same_bits():
    x, t = torch.randn(2, 19, 7, 33), torch.randn(2, 19, 7, 33)
    first = pack(x, target=t)
    for kind in ("channels_last", "sliced"):
        other = pack(layout(x, kind), target=layout(t, kind))
        assert all(torch.equal(a, b) for a, b in zip(first[:3], other[:3], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_gradient_is_written_past_the_cache(dtype):
    H = 960 // dtype.itemsize * 2
    x, dy = torch.randn(1, 19, H, 512).to(dtype), torch.randn(1, H, 512, 19)
    assert x.nbytes > 16 * 2**20
    lse, scale = x.float().logsumexp(1), torch.ones(1)
    whole = softmax_bwd(x, lse, dy, scale)
    for rows in (slice(0, 9), slice(H - 10, H)):
        part = x[:, :, rows].contiguous()
        small = softmax_bwd(part, lse[:, rows].contiguous(), dy[:, rows].contiguous(), scale)
        assert torch.equal(whole[:, :, rows], small)


def every_result():
    """One pass through all operators, on inputs that do not change."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *s: torch.randn(*s, generator=generator)  # noqa: E731
    x, t, dy = draw(2, 19, 40, 64), draw(2, 19, 40, 64), draw(2, 40, 64, 19)
    labels = (draw(2, 40, 64) * 3).long().clamp(-1, 18)
    y, delta, lse, _, rows = pack(x, target=t, ce=(labels, None, 0.1))
    dx = softmax_bwd(x, lse, dy, torch.ones(2), ce=(labels, None, torch.ones(2), None))
    z, dz = draw(2, 40, 64, 40), draw(2, 40, 64, 40)
    out = [y, delta, lse, rows, dx, ops.diff_reduce_fwd(dz), *pool_diff(z, dz, MAX)]
    out += pool_diff(z, dz, AVG)
    table = draw(9, 19, 24)
    u, taken, *_ = pack(x, labels=labels)
    z, dz = poisoned(2, 40, 64, 24), draw(2, 40, 64, 24)
    ops.label_conv_fwd(
        labels,
        valid=None,
        table=table,
        interior=table.sum(0),
        from_target=odd_images(2),
        taken=taken,
        taken_row0=0,
        row0=0,
        z=z,
        dz=dz,
    )
    w = draw(70, 24, 3, 3)
    out += [u, z, dz, *(winograd(z, w, tile=tile) for tile in TILES)]
    out += [winograd(z.bfloat16(), w.bfloat16(), u_dtype=torch.bfloat16)]
    return [*out, direct(z.bfloat16(), w.bfloat16())]


def test_threads_do_not_change_a_bit():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = every_result()
        torch.set_num_threads(2)
        two = every_result()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# -- relu_pool ---------------------------------------------------------------------------------


def unpack_code(code, C):
    return torch.stack([code & 15, code >> 4], -1).flatten(-2)[..., :C].long()


def unpack_mask(mask, C):
    bits = (mask[..., None] >> torch.arange(8)) & 1
    return bits.flatten(-2)[..., :C].bool()


def pool_diff(z, dz, pool):
    N, H, W, C = z.shape
    y, delta = (poisoned(N, H // 2, W // 2, C, dtype=z.dtype) for _ in range(2))
    shape = (N, H // 2, W // 2, (C + 1) // 2) if pool == MAX else (N, H, W, (C + 7) // 8)
    code = poisoned(*shape, dtype=torch.uint8)
    ops.relu_pool_diff_fwd(
        z, dz=dz, from_target=odd_images(N), pool=pool, y=y, delta=delta, code=code
    )
    return y, delta, code


def branches(z, dz, dtype):
    """(prediction, target) of which image n carries z."""
    z, dz = z.to(dtype), dz.to(dtype)
    odd = odd_images(len(z)).view(-1, 1, 1, 1)
    return z + dz * odd, z - dz * ~odd


def pooled(z, pool):
    f = F.max_pool2d if pool == MAX else F.avg_pool2d
    return nhwc(f(nchw(z).relu(), 2))


@pytest.mark.parametrize("pool", [MAX, AVG])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("C", "size"), [(64, (13, 27)), (3, (7, 33)), (19, (2, 2)), (40, (8, 6))])
def test_relu_pool(C, size, dtype, pool):
    z = torch.randn(2, *size, C).to(dtype)
    dz = (0.1 * torch.randn(2, *size, C)).to(dtype)
    y, delta, code = pool_diff(z, dz, pool)
    (s64, t64), (s32, t32) = branches(z, dz, torch.float64), branches(z, dz, torch.float32)
    check(y, pooled(z.float(), pool).to(dtype), pooled(z.double(), pool), dtype)
    plain = (pooled(s32, pool) - pooled(t32, pool)).to(dtype)
    check(delta, plain, pooled(s64, pool) - pooled(t64, pool), dtype)

    dy = torch.randn_like(y)
    s = s64.clone().requires_grad_()
    pooled(s, pool).backward(dy.double())
    back = poisoned(2, *size, C, dtype=dtype)
    ops.relu_pool_bwd(dy, code=code, pool=pool, height=size[0], width=size[1], row0=0, dz=back)
    assert torch.equal(back, s.grad.to(dtype))

    row0, rows = -1, size[0] + 3
    strip = poisoned(2, rows, size[1], C, dtype=dtype)
    ops.relu_pool_bwd(dy, code=code, pool=pool, height=size[0], width=size[1], row0=row0, dz=strip)
    assert torch.equal(strip[:, 1 : 1 + size[0]], back)
    assert not strip[:, 0].any()
    assert not strip[:, 1 + size[0] :].any()

    # the plain form agrees with the difference form on z + 0
    y2, code2 = torch.full_like(y, float("nan")), torch.full_like(code, 255)
    ops.relu_pool_fwd(z, pool=pool, y=y2, code=code2)
    y3, delta3, code3 = pool_diff(z, torch.zeros_like(z), pool)
    assert torch.equal(y2, y)
    assert torch.equal(y3, y)
    assert torch.equal(code2, code3)
    assert not delta3.any()


def test_max_pool_codes():
    z = torch.zeros(1, 4, 4, 3)
    z[0, 0, 0], z[0, 0, 1] = 1.0, 1.0  # a tie: the first one wins
    z[0, 1, 3, 0] = 2.0
    z[0, 2:, 2:, 2] = -1.0
    _, _, code = pool_diff(z, torch.zeros_like(z), MAX)
    got = unpack_code(code, 3)[0]
    assert got[0, 0].tolist() == [0, 0, 0]
    assert got[0, 1].tolist() == [3, 4, 4]
    assert got[1, 1].tolist() == [4, 4, 4]
    assert (code[..., 1] >> 4 == 0).all()  # beyond the last channel


def test_avg_pool_mask_is_the_sign_everywhere():
    z, dz = torch.randn(2, 7, 5, 19), torch.randn(2, 7, 5, 19)
    _, _, mask = pool_diff(z, dz, AVG)
    assert torch.equal(unpack_mask(mask, 19), branches(z, dz, torch.float32)[0] > 0)
    assert (mask[..., 2] >> 3 == 0).all()


def test_equal_winners_keep_the_difference():
    """Far from zero the pooled difference is dz itself, not a difference of rounded sums."""
    z = 1000 + torch.randn(2, 8, 8, 16)
    dz = 1e-6 * torch.randn(2, 1, 1, 1).expand_as(z).contiguous()
    _, delta, _ = pool_diff(z, dz, MAX)
    assert torch.equal(delta, dz[:, :4, :4])
    *_, mask = pool_diff(z, dz, AVG)
    assert unpack_mask(mask, 16).all()


def test_nan_goes_through_the_pool():
    z, dz = torch.randn(2, 4, 4, 16), torch.randn(2, 4, 4, 16)
    dz[:, 1, 1, 5] = float("nan")
    z[:, 3, 0, 7] = float("nan")
    for pool in (MAX, AVG):
        y, delta, _ = pool_diff(z, dz, pool)
        assert delta[:, 0, 0, 5].isnan().all()
        assert delta[:, 1, 0, 7].isnan().all()
        assert delta.isnan().sum() == 4
        assert y.isnan().sum() == 2


# -- relu --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [1, 19, 64])
def test_relu(C, dtype):
    z, dz = torch.randn(2, 5, 7, C).to(dtype), (0.1 * torch.randn(2, 5, 7, C)).to(dtype)
    y, delta = (poisoned(2, 5, 7, C, dtype=dtype) for _ in range(2))
    mask = poisoned(2, 5, 7, (C + 7) // 8, dtype=torch.uint8)
    ops.relu_diff_fwd(z, dz=dz, from_target=odd_images(2), y=y, delta=delta, mask=mask)
    (s64, t64), (s32, t32) = branches(z, dz, torch.float64), branches(z, dz, torch.float32)
    assert torch.equal(y, z.relu())
    check(delta, (s32.relu() - t32.relu()).to(dtype), s64.relu() - t64.relu(), dtype)
    assert torch.equal(unpack_mask(mask, C), s32 > 0)

    dy = torch.randn_like(z)
    out = torch.full_like(dy, float("nan"))
    ops.relu_bwd(dy, mask=mask, dz=out)
    assert torch.equal(out, dy.where(s64 > 0, torch.zeros_like(dy)))

    z_in, dz_in, dy_in = z.clone(), dz.clone(), dy.clone()
    ops.relu_diff_fwd(z_in, dz=dz_in, from_target=odd_images(2), y=z_in, delta=dz_in, mask=None)
    ops.relu_bwd(dy_in, mask=mask, dz=dy_in)
    assert torch.equal(z_in, y)
    assert torch.equal(dz_in, delta)
    assert torch.equal(dy_in, out)

    plain_mask = torch.full_like(mask, 255)
    ops.relu_fwd(z, y=y.fill_(float("nan")), mask=plain_mask)
    assert torch.equal(y, z.relu())
    assert torch.equal(unpack_mask(plain_mask, C), z > 0)


# -- label_conv, topk_conv ---------------------------------------------------------------------


def table_of(C, K, c_out, dtype):
    """(weight (c_out, C, K, K), table (K * K, C, c_out))"""
    weight = (torch.randn(c_out, C, K, K) / K).to(dtype)
    return weight, weight.permute(2, 3, 1, 0).reshape(K * K, C, c_out).contiguous()


def conv(dense, weight, dtype):
    return nhwc(F.conv2d(dense.to(dtype), weight.to(dtype), padding=weight.shape[-1] // 2))


def check_look_up(look_up, dense, weight, dtype):
    """The other arguments of `look_up` by keyword, of the target `dense` (N, C, H, W)."""
    N, _, H, W = dense.shape
    taken = torch.rand(N, H, W) > 0.4
    taken[:, 2:11, 3:12] = True  # interiors of both kinds
    taken[:, 2:11, 12:20] = False
    q = torch.randn(N, H, W, weight.shape[0]).to(dtype)
    z, dz = torch.full_like(q, float("nan")), q.clone()
    look_up(from_target=odd_images(N), taken=taken.byte(), taken_row0=0, row0=0, z=z, dz=dz)

    def truth(work):
        mine, all_of_it = (conv(m, weight, work) for m in (dense * taken[:, None], dense))
        return carried(q.to(work) + mine, all_of_it), q.to(work) - (all_of_it - mine)

    for got, plain, exact in zip((z, dz), truth(torch.float32), truth(torch.float64), strict=True):
        check(got, plain.to(dtype), exact, dtype)
    return q, taken, z, dz


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("C", "K", "c_out"), [(1, 3, 64), (19, 1, 64), (19, 3, 24), (150, 5, 70)])
def test_label_conv(C, K, c_out, dtype):
    weight, table = table_of(C, K, c_out, dtype)
    interior = table.double().sum(0).float()
    labels = torch.randint(-1, C, (2, 13, 27))
    labels[:, 2:11, 3:20] = torch.randint(-1, C, (2, 1, 1))  # an interior, with or without a class
    labels[0, 0, 0] = C
    valid = torch.rand(2, 13, 27) > 0.05
    known = (labels >= 0) & (labels < C) & valid
    dense = torch.zeros(2, 13, 27, C).scatter(3, labels.clamp(0, C - 1)[..., None], 1.0)
    dense = nchw(dense * known[..., None])
    look_up = functools.partial(
        ops.label_conv_fwd, labels, valid=valid, table=table, interior=interior
    )
    q, taken, z, dz = check_look_up(look_up, dense, weight, dtype)

    around = F.pad(q, (0, 0, 0, 0, 2, 2), value=float("nan"))
    strip = torch.full_like(around, float("nan"))
    look_up(
        from_target=odd_images(2), taken=taken.byte(), taken_row0=0, row0=-2, z=strip, dz=around
    )
    for part, whole in ((strip, z), (around, dz)):
        assert torch.equal(part[:, 2:15], whole)
        assert not part[:, :2].any()
        assert not part[:, 15:].any()


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("C", "k"), [(19, 4), (3, 1)])
def test_topk_conv(C, k, dtype, rest):
    weight, table = table_of(C, 3, 40, dtype)
    values, indices, per_class, dense = topk_case(C, k, rest)
    valid = torch.rand(2, 13, 27) > 0.1
    dense = dense * valid[:, None]
    values = values.where(valid[:, None], torch.tensor(float("nan")))  # harmless there
    rest_table = table.double().sum(1).float() if rest else None
    look_up = functools.partial(
        ops.topk_conv_fwd, values, topk_indices=indices, topk_rest=per_class, valid=valid,
        table=table, rest_table=rest_table,
    )  # fmt: skip
    q, taken, z, dz = check_look_up(look_up, dense, weight, dtype)
    around = F.pad(q[:, 10:], (0, 0, 0, 0, 0, 2), value=float("nan"))
    strip = torch.full_like(around, float("nan"))
    last = taken[:, 9:].byte().contiguous()
    look_up(from_target=odd_images(2), taken=last, taken_row0=9, row0=10, z=strip, dz=around)
    for part, whole in ((strip, z), (around, dz)):
        assert torch.equal(part[:, :3], whole[:, 10:])
        assert not part[:, 3:].any()


# -- winograd ----------------------------------------------------------------------------------


TILES = (2, 4)  # results to a side


def winograd(
    x, w, *, tile=2, transposed=False, pad_h=1, row0=0, z_dtype=None, u_dtype=torch.float32
):
    """The convolution of x (N, rows, W, C_in) by w (C_out, C_in, 3, 3), or of the transpose by
    w (C_in, C_out, 3, 3); what is multiplied has the dtype of u."""
    c_in, c_out = x.shape[3], w.shape[transposed]
    u = poisoned((tile + 2) ** 2 * (c_in + c_in % 2) * padded(c_out), dtype=u_dtype)
    ops.winograd_weight(w.permute(0, 2, 3, 1).contiguous(), tile, transposed, u)
    rows, dtype = x.shape[1] + 2 * pad_h - 2, z_dtype or x.dtype
    z = poisoned(x.shape[0], rows, x.shape[2], c_out, dtype=dtype)
    ops.winograd(x, u, tile, pad_h, row0, z)
    return z


# Input channels in one part and in several, in pairs as well, with remainders.
WINOGRAD_SIZES = [
    (8, 64, (13, 27)), (3, 19, (1, 5)), (19, 40, (7, 33)), (64, 19, (2, 300)), (200, 70, (6, 17)),
    (391, 33, (3, 4)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("C", "c_out", "size"), WINOGRAD_SIZES)
def test_winograd(C, c_out, size, tile, transposed, dtype):
    x = torch.randn(2, *size, C).to(dtype)
    w = torch.randn(*((C, c_out) if transposed else (c_out, C)), 3, 3) / C**0.5

    def plain(work):
        f = F.conv_transpose2d if transposed else F.conv2d
        return nhwc(f(nchw(x.to(work)), w.to(work), padding=1))

    f32, truth = plain(torch.float32), plain(torch.float64)
    z = winograd(x, w, tile=tile, transposed=transposed)
    check(z, f32.to(dtype), truth, dtype)
    exact = winograd(x, w, tile=tile, transposed=transposed, z_dtype=torch.float32)
    check(exact, f32, truth, torch.float32)
    assert torch.equal(exact.to(dtype), z)

    short = w.bfloat16()
    of_short = winograd(x, short, tile=tile, transposed=transposed)
    assert torch.equal(of_short, winograd(x, short.float(), tile=tile, transposed=transposed))

    # strips of rows with their halo, some that begin in the middle of a tile
    around = F.pad(x, (0, 0, 0, 0, 1, 1))
    for first, rows in ((0, 2), (0, 1), (1, 1), (2, 3), (3, 4), (5, 5), (4, 8)):
        here = slice(first, first + rows)
        part = around[:, first : first + rows + 2]
        if part.shape[1] > 2:
            got = winograd(part, w, tile=tile, transposed=transposed, pad_h=0, row0=first)
            check(got, f32[:, here].to(dtype), truth[:, here], dtype)
            if tile == 2 or (first % 4 == 0 and rows % 4 == 0):
                assert torch.equal(got, z[:, here])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("C", "c_out", "size"), WINOGRAD_SIZES)
def test_winograd_in_pairs(C, c_out, size, transposed):
    """Of numbers so short that no point is rounded, exactly the convolution; otherwise, off by what
    rounding the points takes."""

    def plain(x, w):
        f = F.conv_transpose2d if transposed else F.conv2d
        return nhwc(f(nchw(x.double()), w.double(), padding=1))

    shape = (C, c_out) if transposed else (c_out, C)
    in_pairs = functools.partial(winograd, transposed=transposed, u_dtype=torch.bfloat16)
    x = torch.randint(-8, 9, (2, *size, C)).bfloat16()
    w = 4 * torch.randint(-2, 3, (*shape, 3, 3)).bfloat16()
    z = in_pairs(x, w, z_dtype=torch.float32)
    assert torch.equal(z.double(), plain(x, w))
    assert torch.equal(in_pairs(x.float(), w), z)
    around = F.pad(x, (0, 0, 0, 0, 1, 1))
    for first, rows in ((0, 1), (1, 1), (2, 4)):
        part = around[:, first : first + rows + 2]
        if part.shape[1] > 2:
            got = in_pairs(part, w, pad_h=0, row0=first, z_dtype=torch.float32)
            assert torch.equal(got, z[:, first : first + rows])

    x, w = torch.randn(2, *size, C).bfloat16(), torch.randn(*shape, 3, 3).bfloat16()
    truth = plain(x, w)
    for tile, most in ((2, 0.006), (4, 0.02)):
        z = in_pairs(x, w, tile=tile, z_dtype=torch.float32)
        assert 1e-4 < error(z, truth) < most
        assert torch.equal(in_pairs(x, w, tile=tile), z.bfloat16())


@pytest.mark.parametrize(
    ("dtype", "u_dtype"),
    [*((dtype, torch.float32) for dtype in DTYPES), (torch.bfloat16, torch.bfloat16),
     (torch.float32, torch.bfloat16)],
)  # fmt: skip
def test_winograd_reads_nothing_but_the_neighbourhood(dtype, u_dtype):
    """Exactly 0 where all of it is 0; the same result where it is the same, as at pixels of a
    window whose neighbourhoods repeat along a row or column: their ties stay ties."""
    w = torch.randn(40, 24, 3, 3).to(u_dtype)
    x = torch.zeros(1, 12, 14, 24, dtype=dtype)
    x[:, 5, 6] = torch.randn(24).to(dtype)
    z = winograd(x, w, u_dtype=u_dtype)
    near = torch.zeros(1, 12, 14, dtype=torch.bool)
    near[:, 4:7, 5:8] = True
    assert not z[~near].any()
    assert z[near].all()

    flat = torch.randn(1, 1, 1, 24).expand(1, 12, 14, 24)
    stripes = torch.randn(1, 1, 14, 24).expand(1, 12, 14, 24)
    for along, same in ((flat, (1, 2)), (stripes, (1,)), (stripes.transpose(1, 2), (2,))):
        z = winograd(along.contiguous().to(dtype), w, u_dtype=u_dtype)[:, 2:-2, 2:-2]
        for dim in same:
            one, other = (z.unflatten(dim, (-1, 2)).select(dim + 1, i) for i in (0, 1))
            assert torch.equal(one, other)


def test_large_tiles_of_winograd_leave_rounding_alone():
    """Of a pixel, a tile of 4 x 4 results holds nothing beyond its neighbourhood but rounding."""
    w, x = torch.randn(40, 24, 3, 3), torch.zeros(1, 15, 14, 24)
    x[:, 5, 6] = torch.randn(24)
    z, small = winograd(x, w, tile=4), winograd(x, w)
    assert (z - small).abs().max() <= 1e-5 * small.abs().max()
    assert not z[:, 8:].any()  # the next tiles do not read it
    assert not z[:, :, 8:].any()


@pytest.mark.parametrize("tile", TILES)
def test_winograd_of_no_images(tile):
    x, w = torch.empty(0, 5, 7, 8), torch.randn(3, 8, 3, 3)
    assert winograd(x, w, tile=tile).shape == (0, 5, 7, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES)
def test_winograd_past_the_cache(tile, dtype):
    """Large results are written around the cache: the same bits."""
    x, w = torch.randn(1, 130, 132, 8).to(dtype), torch.randn(512 // dtype.itemsize, 8, 3, 3)
    whole = winograd(x, w, tile=tile)
    assert whole.nbytes > 8 * 2**20
    for first in (0, 64):
        part = F.pad(x, (0, 0, 0, 0, 1, 1))[:, first : first + 34]
        assert torch.equal(winograd(part, w, tile=tile, pad_h=0), whole[:, first : first + 32])


# -- direct_conv ---------------------------------------------------------------------------------


def direct(x, w, *, transposed=False, pad_h=None, z_dtype=torch.float32):
    """As `winograd`, of bfloat16 and by K x K taps."""
    c_out, k = w.shape[transposed], w.shape[3]
    pad_h = k // 2 if pad_h is None else pad_h
    u = poisoned(k * k * padded(x.shape[3]) * padded(c_out), dtype=torch.bfloat16)
    ops.direct_weight(w.permute(0, 2, 3, 1).contiguous(), transposed, u)
    z = poisoned(len(x), x.shape[1] + 2 * pad_h - k + 1, x.shape[2], c_out, dtype=z_dtype)
    ops.direct_conv(x, u, k, pad_h, z)
    return z


def padded(channels):
    return -(-channels // 32) * 32


# Parts of 64 input channels, blocks of 32 pixels and outputs, tasks of 8 x 128 pixels: one of each,
# several, and odd remainders, of at most 16 and of more; rows that are short enough for one line,
# where a block begins between two of them.
DIRECT_SIZES = [
    (8, 64, (13, 27), 3), (3, 19, (1, 5), 3), (32, 40, (7, 33), 3), (64, 19, (2, 300), 3),
    (200, 70, (6, 17), 3), (391, 33, (3, 4), 3), (33, 7, (9, 49), 1), (70, 12, (10, 48), 5),
    (5, 65, (4, 9), 7), (70, 33, (9, 12), 3), (5, 40, (9, 9), 5),
]  # fmt: skip


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("C", "c_out", "size", "k"), DIRECT_SIZES)
def test_direct_conv(C, c_out, size, k, transposed):
    x, bf16 = torch.randn(2, *size, C).bfloat16(), torch.bfloat16
    w = (torch.randn(*((C, c_out) if transposed else (c_out, C)), k, k) / C**0.5).bfloat16()

    def plain(work):
        f = F.conv_transpose2d if transposed else F.conv2d
        return nhwc(f(nchw(x.to(work)), w.to(work), padding=k // 2))

    f32, truth = plain(torch.float32), plain(torch.float64)
    z = direct(x, w, transposed=transposed)
    check(z, f32, truth, torch.float32)
    rounded = direct(x, w, transposed=transposed, z_dtype=bf16)
    assert torch.equal(z.to(bf16), rounded)
    unrounded = x.float() * (1 + 2**-10)  # not far enough for another bfloat16
    assert torch.equal(direct(unrounded, w, transposed=transposed), z)

    around = F.pad(x, (0, 0, 0, 0, k // 2, k // 2))  # strips of rows with their halo
    for first, rows in ((0, 2), (1, 1), (2, 3), (3, 9)):
        part = around[:, first : first + rows + k - 1]
        if part.shape[1] >= k:
            got = direct(part, w, transposed=transposed, pad_h=0)
            assert torch.equal(got, z[:, first : first + rows])


def test_direct_conv_keeps_zeros_and_ties():
    """Whatever pixel of a block it is: the same neighbourhood, the same bits."""
    x, w = torch.zeros(1, 12, 150, 70).bfloat16(), torch.randn(40, 70, 3, 3).bfloat16()
    x[:, 5, 140] = 1
    z = direct(x, w)
    near = torch.zeros(1, 12, 150, dtype=torch.bool)
    near[:, 4:7, 139:142] = True
    assert not z[~near].any()
    assert z[near].all()
    flat = torch.randn(70).bfloat16().expand(1, 12, 150, 70).contiguous()
    inner = direct(flat, w)[:, 1:-1, 1:-1]
    assert torch.equal(inner, inner[:, :1, :1].expand_as(inner))


def test_direct_conv_of_no_images():
    x, w = torch.empty(0, 5, 7, 8).bfloat16(), torch.randn(3, 8, 3, 3).bfloat16()
    assert direct(x, w).shape == (0, 5, 7, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_direct_conv_past_the_cache(dtype):
    x = torch.randn(1, 130, 132, 8).bfloat16()
    w = torch.randn(512 // dtype.itemsize, 8, 3, 3).bfloat16()
    whole = direct(x, w, z_dtype=dtype)
    assert whole.nbytes > 8 * 2**20
    for first in (0, 64):
        part = F.pad(x, (0, 0, 0, 0, 1, 1))[:, first : first + 34]
        some = direct(part, w, pad_h=0, z_dtype=dtype)
        assert torch.equal(some, whole[:, first : first + 32])


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("pool", [MAX, AVG])
@pytest.mark.parametrize(("C", "size"), [(64, (13, 27)), (3, (7, 33))])
def test_relu_pool_of_float32(C, size, pool, dtype):
    """Only what comes out is rounded: winners and signs are those of float32."""
    z, dz = torch.randn(2, *size, C), 0.1 * torch.randn(2, *size, C)
    y, delta, code = pool_diff(z, dz, pool)
    y16, delta16 = (torch.full_like(t, float("nan"), dtype=dtype) for t in (y, delta))
    code16 = torch.full_like(code, 255)
    ops.relu_pool_diff_fwd(
        z, dz=dz, from_target=odd_images(2), pool=pool, y=y16, delta=delta16, code=code16
    )
    assert torch.equal(y16, y.to(dtype))
    assert torch.equal(delta16, delta.to(dtype))
    assert torch.equal(code16, code)
    alone, alone16 = torch.full_like(y, float("nan")), torch.full_like(y16, float("nan"))
    ops.relu_pool_fwd(z, pool=pool, y=alone, code=None)
    ops.relu_pool_fwd(z, pool=pool, y=alone16, code=None)
    assert torch.equal(alone16, alone.to(dtype))


# -- diff_reduce -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1), (2, 9001), (1, 3, 5, 64)])
def test_diff_reduce(shape, dtype):
    delta = torch.randn(*shape).to(dtype)
    truth = delta.double().square().flatten(1).sum(1)
    torch.testing.assert_close(ops.diff_reduce_fwd(delta), truth, rtol=1e-6, atol=0)


# -- populate ----------------------------------------------------------------------------------


def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it does nothing")
@pytest.mark.parametrize("shape", [(3, 19, 512, 513), (2, 8, 1024, 1024)])
def test_populate_leaves_no_page_faults(shape):
    if tuple(map(int, platform.release().split(".")[:2])) < (5, 14):
        pytest.skip("the system does not know MADV_POPULATE_WRITE")
    memory = torch.empty(shape)
    ops.populate(memory)
    before = faults()
    memory.fill_(1)
    assert faults() - before < memory.nbytes / 4096 / 100
    assert memory.sum() == memory.numel()
    ops.populate(memory)  # what is there stays
    assert memory.sum() == memory.numel()


# -- edges of the interface --------------------------------------------------------------------


def test_no_images():
    x = torch.empty(0, 19, 5, 7)
    y, delta, *_ = pack(x, target=x)
    assert y.numel() == delta.numel() == 0
    softmax_bwd(x, torch.empty(0, 5, 7), torch.empty(0, 5, 7, 19), torch.empty(0))
    pool_diff(torch.empty(0, 5, 7, 8), torch.empty(0, 5, 7, 8), MAX)
    z = torch.empty(0, 5, 7, 8)
    ops.relu_fwd(z, y=z.clone(), mask=None)
    table = torch.randn(9, 3, 8)
    nothing = torch.empty(0, 5, 7)
    ops.label_conv_fwd(
        nothing.long(), valid=None, table=table, interior=table.sum(0), from_target=odd_images(0),
        taken=nothing.byte(), taken_row0=0, row0=0, z=z, dz=z.clone(),
    )  # fmt: skip
    assert ops.diff_reduce_fwd(z).shape == (0,)


def test_row_slices_of_one_image_are_written_in_place():
    z, dz = torch.randn(3, 8, 6, 16), torch.randn(3, 8, 6, 16)
    y, delta, code = pool_diff(z, dz, MAX)
    parts = [torch.full_like(y, float("nan")), torch.full_like(delta, float("nan")), code * 0 + 255]
    for rows in (slice(0, 1), slice(1, 4)):
        source = slice(2 * rows.start, 2 * rows.stop)
        into = {n: p[:, rows] for n, p in zip(("y", "delta", "code"), parts, strict=True)}
        ops.relu_pool_diff_fwd(
            z[:, source], dz=dz[:, source], from_target=odd_images(3), pool=MAX, **into
        )
    assert all(torch.equal(a, b) for a, b in zip(parts, (y, delta, code), strict=True))


def look_up_rows(z, taken_rows):
    """Rows 2.. of z look at rows 1.. of `taken`, which has fewer."""
    labels, table = torch.zeros(1, 4 + z.shape[1], 4).long(), torch.randn(9, 3, 8)
    taken = torch.zeros(1, taken_rows, 4).byte()
    ops.label_conv_fwd(
        labels, valid=None, table=table, interior=table.sum(0), from_target=odd_images(1),
        taken=taken, taken_row0=1, row0=2, z=z, dz=z.clone(),
    )  # fmt: skip


ONES = torch.ones(8, 8, 3, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: ops.relu_fwd(z, y=z[:, :2].clone()), r"y must have the shape \[1, 4"),
        (lambda z: ops.relu_fwd(z.double(), y=z.double()), "float32, bfloat16 or float16"),
        (lambda z: ops.relu_fwd(z.transpose(1, 2), y=z), "z must be contiguous"),
        (lambda z: ops.relu_fwd(z, y=z, mask=z), "mask must have the shape"),
        (lambda z: ops.relu_pool_fwd(z, pool=2, y=z), "pool must be 0"),
        (lambda z: ops.relu_pool_fwd(z.half(), pool=0, y=z[:, :2, :2]), "z must have the dtype of"),
        (lambda z: pack(z, temperature=0.0), "temperature must be positive"),
        (lambda z: pack(z, labels=torch.zeros(1, 4, 8)), "labels must be Long"),
        (lambda z: pack(z, target=z[:, :1]), "target must have the shape"),
        (lambda z: pack(z, activation=7), "activation must be 0"),
        (lambda z: look_up_rows(z, taken_rows=3), "taken must hold the rows of the image from 1"),
        (lambda z: ops.populate(z[..., :3]), "t must be dense in memory"),
        (lambda z: winograd(z, torch.ones(8, 8, 5, 5)), r"w must be \[C_out, 3, 3, C_in\]"),
        (lambda z: winograd(z, torch.ones(8, 11, 3, 3)), r"u must have the shape \[6144\]"),
        (lambda z: winograd(z, ONES.half()), "w must be float32 or bfloat16"),
        (lambda z: winograd(z, ONES, u_dtype=torch.bfloat16), "u must be float32 where w is"),
        (lambda z: winograd(z, ONES, u_dtype=torch.float16), "u must be float32 or bfloat16"),
        (lambda z: winograd(z.half(), ONES.bfloat16(), u_dtype=torch.bfloat16),
         "x must be float32 or bfloat16 where u is"),
        (lambda z: winograd(z, ONES, pad_h=2), "pad_h must be 0 or 1"),
        (lambda z: winograd(z, ONES, tile=3), "tile must be 2 or 4, got 3"),
        (lambda z: ops.winograd(z, poisoned(4096), 3, 1, 0, z), "tile must be 2 or 4, got 3"),
        (lambda z: winograd(z.half(), ONES, z_dtype=torch.bfloat16), "or float32, got BFloat16"),
        (lambda z: ops.winograd(z, poisoned(4096), 2, 0, 0, z), r"z must have the shape \[1, 2, 4"),
        (lambda z: direct(z.bfloat16(), ONES[..., :2].bfloat16()), "with an odd K, got"),
        (lambda z: direct(z.bfloat16(), ONES), "w must be BFloat16"),
        (lambda z: direct(z.half(), ONES.bfloat16()), "x must be float32 or bfloat16"),
        (lambda z: direct(z.bfloat16(), ONES.bfloat16(), pad_h=2), "pad_h must be in 0 to 1"),
        (lambda z: ops.direct_conv(z.bfloat16(), z.bfloat16(), 2, 0, z), "K must be odd, got 2"),
        (lambda z: ops.relu_diff_fwd(z, dz=z, from_target=odd_images(2), delta=z),
         "from_target must have"),
    ],
)  # fmt: skip
def test_errors_say_what_is_expected(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.randn(1, 4, 4, 8))


def opcheck_cases():
    x, dy = torch.randn(1, 3, 4, 6), torch.randn(1, 4, 6, 3)
    t, labels, lse = torch.randn(1, 3, 4, 6), torch.randint(0, 3, (1, 4, 6)), torch.randn(1, 4, 6)
    z, dz, half = torch.randn(1, 4, 6, 8), torch.randn(1, 4, 6, 8), torch.randn(1, 2, 3, 8)
    code, mask = torch.zeros(1, 2, 3, 4).byte(), torch.zeros(1, 4, 6, 1).byte()
    table, one = torch.randn(9, 3, 8), torch.ones(1)
    rows = torch.zeros(1, 4, 2, dtype=torch.float64)
    values, indices = torch.rand(1, 2, 4, 6), torch.randint(0, 3, (1, 2, 4, 6))
    branch, taken = odd_images(1), (labels == 1).byte()
    look_up = (branch, taken, 0, 0, z.clone(), dz.clone())
    return {
        "softmax_pack_fwd": (
            x, 1, 1, 2.0, 0, 4, 0, 4, 0.1, None, t, branch, None, None, None, None, labels, None,
            dy.clone(), dy.clone(), None, lse, lse.clone(), rows,
        ),
        "label_conv_fwd": (labels, table, table.sum(0), *look_up),
        "topk_conv_fwd": (values, indices, table, *look_up, lse.abs(), table.sum(1)),
        "relu_fwd": (z, z.clone(), mask),
        "relu_diff_fwd": (z, dz, branch, z.clone(), z.clone(), mask),
        "relu_pool_fwd": (z, 0, half.clone(), code),
        "relu_pool_diff_fwd": (z, dz, branch, 1, half.clone(), half.clone(), mask),
        "diff_reduce_fwd": (half,),
        "relu_pool_bwd": (half, code, 0, 4, 6, 0, z.clone()),
        "relu_bwd": (dz, mask, z.clone()),
        "softmax_bwd": (
            x, 1, 1.0, 0, 4, x.clone(), 0.0, x.logsumexp(1), dy, one, None, labels, None, one,
        ),
        "winograd_weight": (torch.randn(8, 3, 3, 8), 2, False, torch.zeros(4096)),
        "direct_weight": (torch.randn(8, 3, 3, 8).bfloat16(), False, torch.zeros(9216).bfloat16()),
        "direct_conv": (z.bfloat16(), torch.randn(9216).bfloat16(), 3, 1, dz.clone()),
        "populate": (dz.clone(),),
        "winograd": (z, torch.randn(4096), 2, 1, 0, dz.clone()),
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(opcheck_cases()))
def test_opcheck(name):
    torch.library.opcheck(getattr(ops, name), opcheck_cases()[name])


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_narrower_builds(capability):
    """The builds for older machines pass the same tests of values."""
    if os.environ.get("GPL_FAST_CPU_CAPABILITY") or ops.cpu_capability() == "default":
        pytest.skip("already a narrow build")
    env = {**os.environ, "GPL_FAST_CPU_CAPABILITY": capability}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", __file__,
         "-k", "(19 or strips or nan or codes or neighbourhood) and not opcheck and not dtype2"],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
