"""Losses that differ in numbers alone, compiled in one process; what compiled ones still refuse."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from gpl_fast import GenericPerceptualLoss, LossNet, PerceptualLoss, SegmentationLoss

C, SIZE = 3, (32, 36)
X, T = torch.randn(2, C, *SIZE), torch.randn(2, C, *SIZE)
Y = torch.randint(0, C, (2, *SIZE))
SMALL = {"net": "1,1", "widths": (8, 8)}
NET = LossNet.vgg(C, (1, 1), (8, 8))

# Three losses of a kind, of the numbers 1, 2 and 3, and what they are called with.
NUMBERS = {
    "level_weights": (
        lambda i, **o: GenericPerceptualLoss(C, level_weights=[i / 2, 1], **SMALL, **o), (T,)),
    "channels": (lambda i, **o: GenericPerceptualLoss(
        C, level_weights=[[i / 2] * 8, [j + i for j in range(8)]], **SMALL, **o), (T,)),
    "criterion": (lambda i, **o: GenericPerceptualLoss(
        C, criterion=("l1", "l2", "l1")[i - 1], normalize_features=i > 1, **SMALL, **o), (T,)),
    "temperature": (lambda i, **o: GenericPerceptualLoss(C, temperature=i / 2, **SMALL, **o), (T,)),
    "workspace_mb": (lambda i, **o: GenericPerceptualLoss(C, workspace_mb=16.5 * i, **SMALL, **o),
                     (T,)),
    "label_smoothing": (lambda i, **o: SegmentationLoss(C, label_smoothing=i / 8, **SMALL, **o),
                        (Y,)),
    "gpl_weight": (lambda i, **o: SegmentationLoss(C, gpl_weight=i / 8, **SMALL, **o), (Y,)),
    "ce_weight": (lambda i, **o: SegmentationLoss(C, ce_weight=i / 8, **SMALL, **o), (Y,)),
    "feature weights": (lambda i, **o: PerceptualLoss(NET, {"relu1_1": i / 2}, **o), (T,)),
    "style weights": (lambda i, **o: PerceptualLoss(NET, {}, {"relu2_1": i / 2}, **o), (T,)),
    "tv_weight": (lambda i, **o: PerceptualLoss(NET, {"relu1_1": 1.0}, tv_weight=i / 2, **o), (T,)),
    "seed": (lambda i, **o: GenericPerceptualLoss(C, seed=i, **SMALL, **o), (T,)),
    "ignore_index": (lambda i, **o: GenericPerceptualLoss(C, ignore_index=i, **SMALL, **o), (Y,)),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_each_has_its_own_number(name, backend):
    make, args = NUMBERS[name]
    for i in (1, 2, 3):
        loss = make(i, backend=backend)
        x = X.clone().requires_grad_()
        want = loss(x, *args)
        got = torch.compile(loss, backend="aot_eager", fullgraph=True)(x, *args)
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(v, x)[0] for v in (got, want)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "names", [("level_weights", "temperature", "seed"), ("channels", "criterion")], ids=str
)
def test_one_compiled_function_of_several_losses(names, backend):
    """The loss is an argument: as a training step that takes it."""
    compiled = torch.compile(lambda loss, x: loss(x, T), backend="aot_eager", fullgraph=True)
    for name in names:
        for i in (1, 2):
            loss = NUMBERS[name][0](i, backend=backend)
            torch.testing.assert_close(compiled(loss, X), loss(X, T))


def test_a_number_that_is_set_later_counts(backend):
    loss = SegmentationLoss(C, backend=backend, **SMALL)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for smoothing in (0.0, 0.25, 0.5):
        loss.label_smoothing = smoothing
        want = SegmentationLoss(C, label_smoothing=smoothing, backend=backend, **SMALL)(X, Y)
        torch.testing.assert_close(compiled(X, Y), want)
        torch.testing.assert_close(loss(X, Y), want)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_tangent_behind_a_plain_call_is_refused(requires_grad):
    loss = GenericPerceptualLoss(C, backend="fast", **SMALL)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    x = X.clone().requires_grad_(requires_grad)
    want = loss(x, T)
    torch.testing.assert_close(compiled(x, T), want)
    with (
        forward_ad.dual_level(),
        pytest.raises(Exception, match="backend='reference'"),
    ):
        compiled(forward_ad.make_dual(x, torch.ones_like(x)), T)
    torch.testing.assert_close(compiled(x, T), want)


def test_a_batched_backward_is_refused_with_the_way_out():
    x = X.clone().requires_grad_()
    loss = GenericPerceptualLoss(C, backend="fast", reduction="none", **SMALL)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.autograd.grad(loss(x, T), x, torch.eye(2), is_grads_batched=True)
    plain = GenericPerceptualLoss(C, backend="reference", reduction="none", **SMALL)
    rows = torch.autograd.grad(plain(x, T), x, torch.eye(2), is_grads_batched=True)[0]
    assert rows.shape == (2, *x.shape)


def test_a_mask_that_contradicts_stored_features(backend):
    loss = GenericPerceptualLoss(C, backend=backend, compute_dtype=torch.float32, **SMALL)
    mask = torch.rand(2, *SIZE) > 0.5
    features = loss.encode(T, mask)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X, features, mask), loss(X, features, mask))
    for call in (loss, compiled):
        with pytest.raises(ValueError, match="differs from the mask"):
            call(X, features, ~mask)
    total = SegmentationLoss(C, gpl_ignore=True, backend=backend, compute_dtype=torch.float32)
    labels = Y.clone()
    labels[:, :4] = 255
    features = total.encode(T, labels != 255)
    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X, labels, features), total(X, labels, features))
    for call in (total, compiled):
        with pytest.raises(ValueError, match="gpl_ignore=True"):
            call(X, Y, features)
