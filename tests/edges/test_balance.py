"""suggest_weight and explain(ratio=True): norms of the parts' gradients, whatever mode is on."""

from __future__ import annotations

import pytest
import torch

from gpl_fast import GenericPerceptualLoss, LossNet, PerceptualLoss, SegmentationLoss, TopK

N, C, SIZE = 2, 5, (24, 20)
HALF = (torch.bfloat16, torch.float16)


def batch(dtype=torch.float32):
    y = torch.randint(0, C, (N, *SIZE))
    y[:, :3] = 255
    return (2 * torch.randn(N, C, *SIZE)).to(dtype), y


def norms(loss, x, y, **given):
    """Of the parts' gradients by plain autograd, in float64 by the reference."""
    leaf = x.detach().double().requires_grad_()
    wide = SegmentationLoss(
        C, net=loss.net, ce_weight=loss.ce_weight, gpl_weight=1, class_weight=loss.class_weight,
        label_smoothing=loss.label_smoothing, backend="reference", return_parts=True,
    )  # fmt: skip
    parts = wide(leaf, y, **given)
    return [float(torch.autograd.grad(p, leaf, retain_graph=True)[0].norm()) for p in
            parts.values()]  # fmt: skip


TARGETS = {
    "labels": lambda loss: None,
    "dense": lambda loss: torch.randn(N, C, *SIZE),
    "topk": lambda loss: TopK(*torch.randn(N, C, *SIZE).softmax(1).topk(2, dim=1)),
    "features": lambda loss: loss.encode(torch.randn(N, C, *SIZE)),
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_suggested_weight_gives_the_share(kind, mode, reduction, backend):
    loss = SegmentationLoss(
        C, net="1,1", reduction=reduction, backend=backend, ce_weight=2.0, label_smoothing=0.1,
        class_weight=[1, 2, 0, 1, 0.5],
    )  # fmt: skip
    with mode():
        x, y = batch()
        teacher = TARGETS[kind](loss)
        mask = None if kind == "features" else torch.rand(N, *SIZE) > 0.2
        got = loss.suggest_weight(x, y, teacher, mask, share=0.25)
    given = {} if kind == "features" else {"mask": mask.clone()}
    if isinstance(teacher, torch.Tensor):
        given["teacher"] = teacher.clone()
    elif teacher is not None:  # other kinds have no float64 of their own
        given["teacher"] = teacher
    if kind == "features":
        return check_against_itself(loss, x, y, teacher, got)
    ce, gpl = norms(loss, x.clone(), y.clone(), **given)
    assert isinstance(got, float)
    assert got == pytest.approx(0.25 * ce / gpl, rel=1e-3)


def check_against_itself(loss, x, y, teacher, suggested):
    """Stored features are float32: the loss that is made with the weight has the share."""
    made = SegmentationLoss(
        C, net=loss.net, gpl_weight=suggested, ce_weight=loss.ce_weight, label_smoothing=0.1,
        class_weight=loss.class_weight, return_parts=True, backend=loss.gpl.options.backend,
    )  # fmt: skip
    leaf = x.clone().requires_grad_()
    ce, gpl = (
        torch.autograd.grad(p, leaf, retain_graph=True)[0].norm()
        for p in made(leaf, y.clone(), teacher).values()
    )
    assert float(gpl / ce) == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize("dtype", HALF)
def test_in_half_precision_small_gradients_are_not_lost(dtype, backend):
    """The mean over many pixels is below float16's smallest number, and so would the norm be."""
    x, y = batch(dtype)
    loss = SegmentationLoss(C, net="1,1", backend=backend)
    ce, gpl = norms(loss, x, y)
    assert loss.suggest_weight(x, y) == pytest.approx(0.1 * ce / gpl, rel=0.05)


def test_logits_smaller_than_the_labels_are_what_the_gradient_is_by(backend):
    x, y = batch()
    loss = SegmentationLoss(C, net="1,1", backend=backend)
    ce, gpl = norms(loss, x[:, :, ::2, ::2], y)
    assert loss.suggest_weight(x[:, :, ::2, ::2], y) == pytest.approx(0.1 * ce / gpl, rel=1e-3)


def test_nothing_of_the_user_is_touched(backend):
    x, y = batch()
    x.requires_grad_()
    x.grad = torch.ones_like(x)
    x.register_hook(lambda grad: pytest.fail("the user's hook ran"))
    before = x.detach().clone(), y.clone()
    loss = SegmentationLoss(C, net="1,1", backend=backend)
    loss.suggest_weight(x, y)
    loss.explain(x, y, ratio=True)
    assert torch.equal(x.detach(), before[0])
    assert torch.equal(y, before[1])
    assert (x.grad == 1).all()


def test_a_gradient_of_0_has_no_share(backend):
    x, y = batch()
    loss = SegmentationLoss(C, net="1,1", backend=backend)
    with pytest.raises(ValueError, match=r"norm 0\.0 of the perceptual term.*equals the target"):
        loss.suggest_weight(x, y, teacher=x.clone())
    with pytest.raises(ValueError, match=r"norm 0\.0 of the cross-entropy"):
        loss.suggest_weight(x, torch.full_like(y, 255), teacher=torch.randn_like(x))
    off = SegmentationLoss(C, net="1,1", ce_weight=0, backend=backend)
    with pytest.raises(ValueError, match="ce_weight is 0"):
        off.suggest_weight(x, y)
    with pytest.raises(ValueError, match=r"norm nan of the cross-entropy"):
        loss.suggest_weight(x.clone().fill_(float("nan")), y)
    for share in (0, -1, float("inf"), "0.1"):
        with pytest.raises(ValueError, match="share: got"):
            loss.suggest_weight(x, y, share=share)


def test_explain_says_the_ratio(backend):
    x, y = batch()
    loss = SegmentationLoss(C, net="1,1", gpl_weight=0.3, backend=backend)
    ce, gpl = norms(loss, x, y)
    found = loss.explain(x, y, ratio=True)
    assert found.ratio == {"loss_gpl": pytest.approx(0.3 * gpl / ce, rel=1e-3)}
    assert f"gradients      loss_gpl {found.ratio['loss_gpl']:.3g} of the first part's" in str(
        found
    )
    plain = loss.explain(x, y)
    assert plain.ratio is None
    assert "gradients" not in str(plain)
    loss.ce_weight = 0.0
    assert loss.explain(x, y, ratio=True).ratio == {}


def test_explain_of_three_parts_and_of_one(backend):
    net = LossNet.vgg(C, (1, 1))
    x, t = torch.randn(N, C, *SIZE), torch.randn(N, C, *SIZE)
    loss = PerceptualLoss(net, {"pool1": 2.0}, {"pool2": 3.0}, tv_weight=0.5, backend=backend)
    found = loss.explain(x, t, ratio=True)
    leaf = x.clone().double().requires_grad_()
    wide = PerceptualLoss(net, {"pool1": 2.0}, {"pool2": 3.0}, tv_weight=0.5, return_parts=True)
    want = [
        float(torch.autograd.grad(p, leaf, retain_graph=True)[0].norm())
        for p in wide(leaf, t.double()).values()
    ]
    assert found.ratio["loss_style"] == pytest.approx(want[1] / want[0], rel=1e-3)
    assert found.ratio["loss_tv"] == pytest.approx(want[2] / want[0], rel=1e-3)
    smooth = PerceptualLoss(net, {"pool1": 2.0}, backend=backend)
    assert smooth.explain(x, t, ratio=True).ratio == {}
    alone = GenericPerceptualLoss(C, net, backend=backend).explain(x, t, ratio=True)
    assert alone.ratio == {}
    assert "of one part: no ratio" in str(alone)


def test_a_ratio_is_measured_on_values():
    x, y = batch()
    loss = SegmentationLoss(C, net="1,1")
    with pytest.raises(ValueError, match="'meta', expected one that holds values"):
        loss.explain(x.to("meta"), y.to("meta"), ratio=True)
    with pytest.raises(ValueError, match="'meta', expected one that holds values"):
        loss.suggest_weight(x.to("meta"), y.to("meta"))
    with pytest.raises(ValueError, match=r"^suggest_weight: .*use explain"):
        loss.suggest_weight(x.to("meta"), y.to("meta"))
