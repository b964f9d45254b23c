"""What holds for every net, option and shape: drawn by hypothesis, on each backend."""

from __future__ import annotations

import pytest
import torch
from cases import error, value_and_grad
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Case, case

from gpl_fast import GenericPerceptualLoss, LossNet, PerceptualLoss, SegmentationLoss

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ["dense", "labels", "topk"]
few = settings(max_examples=20)
# float32 in another order of summation: the same maps by two ways.
CLOSE = 2e-5


def same(a, b):
    return all(map(torch.equal, a, b))


def close(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert error(a, b) < CLOSE or (a.double() - b.double()).abs().max() < 1e-9


@few
@given(c=case(), kind=st.sampled_from(KINDS), masked=st.booleans())
def test_value_and_gradient(backend, c: Case, kind, masked):
    """Finite, >= 0, of the right shape and layout; inputs are not written to; repeatable."""
    loss, pred, target = c.loss(backend=backend), c.maps(), c.target(kind)
    mask = c.mask() if masked else None
    inputs = [pred, mask, *((target.values, target.indices) if kind == "topk" else (target,))]
    inputs = [t for t in inputs if t is not None]
    before = [(t.clone(), t._version) for t in inputs]
    value, grad = value_and_grad(loss, pred, target, mask)
    assert value.shape == (c.shape[:1] if c.options["reduction"] == "none" else ())
    assert value.dtype == torch.float32
    assert value.isfinite().all()
    assert (value >= 0).all()
    assert grad.isfinite().all()
    assert grad.shape == pred.shape
    layout = torch.channels_last if c.channels_last else torch.contiguous_format
    assert not grad.numel() or grad.is_contiguous(memory_format=layout)
    for t, (copy, version) in zip(inputs, before, strict=True):
        assert torch.equal(t, copy)
        assert t._version == version
    assert same(value_and_grad(loss, pred, target, mask), (value, grad))


@few
@given(c=case(), masked=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_prediction_equal_to_its_target_gives_exactly_zero(backend, c: Case, masked, dtype):
    pred = c.maps().to(dtype)
    value, grad = value_and_grad(c.loss(backend=backend), pred, pred, c.mask() if masked else None)
    assert not value.any()
    assert not grad.any()


@few
@given(c=case(), ignored=st.booleans(), masked=st.booleans())
def test_labels_are_their_one_hot_map(backend, c: Case, ignored, masked):
    labels, pred = c.labels(), c.maps()
    mask = c.mask() if masked else None
    ignore = 1 if ignored and c.shape[1] > 1 else None
    got = value_and_grad(c.loss(backend=backend, ignore_index=ignore), pred, labels, mask)
    valid = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
    if ignore is not None:
        valid = valid & (labels != ignore)
    n, channels, h, w = c.shape
    dense = labels.unsqueeze(1).float()
    if channels > 1:
        dense = torch.zeros(n, channels, h, w).scatter_(1, labels.unsqueeze(1), 1)
    plain = c.loss(backend=backend, target_activation="none", temperature=1.0)
    # The temperature is the prediction's alone here.
    pred_loss = plain if c.options["temperature"] == 1.0 else None
    if pred_loss is None:
        want = value_and_grad(lambda x: plain(x / c.options["temperature"], dense, valid), pred)
    else:
        want = value_and_grad(plain, pred, dense, valid)
    close(got, want)


@few
@given(c=case(), rest=st.sampled_from(["renormalize", "uniform", "drop"]), masked=st.booleans())
def test_topk_is_its_dense_map(backend, c: Case, rest, masked):
    t, pred = c.topk(rest, min(2, c.shape[1])), c.maps()
    mask = c.mask() if masked else None
    n, channels, h, w = c.shape
    y = torch.zeros(n, channels, h, w).scatter_add_(1, t.indices, t.values)
    total = t.values.sum(dim=1, keepdim=True)
    if rest == "renormalize":
        y = y / total
    elif rest == "uniform":
        empty = torch.ones_like(y).scatter_(1, t.indices, 0.0)
        y = y + empty * (1 - total) / empty.sum(dim=1, keepdim=True).clamp(min=1)
    options = {"backend": backend, "temperature": 1.0}
    got = value_and_grad(c.loss(**options), pred, t, mask)
    want = value_and_grad(c.loss(**options, target_activation="none"), pred, y, mask)
    close(got, want)


@few
@given(c=case(min_images=1), kind=st.sampled_from(KINDS), bad=st.sampled_from([float("nan"), 1e30]))
def test_pixels_that_do_not_count_change_nothing(backend, c: Case, kind, bad):
    loss, pred, mask = c.loss(backend=backend), c.maps(), c.mask()
    target = c.target(kind)
    value, grad = value_and_grad(loss, pred, target, mask)
    hole = ~mask.unsqueeze(1)
    assert not grad.masked_select(hole).any()
    pred = torch.where(hole, bad, pred)
    if kind == "dense":
        target = torch.where(hole, bad, target)
    elif kind == "labels":
        target = torch.where(mask, target, 99)
    else:
        values = torch.where(hole, bad, target.values)
        target = type(target)(values, torch.where(hole, -7, target.indices), target.rest)
    layout = torch.channels_last if c.channels_last else torch.contiguous_format
    assert same(
        value_and_grad(loss, pred.contiguous(memory_format=layout), target, mask), (value, grad)
    )


@few
@given(c=case(min_images=1))
def test_ignored_labels_are_a_mask(backend, c: Case):
    mask, pred, labels = c.mask(), c.maps(), c.labels()
    masked = value_and_grad(c.loss(backend=backend), pred, labels, mask)
    ignored = torch.where(mask, labels, 255)
    pred = torch.where(mask.unsqueeze(1), pred, float("nan"))
    got = value_and_grad(c.loss(backend=backend, ignore_index=255), pred, ignored)
    assert same((got[0], got[1].contiguous()), (masked[0], masked[1].contiguous()))


@few
@given(c=case(), kind=st.sampled_from(KINDS))
def test_reductions_agree_and_a_batch_is_its_images(backend, c: Case, kind):
    pred, target = c.maps(), c.target(kind)
    each, grads = value_and_grad(c.loss(backend=backend, reduction="none"), pred, target)
    total = value_and_grad(c.loss(backend=backend, reduction="sum"), pred, target)
    mean = value_and_grad(c.loss(backend=backend, reduction="mean"), pred, target)
    n = max(c.shape[0], 1)
    close(total, (each.sum(), grads))
    close(mean, (each.sum() / n, grads / n))
    loss = c.loss(backend=backend, reduction="sum")
    for i in range(c.shape[0]):
        one = slice(i, i + 1)
        t = (
            target[one]
            if kind != "topk"
            else type(target)(target.values[one], target.indices[one], target.rest)
        )
        close(value_and_grad(loss, pred[one], t), (each[i], grads[one]))


@few
@given(c=case(min_images=1), kind=st.sampled_from(KINDS))
def test_stored_features_are_the_target(backend, c: Case, kind):
    loss, pred, target, mask = c.loss(backend=backend), c.maps(), c.target(kind), c.mask()
    stored = loss.encode(target, mask)
    close(value_and_grad(loss, pred, stored), value_and_grad(loss, pred, target, mask))


@few
@given(
    c=case(), kind=st.sampled_from([*KINDS, "features"]), fill=st.sampled_from([float("nan"), 3.0])
)
def test_nothing_valid_is_zero_and_connected(backend, c: Case, kind, fill):
    loss, pred = c.loss(backend=backend), torch.full(c.shape, fill)
    mask = torch.zeros(c.shape[0], *c.shape[2:], dtype=torch.bool)
    target = loss.encode(c.maps(), mask) if kind == "features" else c.target(kind)
    value, grad = value_and_grad(loss, pred, target, None if kind == "features" else mask)
    assert not value.any()
    assert not grad.any()
    assert grad.shape == pred.shape


@pytest.mark.parametrize("kind", [*KINDS, "features"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_images(backend, reduction, kind):
    c = Case((0, 3, 9, 8), {"net": "1,1"}, {"reduction": reduction}, False, 0)
    loss = c.loss(backend=backend)
    target = loss.encode(c.maps()) if kind == "features" else c.target(kind)
    value, grad = value_and_grad(loss, c.maps(), target)
    assert value.shape == ((0,) if reduction == "none" else ())
    assert not value.any()
    assert grad.shape == c.shape


@pytest.mark.parametrize("n", [0, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_valid_in_the_other_losses(backend, reduction, n):
    options = {"reduction": reduction, "backend": backend}
    net = LossNet.vgg(3, (1, 1), (4, 5))
    total = SegmentationLoss(3, net=net, class_weight=[1, 2, 3], **options)
    family = PerceptualLoss(net, {"relu2_1": 1.0}, {"pool1": 1.0}, tv_weight=1.0, **options)
    pred, nothing = torch.full((n, 3, 8, 9), float("nan")), torch.zeros(n, 8, 9, dtype=torch.bool)
    for loss, target in ((total, torch.full((n, 8, 9), 255)), (family, torch.rand(n, 3, 8, 9))):
        value, grad = value_and_grad(lambda x, f=loss, t=target: f(x, t, mask=nothing), pred)
        assert value.shape == ((n,) if reduction == "none" else ())
        assert not value.any()
        assert not grad.any()


def test_a_target_never_gets_a_gradient(backend):
    loss = GenericPerceptualLoss(3, "1", widths=(4,), backend=backend)
    pred, target = (torch.randn(1, 3, 8, 8, requires_grad=True) for _ in range(2))
    loss(pred, target).backward()
    assert pred.grad is not None
    assert target.grad is None
    assert not loss(pred.detach(), target).requires_grad
