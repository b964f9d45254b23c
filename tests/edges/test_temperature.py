"""Any temperature, any logits: a pixel's softmax is that of (x − max) / T, never NaN."""

from __future__ import annotations

import pytest
import torch
from cases import ATOL, error, value_and_grad
from extremes import LOWEST, TEMPERATURES, by_kind, logits_of_every_kind
from saved import left_by
from torch import Tensor

from gpl_fast import GenericPerceptualLoss, SegmentationLoss, TopK, reference
from gpl_fast.fast.branch import carry_target

C, H, W = 5, 12, 20
BF16 = torch.bfloat16


def gpl(backend: str, **options) -> GenericPerceptualLoss:
    # Without a maximum no rounding decides which way a gradient takes.
    small = {"net": "1", "widths": (8,), "pool": "avg", "target_activation": "same"}
    return GenericPerceptualLoss(C, backend=backend, **small | options)


def of_maps(y_pred: Tensor, y: Tensor) -> Tensor:
    """The loss by definition of two maps, in their dtype: what no temperature can touch."""
    loss = gpl("reference", activation="none", compute_dtype=y_pred.dtype)
    return loss(y_pred, y.to(y_pred.dtype))


def plain_softmax(x: Tensor, temperature: float) -> Tensor:
    return (x / temperature).softmax(dim=1)


def plain_grad(pred: Tensor, y: Tensor, temperature: float, dtype: torch.dtype):
    x = pred.to(dtype).requires_grad_()
    value = of_maps(plain_softmax(x, temperature), y)
    return value.detach(), torch.autograd.grad(value, x)[0]


def check_bounds(ours, plain, truth):
    """At most twice PyTorch's own error where that is a number."""
    for got, theirs, true in zip(ours, plain, truth, strict=True):
        assert not got.isnan().any()
        own = error(theirs, true) if theirs.isfinite().all() else 0.0
        assert error(got, true) <= 2 * own + ATOL[torch.float32]


# -------------------------------------------------------------------------------- the definition


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softmax_of_the_reference(dtype, temperature):
    x, dy = logits_of_every_kind(2, C, 3, 36), torch.randn(2, C, 3, 36)
    results = []
    for work, activate in (
        (dtype, lambda v: reference.activate(v, "softmax", temperature)),
        (torch.float32, lambda v: plain_softmax(v, temperature)),
        (torch.float64, lambda v: plain_softmax(v, temperature)),
    ):
        v = x.to(work, copy=True).requires_grad_()
        y = activate(v)
        y.backward(dy.to(work))
        results.append((y.detach(), v.grad))
    for ours, plain, truth in zip(*results, strict=True):
        for got, theirs, true in by_kind(ours, plain, truth):
            bound = 2 * (theirs - true).abs().max() + 1e-6 * max(1, true.abs().max())
            assert (got - true).abs().max() <= bound


@pytest.mark.parametrize("temperature", [1e-46, 1e-30, 0.3])
def test_other_activations_of_the_reference(temperature):
    x = torch.tensor([0.0, LOWEST, -LOWEST]).view(1, 3, 1, 1).requires_grad_()
    y = reference.activate(x, "sigmoid", temperature)
    y.sum().backward()
    assert y.flatten().tolist() == [0.5, 0.0, 1.0]
    assert x.grad.flatten()[1:].tolist() == [0.0, 0.0]
    assert reference.activate(x, "none", temperature).flatten()[0] == 0


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5)])
def test_empty_maps(shape):
    x = torch.zeros(shape, requires_grad=True)
    y = reference.activate(x, "softmax", 0.3)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


# ------------------------------------------------------------------------------------- the losses


@pytest.mark.parametrize("temperature", TEMPERATURES[1:-1])
@pytest.mark.parametrize("kind", ["dense", "labels", "topk"])
def test_value_and_gradient(backend, kind, temperature):
    pred = logits_of_every_kind(2, C, H, W)
    if kind == "dense":
        target = logits_of_every_kind(2, C, H, W).roll(1, dims=3)
        y = plain_softmax(target.double(), temperature)
    elif kind == "labels":
        target = torch.randint(0, C, (2, H, W))
        y = torch.nn.functional.one_hot(target, C).movedim(3, 1)
    else:
        values, indices = torch.rand(2, C, H, W).softmax(dim=1).topk(2, dim=1)
        target = TopK(values, indices, rest="drop")
        y = torch.zeros(2, C, H, W).scatter(1, indices, values)
    ours = value_and_grad(gpl(backend, temperature=temperature), pred, target)
    plain, truth = (plain_grad(pred, y, temperature, d) for d in (torch.float32, torch.float64))
    check_bounds(ours, plain, truth)


def test_a_temperature_below_float32_is_the_limit(backend):
    """Where two logits differ y' is one-hot with gradient 0, where none does it is uniform."""
    pred, target = logits_of_every_kind(2, C, H, W), torch.randint(0, C, (2, H, W))
    value, grad = value_and_grad(gpl(backend, temperature=1e-46), pred, target)
    y = plain_softmax(pred.double(), 1e-46)
    onehot = torch.nn.functional.one_hot(target, C).movedim(3, 1)
    assert error(value, of_maps(y, onehot)) < 1e-5
    assert not grad.isnan().any()
    assert not grad[..., ::4].any()
    assert not grad[..., 3::4].any()


def test_large_logits_at_a_small_temperature(backend):
    pred, target = 1e7 * torch.randn(2, C, H, W), torch.randn(2, C, H, W)
    ours = value_and_grad(gpl(backend, temperature=1e-3), pred, target)
    y = plain_softmax(target.double(), 1e-3)
    plain, truth = (plain_grad(pred, y, 1e-3, d) for d in (torch.float32, torch.float64))
    check_bounds(ours, plain, truth)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_half_precision_logits_padded_with_their_lowest(backend, dtype, activation):
    """One padded pixel, which was NaN for the whole image."""
    pred, target = torch.randn(1, C, H, W).to(dtype), torch.randn(1, C, H, W).to(dtype)
    pred[:, :, 3, 4] = torch.finfo(dtype).min
    loss = gpl(backend, activation=activation, temperature=3.0, compute_dtype=torch.float32)
    value, grad = value_and_grad(loss, pred, target)
    x, t = (v.double() / 3 for v in (pred, target))
    maps = (x.softmax(1), t.softmax(1)) if activation == "softmax" else (x.sigmoid(), t.sigmoid())
    assert error(value, of_maps(*maps)) < 1e-5
    assert grad.isfinite().all()


@pytest.mark.parametrize("size", [(H, W), (2 * H, 2 * W)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_teacher_padded_with_the_lowest_of_float64(backend, temperature, size):
    pred, target = torch.randn(1, C, H, W), torch.randn(1, C, *size).double()
    target[..., :4, :4] = torch.finfo(torch.float64).min / 2  # a resize may round beyond it
    y = plain_softmax(reference.resize(target, (H, W)), temperature)
    truth = of_maps(plain_softmax(pred.double(), temperature), y)
    assert error(gpl(backend, temperature=temperature)(pred, target), truth) < 1e-5


# ------------------------------------------------------------------- targets that are taken as is


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_probabilities_beside_an_activation_have_no_temperature(backend, activation):
    pred, y = torch.randn(2, C, H, W), torch.rand(2, C, H, W)
    how = {"activation": activation, "target_activation": "none", "temperature": 3.0}
    x = pred.double() / 3
    y_pred = x.softmax(1) if activation == "softmax" else x.sigmoid()
    truth = of_maps(y_pred, y)
    loss = gpl(backend, **how)
    assert error(loss(pred, y), truth) < 1e-5
    assert error(loss(pred, loss.encode(y)), truth) < 1e-5


def test_without_activations_both_are_divided(backend):
    pred, target = torch.randn(2, 2, C, H, W)
    for word in ("none", "same"):
        how = {"activation": "none", "target_activation": word, "temperature": 3.0}
        truth = of_maps(pred.double() / 3, target.double() / 3)
        assert error(gpl(backend, **how)(pred, target), truth) < 1e-5


def test_the_branch_that_is_carried_sees_the_map_that_is_compared():
    """Prediction and target are the same map, constant in most places: near, whatever T is."""
    y = torch.full((1, C, H, W), 0.1)
    y[:, 1, :, 10:], y[:, 0, :, :10] = 0.6, 0.6
    how = {"target_activation": "none", "temperature": 3.0, "compute_dtype": BF16}
    pred = (3.0 * y.log()).requires_grad_()
    call = left_by(gpl("fast", **how)(pred, y))[0].call
    assert call.dtype == BF16
    assert carry_target(call, pred, {"dense": y}, slice(0, 1)).all()


# ---------------------------------------------------------------------------------- cross-entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("activation", "temperature"), [("softmax", 3.0), ("softmax", 0.3), ("sigmoid", 1.0)]
)
def test_a_total_without_gradient_is_that_with_one(backend, activation, temperature, smoothing):
    total = SegmentationLoss(
        C, net="1", widths=(8,), activation=activation, temperature=temperature,
        label_smoothing=smoothing, backend=backend,
    )  # fmt: skip
    logits, labels = torch.randn(2, C, H, W), torch.randint(0, C, (2, H, W))
    with torch.no_grad():
        alone = total(logits, labels)
    assert torch.equal(alone, total(logits.requires_grad_(), labels).detach())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_cross_entropy_of_padded_pixels(backend, smoothing):
    """A pixel without any class is uniform: log C."""
    total = SegmentationLoss(
        C, net="1", widths=(8,), gpl_weight=1e-6, temperature=3.0, label_smoothing=smoothing,
        backend=backend,
    )  # fmt: skip
    logits, labels = torch.full((1, C, H, W), LOWEST), torch.randint(0, C, (1, H, W))
    parts = total(logits.requires_grad_(), labels, return_parts=True)
    torch.testing.assert_close(parts["loss_ce"], torch.tensor(float(C)).log())
    sum(parts.values()).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_an_image_whose_total_has_weight_0_has_no_gradient(backend, temperature):
    total = SegmentationLoss(
        C, net="1", widths=(8,), temperature=temperature, reduction="none", backend=backend
    )
    logits = logits_of_every_kind(2, C, H, W).requires_grad_()
    value = total(logits, torch.randint(0, C, (2, H, W)))
    value.backward(torch.tensor([0.0, 1.0]))
    assert (logits.grad[0] == 0).all()
    assert logits.grad[1].any()
