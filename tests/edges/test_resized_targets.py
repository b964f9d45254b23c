"""A dense target of another size: holes leave before the resize, or it must be finite."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gpl_fast import GenericPerceptualLoss, PerceptualLoss, SegmentationLoss
from gpl_fast.targets import values

C, SIZE = 3, (40, 36)
SMALL, LARGE = (17, 22), (67, 50)


def bilinear_weights(own, size):
    """(H * W, h * w): what each source weighs in each result, by resizing unit impulses."""
    impulses = torch.eye(own[0] * own[1], dtype=torch.float64).view(-1, 1, *own)
    out = F.interpolate(impulses, size=size, mode="bilinear", align_corners=False)
    return out.flatten(1).t()


def by_definition(target, valid, size):
    """``Σ b m t / Σ b m`` and the nearest source's validity, from the matrix of weights."""
    n, c, *own = target.shape
    b = bilinear_weights(own, size)
    m = valid.flatten(1).double()  # (n, h * w)
    t = torch.where(valid.unsqueeze(1), target.double(), 0).flatten(2)
    total = torch.einsum("ps,ncs,ns->ncp", b, t, m)
    weight = torch.einsum("ps,ns->np", b, m).unsqueeze(1)
    y = (total / torch.where(weight > 0, weight, 1)).view(n, c, *size)
    i = ((torch.arange(size[0]) + 0.5) * own[0] / size[0]).floor().long()
    j = ((torch.arange(size[1]) + 0.5) * own[1] / size[1]).floor().long()
    return y, valid[:, i][:, :, j]


def holed(own, fill):
    target = 2 * torch.randn(2, C, *own)
    valid = torch.rand(2, *own) > 0.25
    valid[0, : own[0] // 2, : own[1] // 3] = False
    return torch.where(valid.unsqueeze(1), target, fill), valid


@pytest.mark.parametrize("own", [SMALL, LARGE, (SIZE[0], 20)])
@pytest.mark.parametrize("fill", [float("nan"), 0.0, float("inf")])
@pytest.mark.parametrize("activation", ["none", "softmax"])
def test_holes_do_not_bleed_into_valid_pixels(own, fill, activation, backend):
    target, valid = holed(own, fill)
    pred = torch.randn(2, C, *SIZE)
    y, ok = by_definition(target, valid, SIZE)
    truth = GenericPerceptualLoss(C, activation=activation, backend="reference")
    x64 = pred.double().requires_grad_()
    want = truth(x64, y, ok)
    want.backward()
    loss = GenericPerceptualLoss(C, activation=activation, backend=backend)
    for mask in (valid, valid.unsqueeze(1)):
        x = pred.clone().requires_grad_()
        got = loss(x, target, mask)
        got.backward()
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
        cosine = torch.cosine_similarity(x.grad.double().flatten(), x64.grad.flatten(), dim=0)
        assert cosine > 1 - 1e-6
        assert (x.grad[~ok.unsqueeze(1).expand_as(x)] == 0).all()


@pytest.mark.parametrize("workspace_mb", [1, 256])
def test_in_strips_as_whole(workspace_mb):
    target, valid = holed((61, 33), float("nan"))
    pred = torch.randn(2, C, 96, 50)
    options = {"net": "1,1", "widths": (8, 8), "activation": "none"}
    y, ok = by_definition(target, valid, (96, 50))
    want = GenericPerceptualLoss(C, backend="reference", **options)(pred.double(), y, ok)
    got = GenericPerceptualLoss(C, backend="fast", workspace_mb=workspace_mb, **options)(
        pred, target, valid
    )
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


def test_an_all_valid_mask_of_either_size_is_no_mask(backend):
    target, pred = torch.randn(2, C, *SMALL), torch.randn(2, C, *SIZE)
    loss = GenericPerceptualLoss(C, backend=backend)
    want = loss(pred, target)
    for size in (SMALL, SIZE):
        torch.testing.assert_close(loss(pred, target, torch.ones(2, *size, dtype=torch.bool)), want)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_with_the_predictions_mask_the_target_must_be_finite(bad, backend):
    target, pred = torch.randn(2, C, *SMALL), torch.randn(2, C, *SIZE)
    target[1, 2, 3, 4] = bad
    valid = torch.rand(2, *SIZE) > 0.5
    loss = GenericPerceptualLoss(C, backend=backend)
    with pytest.raises(ValueError, match=r"mask of the target's own size, \(17, 22\)"):
        loss(pred, target, valid)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match="mask of the target's own size"):
        compiled(pred, target, valid)
    target[1, 2, 3, 4] = 0
    assert loss(pred, target, valid).isfinite()


def test_a_teacher_of_another_size_without_ignored_pixels_must_be_finite():
    total = SegmentationLoss(C, gpl_ignore=True)
    logits, labels = torch.randn(2, C, *SIZE), torch.randint(0, C, (2, *SIZE))
    labels[:, :5] = 255
    teacher = torch.randn(2, C, *SMALL)
    assert total(logits, labels, teacher).isfinite()
    teacher[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="teacher: got NaN"):
        total(logits, labels, teacher)


def test_nan_under_a_mask_of_the_same_size_does_no_harm(backend):
    """README: a masked pixel's NaN, in prediction and target alike."""
    pred, target = torch.randn(2, C, *SIZE), torch.randn(2, C, *SIZE)
    valid = torch.rand(2, *SIZE) > 0.5
    loss = GenericPerceptualLoss(C, backend=backend)
    holes = ~valid.unsqueeze(1)
    got = loss(pred.masked_fill(holes, torch.nan), target.masked_fill(holes, torch.nan), valid)
    assert torch.equal(got, loss(pred, target, valid))


def test_the_johnson_family_takes_it_too(backend):
    target, valid = holed(SMALL, float("nan"))
    pred = torch.randn(2, C, *SIZE)
    y, ok = by_definition(target, valid, SIZE)
    net = GenericPerceptualLoss(C).net
    layers = {"relu1_1": 1.0, "pool2": 2.0}, {"relu2_1": 1.0}
    want = PerceptualLoss(net, *layers, tv_weight=0.1, backend="reference")(
        pred.double(), y, mask=ok
    )
    got = PerceptualLoss(net, *layers, tv_weight=0.1, backend=backend)(pred, target, mask=valid)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


def test_a_mask_of_neither_size_names_both():
    loss = GenericPerceptualLoss(C)
    with pytest.raises(ValueError, match="the prediction's size, or that of a dense target"):
        loss(torch.randn(2, C, *SIZE), torch.randn(2, C, *SMALL), torch.ones(2, 5, 5).bool())


def test_on_a_gpu_nobody_looks_at_holes(monkeypatch):
    monkeypatch.setattr(values, "may_look", lambda t: False)
    target = torch.full((2, C, *SMALL), float("nan"))
    valid = torch.rand(2, *SIZE) > 0.5
    assert GenericPerceptualLoss(C)(torch.randn(2, C, *SIZE), target, valid).isnan()


@pytest.mark.parametrize("own", [SMALL, LARGE])
def test_padding_with_the_lowest_number_survives_the_resize(own, backend):
    """Means of lowest numbers round to minus infinity; a pixel of these is uniform."""
    target, pred = torch.randn(2, C, *own), torch.randn(2, C, *SIZE)
    target[:, :, -9:] = torch.finfo(torch.float32).min
    loss = GenericPerceptualLoss(C, backend=backend)
    want = GenericPerceptualLoss(C, backend="reference")(pred.double(), target.double())
    torch.testing.assert_close(loss(pred, target).double(), want, rtol=1e-4, atol=0)
